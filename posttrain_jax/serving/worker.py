"""The thread that owns the engine, and how the event loop's requests reach it and the results come back.

Only this thread touches the engine. The event loop puts work and cancellations into a queue; the thread empties it
between slices of decoding of about SLICE_SECONDS, and hands results back with `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.types import PyTree
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.engine import Engine
from posttrain_jax.sampling.requests import Request, Update
from posttrain_jax.serving.prompt_scores import ROW_TOKENS, PromptScores, score_prompts

SLICE_SECONDS = 0.05
MOST_STEPS = 32
PREFILL_TOKENS = 256  # of waiting prompts between two slices of decoding


class Full(Exception):
    """There is no room for more completions now."""


class Stopped(Exception):
    """The engine has stopped."""


@dataclasses.dataclass(frozen=True)
class ScoringRequest:
    """A prompt whose own tokens are scored, with so many alternatives each."""

    tokens: np.ndarray
    alternatives: int


Event = Update | PromptScores | Exception


@dataclasses.dataclass(eq=False)
class _Job:
    """One request, and where its events go."""

    work: Request | ScoringRequest
    deliver: Callable[[Event], None]


class Results:
    """The results of one HTTP request: an asynchronous iterator of (index of the request, event).

    It ends when all requests are done. `close` cancels the rest; whoever made the object must call it.
    """

    def __init__(self, worker: Worker, work: Sequence[Request | ScoringRequest]) -> None:
        self._worker = worker
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver_as(number: int) -> Callable[[Event], None]:
            def deliver(event: Event) -> None:
                try:
                    loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
                except RuntimeError:  # the loop is closed: nobody listens
                    logging.getLogger(__name__).debug("an event came after the end")

            return deliver

        self._open = {number: _Job(item, deliver_as(number)) for number, item in enumerate(work)}
        worker.begin(list(self._open.values()))

    def __aiter__(self) -> AsyncIterator[tuple[int, Update | PromptScores]]:
        return self

    async def __anext__(self) -> tuple[int, Update | PromptScores]:
        if not self._open:
            raise StopAsyncIteration
        number, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, PromptScores) or event.finish_reason is not None:
            self._worker.end([self._open.pop(number)], cancel=False)
        return number, event

    def close(self) -> None:
        """Cancels what is not done. May be called again."""
        self._worker.end(list(self._open.values()), cancel=True)
        self._open = {}


class Worker:
    """Runs the engine in a thread of its own.

    Args:
      model, params: for scoring prompts.
      engine: nobody else may use it.
      capacity: most completions and scorings that are accepted at a time, running and waiting.
      on_failure: called in the thread if the engine raises; after that nothing is generated any more.
    """

    def __init__(
        self, model: Model, params: PyTree, engine: Engine, *, capacity: int, on_failure: Callable[[], None]
    ) -> None:
        self.capacity = capacity
        self.failed = False
        self.stopped = False
        self.running = 0
        self.waiting = 0
        self._model = model
        self._params = params
        self._engine = engine
        self._on_failure = on_failure
        self._taken = 0
        self._commands: queue.SimpleQueue[tuple[str, list[_Job]]] = queue.SimpleQueue()
        self._scorings: collections.deque[_Job] = collections.deque()
        self._jobs: dict[int, _Job] = {}
        self._steps = 1
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Called by the event loop.

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Tells the thread to end after its current slice; requests that are not done then get Stopped."""
        self.stopped = True
        self._commands.put(("stop", []))

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the end of the thread, at most so long (it may be compiling); returns whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def check_room(self, count: int) -> None:
        """Raises Full if there is no room for `count` requests now, Stopped if there never will be."""
        if self.stopped:
            raise Stopped
        if self._taken + count > self.capacity:
            raise Full

    def begin(self, jobs: list[_Job]) -> None:
        """Accepts requests."""
        self.check_room(len(jobs))
        self._taken += len(jobs)
        self._commands.put(("begin", jobs))

    def end(self, jobs: list[_Job], *, cancel: bool) -> None:
        """Gives back the room of requests that are done or, with `cancel`, dropped."""
        self._taken -= len(jobs)
        if cancel and jobs:
            self._commands.put(("cancel", jobs))

    # Called by the thread.

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._scorings:
                    self._score()
                if self._engine.busy:
                    self._decode()
                self.waiting = self._engine.waiting + len(self._scorings)
                self.running = len(self._jobs) - self._engine.waiting
        except Exception:
            logging.getLogger(__name__).exception("the engine failed; nothing is generated any more")
            self.failed = self.stopped = True
            self._on_failure()
        left = [*self._jobs.values(), *self._scorings]
        while not self._commands.empty():
            left += self._commands.get()[1]
        for job in left:
            job.deliver(Stopped())

    def _take_commands(self) -> bool:
        """Carries out the event loop's commands; waits for one if there is nothing else to do. False = stop."""
        idle = not self._engine.busy and not self._scorings
        while idle or not self._commands.empty():
            command, jobs = self._commands.get()
            idle = False
            if command == "stop":
                return False
            for job in jobs:
                if command == "cancel":
                    self._cancel(job)
                elif isinstance(job.work, ScoringRequest):
                    self._scorings.append(job)
                else:
                    try:
                        self._jobs[self._engine.submit(job.work)] = job
                    except InputError as error:
                        job.deliver(error)
        return True

    def _cancel(self, cancelled: _Job) -> None:
        if cancelled in self._scorings:
            self._scorings.remove(cancelled)
        for request_id, job in list(self._jobs.items()):
            if job is cancelled:
                self._engine.cancel(request_id)
                del self._jobs[request_id]

    def _score(self) -> None:
        """Scores the prompt that waits longest, with others that fit into its row and have the same alternatives."""
        first = self._scorings[0].work
        assert isinstance(first, ScoringRequest)
        group: list[_Job] = []
        left = max(ROW_TOKENS[-1], len(first.tokens))
        for job in self._scorings:
            work = job.work
            assert isinstance(work, ScoringRequest)
            if work.alternatives == first.alternatives and len(work.tokens) <= left:
                group.append(job)
                left -= len(work.tokens)
        prompts = [job.work.tokens for job in group]
        scores = score_prompts(self._model, self._params, prompts, alternatives=first.alternatives)
        for job, score in zip(group, scores, strict=True):
            self._scorings.remove(job)
            job.deliver(score)

    def _decode(self) -> None:
        """Prefills some of the waiting prompts, and decodes a slice: as many tokens as take about SLICE_SECONDS."""
        self._engine.prefill(PREFILL_TOKENS)
        start = time.monotonic()
        updates = self._engine.decode(self._steps)
        most = max((len(update.tokens) for update in updates), default=0)
        seconds = (time.monotonic() - start) / max(most, 1)
        self._steps = min(max(int(SLICE_SECONDS / max(seconds, 1e-6)), 1), MOST_STEPS)
        for update in updates:
            job = self._jobs[update.request_id]
            if update.finish_reason is not None:
                del self._jobs[update.request_id]
            job.deliver(update)
