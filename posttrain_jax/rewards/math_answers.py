"""Is a mathematical answer right? Asked of math-verify, in a process of its own.

math-verify stops itself with SIGALRM, which works in the main thread of a process only, and not while a long
operation in C (a power with millions of digits) runs. So it gets a process: its main thread is free, whatever thread
asks, and the process is killed when the alarm does not help. This module imports nothing heavy, for that process does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import multiprocessing
import re
import resource
import signal
from multiprocessing.connection import Connection

from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards.numbers import plain_numbers

ALARM_SECONDS = 5
KILL_SECONDS = 30.0
START_SECONDS = 120.0
MEMORY = 4 << 30  # bytes of address space
_READY = b"ready"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an answer is right; what was taken for its result; why the comparison failed (then it is not right)."""

    right: bool
    extracted: str | None
    error: str | None = None


def final_part(text: str) -> str:
    """The part of a solution that holds its result: the rest of the line after the last `####` that a number or formula
    follows (as in GSM8K; a heading such as `#### Step 2` is none), else all of it."""
    marked = re.findall(
        r"####[ \t]*([-+(.$€£¥\\\d\u2010-\u2013\u2212\uff0b\uff0d\u00bc-\u00be\u2150-\u215e].*)", text
    )
    return marked[-1].strip() if marked else text


def require_math_verify() -> None:
    """Raises InputError where the package is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(
            "Checking mathematical answers needs the package math-verify; install it with pip install -e '.[eval]'."
        )


class MathVerifier:
    """Compares answers with references; one process, started at the first question and again after a kill.

    Use it in a `with` block. Not thread-safe: one thread asks at a time, any thread may.

    Args:
      kill_seconds: how long one comparison may take before its process is killed.

    Raises:
      InputError: the package math-verify is missing.
    """

    def __init__(self, *, kill_seconds: float = KILL_SECONDS) -> None:
        require_math_verify()
        self._kill_seconds = kill_seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def compare(self, reference: str, answer: str) -> Verdict:
        """Whether the result of `answer` equals `reference`: "1/2" and "0.5", "$x^2-1$" and "$(x-1)(x+1)$", "9" and
        "9 apples". The result is what math-verify takes for it: after "final answer is", in `\\boxed`, after
        "answer", else the last formula or number.
        """
        connection = self._started()
        try:
            connection.send_bytes(json.dumps([reference, answer]).encode())
            if connection.poll(self._kill_seconds):
                return Verdict(**json.loads(connection.recv_bytes()))
            error = f"the comparison took longer than {self._kill_seconds:g} s"
        except (EOFError, OSError):
            error = "the comparison ended its process"
        self.close()
        return Verdict(False, None, error)

    def can_read(self, reference: str) -> bool:
        """Whether math-verify finds a number or formula in a reference, and finds it equal to itself."""
        return self.compare(reference, reference).right

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _started(self) -> Connection:
        if self._connection is None:
            # A fork would copy JAX's threads in whatever state they are.
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            try:
                ready = self._connection.poll(START_SECONDS) and self._connection.recv_bytes() == _READY
            except EOFError:
                ready = False
            if not ready:
                self.close()
                raise InputError(
                    "math-verify cannot be started in a process of its own (what it said stands above); install it "
                    "anew with pip install -e '.[eval]'."
                )
        return self._connection


def _work(connection: Connection) -> None:
    """What the process does: answers (reference, answer) with a Verdict until nobody asks any more."""
    import math_verify  # noqa: F401  (so that it does not count as the first comparison's time)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    connection.send_bytes(_READY)
    while True:
        try:
            reference, answer = json.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(json.dumps(dataclasses.asdict(compare_here(reference, answer))).encode())


def compare_here(reference: str, answer: str) -> Verdict:
    """`MathVerifier.compare` in this process, for one that may be killed: only its main thread can ask, and it may take
    3 * ALARM_SECONDS, or not end."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    extracted = None
    try:
        reference, answer = plain_numbers(reference), plain_numbers(answer)
        expected = parse(_as_latex(reference), parsing_timeout=ALARM_SECONDS, raise_on_error=True)
        parsed = parse(answer, parsing_timeout=ALARM_SECONDS, raise_on_error=True)
        extracted = next((part for part in reversed(parsed) if isinstance(part, str)), None)
        return Verdict(
            verify(expected, parsed, timeout_seconds=ALARM_SECONDS, raise_on_error=True), extracted
        )
    except (Exception, TimeoutException) as error:  # sympy raises whatever it stumbles over
        return Verdict(False, extracted, f"{type(error).__name__}: {error}"[:300])


def _as_latex(reference: str) -> str:
    """math-verify reads LaTeX between dollar signs or in `\\boxed` only."""
    bare = re.search(r"\\[A-Za-z]", reference) and "$" not in reference and "\\boxed" not in reference
    return f"${reference}$" if bare else reference
