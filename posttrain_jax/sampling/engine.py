"""The generation engine: a fixed number of slots, a queue of requests, and completions that come out as they end.

A finished completion gives its slot to the next request at once (continuous batching, as in Orca, OSDI 2022), so long
completions do not hold up short ones. Prompts are prefilled in chunks of a few lengths, on a CPU one prompt at a time;
samples of one prompt share one prefill, also those that start later, for as long as a slot holds the prompt.

So the number of compiled programs is small and does not depend on the prompts: three that prefill, one that draws first
tokens, and for each length of the cache (256 tokens, 512 ... up to `max_length`) one decode loop and some that only
move data. `warm_up` compiles them all; otherwise each is compiled when it is first needed.

What is drawn for a sample depends on its request's (seed, prompt, sample) alone: not on the number of slots, the slot,
the other requests or their order (but for ties in floating point that a program for other shapes may break
differently).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.memory_maps import make_room
from posttrain_jax.core.types import PyTree
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import StaticSamplingOptions
from posttrain_jax.sampling.prompts import REPLACEMENT
from posttrain_jax.sampling.requests import Decoder, Request, Update, check_prompt
from posttrain_jax.sampling.shapes import mesh_of, next_chunk
from posttrain_jax.sampling.slots import CachedPrompt, SlotOutputs, Slots

STOP_STRING_STEPS = 8  # tokens between two searches for stop strings
MIN_STEPS = 16  # tokens that the cache has room for, at least, before a decode loop starts


@dataclasses.dataclass
class _Running:
    """A request that has a slot.

    Attributes:
      request_id, request: as `submit` knows them.
      started: whether its prompt is prefilled and its first token drawn.
      emitted: how many of its tokens were handed out.
    """

    request_id: int
    request: Request
    started: bool = False
    emitted: int = 0


@dataclasses.dataclass(frozen=True)
class _PendingPrompt:
    """A prompt that is still to be prefilled, and the slots that wait for it."""

    tokens: np.ndarray
    slots: list[int]


class Engine:
    """Completes requests in `slots` slots. Not thread-safe: one thread calls it.

    Args:
      model: the language model.
      params: as `load_model` or a train state holds them, sharded or not; None = `load` brings them later. The engine
        does not copy them, but on a CPU it keeps the layers' weights a second time in the layout that decodes fastest
        (XLA's CPU backend would copy each layer's part of the stack for every token), except with an adapter in
        bfloat16.
      slots: completions decoded side by side.
      max_length: most tokens of prompt and completion together; at most the model's context. The cache starts with
        256 tokens a slot and doubles as completions grow: a step costs what the cache can hold, not what it holds.
      max_new_tokens: most tokens of a completion.
      static_options: the sampling options that requests may use; each request is checked against it.
      max_stop_tokens: most stop tokens of a request.
      tokenizer: needed for stop strings.
      mesh: where the parameters will lie; needed if `params` is None and they will lie on several devices.
    """

    def __init__(
        self,
        model: Model,
        params: PyTree | None,
        *,
        slots: int,
        max_length: int,
        max_new_tokens: int,
        static_options: StaticSamplingOptions,
        max_stop_tokens: int = 4,
        tokenizer: Decoder | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self._model = model
        self._static_options = static_options
        self._max_length = min(max_length, model.config.max_length)
        self._max_new_tokens = min(max_new_tokens, self._max_length)
        self._max_stop_tokens = max(max_stop_tokens, 1)
        self._tokenizer = tokenizer
        if params is not None:
            mesh = mesh_of(params)
        self._slots = Slots(
            model,
            slots=slots,
            max_length=self._max_length,
            max_new_tokens=self._max_new_tokens,
            static_options=static_options,
            max_stop_tokens=self._max_stop_tokens,
            mesh=mesh if mesh is not None and mesh.size > 1 else None,
        )
        rows = self._slots.rows
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._running: list[_Running | None] = [None] * rows
        self._cached: list[CachedPrompt | None] = [
            None
        ] * rows  # the prompt at the start of each slot's cache
        self._pending: collections.deque[_PendingPrompt] = collections.deque()
        self._group: list[_PendingPrompt] = []  # the prompts that are being prefilled ...
        self._start = 0  # ... and how many of their tokens were read
        self._next_id = 0
        if params is not None:
            self.load(params)

    def load(self, params: PyTree) -> None:
        """Takes these parameters (the first ones, or others of the same shapes after a training step). Compiles nothing
        again; prompts that were prefilled with other parameters are prefilled again."""
        self._forget_prompts()
        self._start = 0
        self._slots.load(params)

    def unload(self) -> None:
        """Frees the memory of parameters and cache until the next `load`; no request may be open."""
        assert not self.busy
        self._forget_prompts()
        self._slots.unload()

    def warm_up(self) -> int:
        """Compiles every program that requests may need, while there are none; returns how many there are."""
        assert not self.busy
        self._forget_prompts()
        with self._slots.on_mesh():
            self._slots.warm_up()
        return self.compiled_programs

    def _forget_prompts(self) -> None:
        self._cached = [None] * self._slots.rows

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._waiting) or any(self._running)

    @property
    def waiting(self) -> int:
        """How many requests have no slot yet."""
        return len(self._waiting)

    @property
    def compiled_programs(self) -> int:
        """How many programs this engine has needed so far, the small ones that only move data included."""
        return len(self._slots.shapes)

    def submit(self, request: Request, name: str = "the prompt") -> int:
        """Adds a request to the queue; returns its id.

        Raises:
          InputError: the prompt is empty, too long or not in the vocabulary, or the request uses options that this
            engine was not made for.
        """
        self._check(request, name)
        request_id = self._next_id
        self._next_id += 1
        self._waiting.append((request_id, request))
        return request_id

    def _check(self, request: Request, name: str) -> None:
        check_prompt(self._model, request.tokens, name, request.max_new_tokens)
        if len(request.tokens) >= self._max_length:
            raise InputError(
                f"{name} has {len(request.tokens)} tokens, which leaves no room for a completion in the "
                f"{self._max_length} tokens of a slot; shorten it."
            )
        if not 0 < request.max_new_tokens <= self._max_new_tokens:
            raise InputError(
                f"max_new_tokens is {request.max_new_tokens}; it must lie between 1 and {self._max_new_tokens}."
            )
        if len(request.stop_token_ids) > self._max_stop_tokens:
            raise InputError(
                f"there are {len(request.stop_token_ids)} stop tokens; at most {self._max_stop_tokens} are possible."
            )
        if request.stop_strings and self._tokenizer is None:
            raise InputError("stop strings need the model's tokenizer, and there is none.")
        options = StaticSamplingOptions.of(request.sampling, min_tokens=request.min_new_tokens)
        if self._static_options.union(options) != self._static_options:
            raise InputError(f"{name} uses sampling options that this engine was not made for: {options}.")
        try:
            self._slots.request_batch([request])
        except OverflowError as error:
            raise InputError(
                f"{name} comes with a number that is too large for the engine: {error}."
            ) from error

    def cancel(self, request_id: int) -> None:
        """Drops a request; no further updates come for it."""
        self._waiting = collections.deque(item for item in self._waiting if item[0] != request_id)
        ended_B = np.zeros(len(self._running), bool)
        for row, running in enumerate(self._running):
            if running is not None and running.request_id == request_id:
                ended_B[row] = running.started
                self._running[row] = None
                for prompt in [*self._group, *self._pending]:
                    if row in prompt.slots:
                        prompt.slots.remove(row)
        self._pending = collections.deque(prompt for prompt in self._pending if prompt.slots)
        if ended_B.any():
            with self._slots.on_mesh():
                self._slots.release(ended_B)

    def step(self, steps: int = 1 << 20) -> list[Update]:
        """Gives free slots to waiting requests, then decodes at most `steps` tokens a slot (fewer when a completion
        ends and another request waits for its slot). Returns the new tokens of each request that has a slot.
        """
        self.prefill()
        return self.decode(steps)

    def prefill(self, tokens: int | None = None) -> None:
        """The first half of `step`: gives free slots to waiting requests and reads their prompts. With `tokens` it
        reads only about so many now and the rest in later calls, so that other completions go on in between."""
        make_room()
        with self._slots.on_mesh():
            self._admit()
            left = 1 << 62 if tokens is None else tokens
            while left > 0 and (self._pending or self._group):
                left -= self._prefill_chunk()
            self._draw_first_tokens()

    def decode(self, steps: int) -> list[Update]:
        """The second half of `step`: decodes for the requests whose prompts are prefilled."""
        running = self._started()
        if not running:
            return []
        if any(one.request.stop_strings for one in running):
            steps = min(steps, STOP_STRING_STEPS)
        slots = self._slots
        with slots.on_mesh():
            longest = max(len(one.request.tokens) + one.emitted for one in running)
            slots.grow(slots.cache_length_for(longest + min(steps, MIN_STEPS)))
            if slots.cache_length < self._max_length:
                steps = min(steps, slots.cache_length - longest)
            slots.decode(steps, until_finished=bool(self._waiting))
            return self._collect(slots.outputs())

    def _started(self) -> list[_Running]:
        return [running for running in self._running if running is not None and running.started]

    def _admit(self) -> None:
        """Gives free slots to the requests that waited longest, and queues the prompts that no slot holds."""
        free = [row for row, running in enumerate(self._running) if running is None]
        admitted = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        if not admitted:
            return
        all_rows = range(len(self._cached))
        length = self._slots.cache_length_for(max(len(request.tokens) for _, request in admitted) + MIN_STEPS)
        shared = any(self._row_with_prompt(request, all_rows) is not None for _, request in admitted)
        if length < self._slots.cache_length and not self._started() and not shared:
            self._slots.clear(length)  # nothing in the cache is needed any more, and a shorter one is faster
            self._forget_prompts()
        self._slots.grow(length)
        # A request whose prompt lies in a free slot goes there, so that no other prompt is written over it.
        others = []
        for request_id, request in admitted:
            row = self._row_with_prompt(request, free)
            if row is None:
                others.append((request_id, request))
            else:
                free.remove(row)
                self._running[row] = _Running(request_id, request)
        for (request_id, request), row in zip(others, free, strict=False):
            source = self._row_with_prompt(request, all_rows)
            self._running[row] = _Running(request_id, request)
            if source is None:
                self._cached[row] = None
                self._queue_prompt(request.tokens, row)
            else:
                self._slots.copy(source, row)
                self._cached[row] = self._cached[source]

    def _row_with_prompt(self, request: Request, rows: Iterable[int]) -> int | None:
        """Which of the slots holds the request's prompt."""
        for row in rows:
            cached = self._cached[row]
            if cached is not None and np.array_equal(cached.tokens, request.tokens):
                return row
        return None

    def _queue_prompt(self, tokens: np.ndarray, row: int) -> None:
        for prompt in [*self._group, *self._pending]:
            if np.array_equal(prompt.tokens, tokens):
                prompt.slots.append(row)
                return
        self._pending.append(_PendingPrompt(tokens, [row]))

    def _prefill_chunk(self) -> int:
        """Prefills one chunk of the current group of prompts, and puts the prompts into their slots after the last
        chunk; returns the number of tokens."""
        if not self._group:
            count = min(self._slots.prefill_rows, len(self._pending))
            self._group, self._start = [self._pending.popleft() for _ in range(count)], 0
        longest = max(len(prompt.tokens) for prompt in self._group)
        chunk = next_chunk(longest - self._start)
        tokens_PT = np.zeros((self._slots.prefill_rows, chunk), np.int32)
        lengths_P = np.ones(self._slots.prefill_rows, np.int32)
        for row, prompt in enumerate(self._group):
            part = prompt.tokens[self._start : self._start + chunk]
            tokens_PT[row, : len(part)] = part
            lengths_P[row] = len(prompt.tokens)
        self._slots.prefill(tokens_PT, self._start, lengths_P)
        self._start += chunk
        if self._start >= longest:
            self._fill_slots()
        return chunk

    def _fill_slots(self) -> None:
        """Puts the prefilled prompts into the slots that wait for them."""
        hidden_PD = self._slots.hidden_PD()
        slot_P = np.full(self._slots.prefill_rows, self._slots.rows, np.int32)
        for number, prompt in enumerate(self._group):
            if prompt.slots:
                slot_P[number] = prompt.slots[0]
        self._slots.fill(slot_P)
        for number, prompt in enumerate(self._group):
            for slot in prompt.slots:
                if slot != slot_P[number]:
                    self._slots.copy(int(slot_P[number]), slot)
                self._cached[slot] = CachedPrompt(prompt.tokens, hidden_PD[number])
        self._group = []

    def _draw_first_tokens(self) -> None:
        """Draws the first token of every completion whose prompt is in its slot by now."""
        rows, prompts, requests = [], [], []
        for row, (running, cached) in enumerate(zip(self._running, self._cached, strict=True)):
            if running is not None and cached is not None and not running.started:
                running.started = True
                rows.append(row)
                prompts.append(cached)
                requests.append(running.request)
        if rows:
            self._slots.begin(prompts, rows, requests)

    def _collect(self, outputs: SlotOutputs) -> list[Update]:
        """The new tokens of every slot; a slot whose completion ended becomes free."""
        updates, stopped_B = [], np.zeros(len(self._running), bool)  # by a stop string
        for row, running in enumerate(self._running):
            if running is None or not running.started:
                continue
            count, reason, stop_string, stop_at = int(outputs.count_B[row]), None, None, None
            if not outputs.live_B[row]:
                reason = "stop" if outputs.stopped_B[row] else "length"
            if running.request.stop_strings:
                stop = self._find_stop(outputs.tokens_BN[row, :count], running)
                if stop is not None:
                    count, stop_at, stop_string = stop
                    reason, stopped_B[row] = "stop", True
            new = slice(running.emitted, count)
            updates.append(
                Update(
                    running.request_id,
                    outputs.tokens_BN[row, new].copy(),
                    outputs.logps_BN[row, new].copy(),
                    outputs.sample_logps_BN[row, new].copy(),
                    self._alternatives(outputs, row, new),
                    reason,
                    stop_string,
                    stop_at,
                )
            )
            running.emitted = count
            if reason is not None:
                self._running[row] = None
        if (stopped_B & outputs.live_B).any():
            self._slots.release(stopped_B)
        return updates

    def _alternatives(self, outputs: SlotOutputs, row: int, new: slice) -> list[list[tuple[int, float]]]:
        if not self._static_options.alternatives:
            return []
        ids_nK, logps_nK = outputs.alternatives_BNK[row, new], outputs.alternative_logps_BNK[row, new]
        return [
            list(zip(ids.tolist(), logps.tolist(), strict=True))
            for ids, logps in zip(ids_nK, logps_nK, strict=True)
        ]

    def _find_stop(self, tokens: np.ndarray, running: _Running) -> tuple[int, int, str] | None:
        """The number of tokens at which a stop string is first complete, where it begins in the text, and the string;
        None where there is none."""
        tokenizer, stops = self._tokenizer, running.request.stop_strings
        least = running.request.min_new_tokens
        assert tokenizer is not None  # submit checked it

        def decoded(count: int) -> str:
            return tokenizer.decode(tokens[:count].tolist(), skip_special_tokens=True)

        start = len(decoded(least).rstrip(REPLACEMENT)) if least else 0

        def first_stop(count: int) -> tuple[int, str] | None:
            text = decoded(count)
            matches = [(text.find(stop, start), stop) for stop in stops if stop in text[start:]]
            return min(matches) if matches else None

        if len(tokens) < least or first_stop(len(tokens)) is None:
            return None
        for count in range(max(running.emitted, least, 1), len(tokens) + 1):
            stop = first_stop(count)
            if stop is not None:
                return count, *stop
        return None
