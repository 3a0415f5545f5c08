"""Reward functions of the user's, run on the host in processes of their own, each completion with a time limit.

A completion at which a function raises, hangs, returns nonsense or takes its process down gets the function's
`failure_score`, and the failure is counted. The batch is never lost, and nothing waits for ever.

Written by hand rather than on concurrent.futures or pebble: in both the workers share a pipe and a lock, so one that
is killed at the wrong moment breaks the pool or stops it for good. Here every worker has a socket of its own, on which
`messages` are data, never pickles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.messages import TOKEN_BYTES, Messages, as_json
from posttrain_jax.rewards.worker_process import (
    DIED,
    NOT_A_NUMBER,
    NOT_FINITE,
    RAISED,
    TIMED_OUT,
    WRONG_COUNT,
    Reply,
)

FAILURES = (RAISED, TIMED_OUT, DIED, NOT_FINITE, NOT_A_NUMBER, WRONG_COUNT)
"""Everything that can be counted in `Scores.counts`."""

START_ATTEMPTS = 3
_END_SECONDS = 5.0
_SEND_SECONDS = 30.0  # for a message to a process that waits for one
_LONGEST_WAIT_SECONDS = 3600.0  # poll() cannot wait for ever
_START = "from posttrain_jax.rewards.worker_process import main; main({descriptor}, {parent})"


@dataclasses.dataclass(frozen=True)
class PythonReward:
    """A reward function by its name.

    The function takes a list of `Completion`s and returns a list of as many numbers. It is called once with an empty
    list when a process starts, so that it can load what it needs outside the time limit; `InputError` raised there is
    the user's to read, any other exception there is not looked at.

    Attributes:
      path: "module:function", as Python would import it.
      arguments: keyword arguments of every call: plain values, as in JSON.
      seconds: time limit for one completion (the limit of a call is that times its completions).
      completions_per_call: how many completions it gets at once. More than 1 is for functions that are faster so; when
        such a call fails as a whole, its completions are given to it again one by one.
      failure_score: what a completion gets that the function gives no number.

    Raises:
      InputError: the path or a number makes no sense.
    """

    path: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 10.0
    completions_per_call: int = 1
    failure_score: float = 0.0

    def __post_init__(self) -> None:
        module, _, attribute = self.path.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
            raise InputError(
                f"{self.path!r} names no reward function; write module:function, such as my_rewards:politeness."
            )
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise InputError(f"The time limit of {self.path} is {self.seconds} s; write a positive number.")
        if self.completions_per_call < 1:
            raise InputError(
                f"{self.path} gets {self.completions_per_call} completions per call; write 1 or more."
            )
        if not abs(self.failure_score) <= float(np.finfo(np.float32).max):
            raise InputError(
                f"The failure score of {self.path} is {self.failure_score}; write a finite number."
            )
        as_json(self.arguments, f"The arguments of {self.path}")


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one function gave to N completions, in their order.

    Attributes:
      scores_N: float32, finite; `failure_score` where the function failed.
      failures: for each completion one of FAILURES, or None where its score is the function's.
      counts: how many completions failed in which way; every one of FAILURES is there.
      errors: the first error of each kind that occurred, in one line, in the completions' order.
    """

    scores_N: np.ndarray
    failures: list[str | None]
    counts: dict[str, int]
    errors: dict[str, str]


@dataclasses.dataclass
class _Call:
    """Completions (by their indices) that are to be given to a function, and how many processes ended over it."""

    name: str
    indices: list[int]
    deaths: int = 0


@dataclasses.dataclass
class _Worker:
    """A process and what it is doing; `deadline` is of its start until it is ready, then of its call."""

    process: subprocess.Popen
    messages: Messages
    deadline: float
    ready: bool = False
    call: _Call | None = None


@dataclasses.dataclass
class _Results:
    """Scores in the making, of one function."""

    scores_N: np.ndarray
    failures: list[str | None]
    errors: dict[str, tuple[int, str]]  # with the completion's index

    def fill(self, indices: list[int], reply: Reply, failure_score: float) -> None:
        for index, value, failure in zip(indices, reply.values, reply.failures, strict=True):
            self.scores_N[index] = value if failure is None else failure_score
            self.failures[index] = failure
        first = next((n for n, failure in enumerate(reply.failures) if failure is not None), None)
        if first is not None:
            kind, error = str(reply.failures[first]), (indices[first], reply.error)
            # The earliest completion's, whichever process was faster.
            self.errors[kind] = min(error, self.errors.get(kind, error))


class RewardWorkers:
    """Processes that call reward functions. Use it in a `with` block; one thread asks at a time.

    A process ends with its parent, is not started by fork (JAX's threads would be copied in whatever state they are)
    and does not import the main module. The functions run with JAX_PLATFORMS=cpu, for the accelerator is taken. What
    they print goes to stderr.

    Args:
      functions: the rewards, each under the name that its scores have.
      workers: how many processes.
      start_seconds: how long a process may take to import all functions.

    Raises:
      InputError: a function does not exist, cannot be imported or called, or the processes cannot be started.
    """

    def __init__(
        self, functions: Mapping[str, PythonReward], *, workers: int = 2, start_seconds: float = 120.0
    ) -> None:
        if workers < 1:
            raise InputError(f"{workers} reward workers cannot score anything; write 1 or more.")
        self._functions = dict(functions)
        self._count = workers
        self._start_seconds = start_seconds
        self._failures_in_row = 0
        self._workers: list[_Worker] = []
        self._begin()

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def score(self, completions: Sequence[Completion]) -> dict[str, Scores]:
        """Every function's scores of every completion, in the completions' order.

        The same whatever the number of processes and whichever is faster, as long as a function makes a completion's
        number of that completion alone. A completion whose process dies is given to another process once more, for the
        kernel may have ended it for what another did; then it counts as `died`.

        Raises:
          InputError: a process that was to replace a dead one does not start.
        """
        results = {
            name: _Results(np.zeros(len(completions), np.float32), [None] * len(completions), {})
            for name in self._functions
        }
        pending = deque(
            _Call(name, list(range(first, min(first + function.completions_per_call, len(completions)))))
            for name, function in self._functions.items()
            for first in range(0, len(completions), function.completions_per_call)
        )
        try:
            self._begin()
            while pending or any(worker.call for worker in self._workers):
                self._hand_out(pending, completions)
                self._listen(pending, results)
        except BaseException:
            self.close()  # nobody waits any more for what is still running
            raise
        return {
            name: Scores(
                result.scores_N,
                result.failures,
                {kind: Counter(result.failures)[kind] for kind in FAILURES},
                {kind: error for kind, (_, error) in sorted(result.errors.items(), key=lambda item: item[1])},
            )
            for name, result in results.items()
        }

    def close(self) -> None:
        """Ends the processes. `score` starts new ones."""
        while self._workers:
            _end(self._workers.pop())

    def _begin(self) -> None:
        """Starts the processes if there are none, and waits for the first to be ready."""
        if self._workers:
            return
        try:
            self._workers += [self._started() for _ in range(self._count)]
            while not any(worker.ready for worker in self._workers):
                self._listen(deque(), {})
        except BaseException:
            self.close()
            raise

    def _started(self) -> _Worker:
        ours, theirs = socket.socketpair()
        ours.settimeout(_SEND_SECONDS)
        token = os.urandom(TOKEN_BYTES)
        descriptor = theirs.fileno()
        # Imports are looked up as here; a set of strings has the same order in every process.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        path = json.dumps([folder or os.getcwd() for folder in sys.path])
        start = _START.format(descriptor=descriptor, parent=os.getpid())
        try:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); {start}",
                    path,
                ],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(descriptor,),
                env=environment,
                start_new_session=True,  # so that what a function starts ends with it, and Ctrl-C is ours
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = _Worker(process, Messages(ours, token), time.monotonic() + self._start_seconds)
        functions = {name: (each.path, dict(each.arguments)) for name, each in self._functions.items()}
        try:
            ours.sendall(token)
            worker.messages.send(as_json(functions, "The arguments of a reward function"))
        except OSError:
            pass  # it is dead already, which `_listen` will notice
        except BaseException:
            _end(worker)
            raise
        return worker

    def _hand_out(self, pending: deque[_Call], completions: Sequence[Completion]) -> None:
        for place, worker in enumerate(self._workers):
            if not pending or not worker.ready or worker.call is not None:
                continue
            call = pending.popleft()
            given = [vars(completions[index]) for index in call.indices]
            text = as_json((call.name, given), "A row of the data, or its prompt,")
            try:
                worker.messages.send(text)
            except OSError:  # it died while it had nothing to do
                pending.appendleft(call)
                self._died(place, pending, {})
                continue
            worker.call = call
            worker.deadline = time.monotonic() + self._functions[call.name].seconds * len(call.indices)

    def _listen(self, pending: deque[_Call], results: dict[str, _Results]) -> None:
        """Waits until a process says something, ends, or has had its time, and does what follows."""
        now = time.monotonic()
        until = min(
            worker.deadline for worker in self._workers if worker.call is not None or not worker.ready
        )
        heard = wait(
            [worker.messages.fileno() for worker in self._workers],
            min(max(0.0, until - now), _LONGEST_WAIT_SECONDS),
        )
        now = time.monotonic()
        for place, worker in enumerate(self._workers):
            received: list[Any] = []
            if worker.messages.fileno() in heard:
                try:
                    received = worker.messages.read()
                except (EOFError, OSError):
                    self._died(place, pending, results)
                    continue
                except ValueError:
                    self._died(place, pending, results, how="its reply cannot be read")
                    continue
            if received and not worker.ready:
                self._ready(worker, received[0])
            elif received and worker.call is not None:
                call, worker.call = worker.call, None
                self._failures_in_row = 0
                self._done(call, Reply(**received[0]), pending, results)
            elif now >= worker.deadline and (worker.call is not None or not worker.ready):
                self._late(place, pending, results)

    def _ready(self, worker: _Worker, message: str) -> None:
        if message:
            raise InputError(message)
        worker.ready = True

    def _died(
        self, place: int, pending: deque[_Call], results: dict[str, _Results], *, how: str = ""
    ) -> None:
        worker = self._workers[place]
        how = how or _how_it_ended(worker.process)
        self._replace(place)
        if worker.call is None:
            self._count_failure(how)
        else:
            worker.call.deaths += 1
            if worker.call.deaths == 1 and len(worker.call.indices) == 1:
                pending.appendleft(worker.call)
            else:
                self._done(
                    worker.call, _lost(worker.call, DIED, f"its process died: {how}"), pending, results
                )

    def _late(self, place: int, pending: deque[_Call], results: dict[str, _Results]) -> None:
        worker = self._workers[place]
        self._replace(place)
        if worker.call is None:
            self._count_failure(f"it was not ready after {self._start_seconds:g} s")
        else:
            limit = self._functions[worker.call.name].seconds
            error = f"it took longer than {limit:g} s for a completion"
            self._done(worker.call, _lost(worker.call, TIMED_OUT, error), pending, results)

    def _done(self, call: _Call, reply: Reply, pending: deque[_Call], results: dict[str, _Results]) -> None:
        if reply.whole and len(call.indices) > 1:
            pending.extendleft(_Call(call.name, [index]) for index in reversed(call.indices))
            return
        results[call.name].fill(call.indices, reply, self._functions[call.name].failure_score)

    def _count_failure(self, how: str) -> None:
        """Counts a process that came to nothing while it had no call to blame."""
        self._failures_in_row += 1
        if self._failures_in_row >= START_ATTEMPTS * self._count:
            paths = ", ".join(each.path for each in self._functions.values())
            raise InputError(
                f"The processes for the reward functions {paths} do not start ({how}; what it said stands above); "
                "import them in a Python of your own to see why."
            )

    def _replace(self, place: int) -> None:
        _end(self._workers[place])
        self._workers[place] = self._started()


def _lost(call: _Call, failure: str, error: str) -> Reply:
    count = len(call.indices)
    return Reply([0.0] * count, [failure] * count, error, whole=True)


def _end(worker: _Worker) -> None:
    """Kills a process and all that it started."""
    try:
        os.killpg(worker.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        worker.process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.process.wait(_END_SECONDS)
    worker.messages.close()


def _how_it_ended(process: subprocess.Popen) -> str:
    try:
        status = process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return "it closed its socket"
    return f"signal {-status}, {signal.strsignal(-status)}" if status < 0 else f"it exited with {status}"
