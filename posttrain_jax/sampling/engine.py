"""The generation engine: a fixed number of slots, prompts that wait, and answers that come out as they end.

A finished answer gives its slot to the next prompt at once (continuous batching, as in Orca, OSDI 2022), so long
answers do not hold up short ones. Prompts are read in chunks of a few lengths, on a CPU one prompt at a time; samples
of one prompt share one reading, also those that start later, for as long as a slot holds the prompt.

So the number of compiled programs is small and does not depend on the prompts: three that read, one that draws first
tokens, and for each size of the cache (256 places, 512 ... up to `places`) one decode loop and some that only move
data. `warm_up` compiles them all; otherwise each is compiled when it is first needed.

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
from posttrain_jax.sampling.choose import Needs
from posttrain_jax.sampling.prompts import REPLACEMENT
from posttrain_jax.sampling.requests import Decoder, Request, Update, check_prompt
from posttrain_jax.sampling.shapes import mesh_of, next_chunk
from posttrain_jax.sampling.slots import Held, Slots, Written

STOP_STRING_STEPS = 8
FEWEST_STEPS = 16


@dataclasses.dataclass
class _Running:
    """A request that has a slot.

    Attributes:
      ticket, request: as `submit` knows them.
      begun: whether its prompt was read and its first token drawn.
      seen: how many of its tokens were handed out.
    """

    ticket: int
    request: Request
    begun: bool = False
    seen: int = 0


@dataclasses.dataclass(frozen=True)
class _Unread:
    """A prompt that is to be read, and the slots that wait for it."""

    tokens: np.ndarray
    slots: list[int]


class Engine:
    """Answers requests in `slots` slots. Not thread-safe: one thread calls it.

    Args:
      model: what answers.
      params: as `load_model` or a train state holds them, sharded or not; None = `load` will bring them. The engine
        does not copy them, but on a CPU it keeps the layers' weights a second time, as decoding reads them fastest
        (XLA's CPU backend would copy each layer's part of the stack for every token), but not with an adapter in
        bfloat16.
      slots: answers written side by side.
      places: prompt and answer together have to fit in so many tokens; at most the model's context. The cache starts
        with 256 places and doubles as answers grow, for a step costs what the cache has, not what is in it.
      new_tokens: most tokens of an answer.
      needs: what the requests may ask for; each of them is checked against it.
      stop_width: most stop tokens of a request.
      tokenizer: needed for stop strings.
      mesh: where the parameters lie; needed where there are none yet and they will lie on several devices.
    """

    def __init__(
        self,
        model: Model,
        params: PyTree | None,
        *,
        slots: int,
        places: int,
        new_tokens: int,
        needs: Needs,
        stop_width: int = 4,
        tokenizer: Decoder | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self._model = model
        self._needs = needs
        self._places = min(places, model.config.max_length)
        self._new_tokens = min(new_tokens, self._places)
        self._stop_width = max(stop_width, 1)
        self._tokenizer = tokenizer
        if params is not None:
            mesh = mesh_of(params)
        self._slots = Slots(
            model,
            slots=slots,
            places=self._places,
            new_tokens=self._new_tokens,
            needs=needs,
            stop_width=self._stop_width,
            mesh=mesh if mesh is not None and mesh.size > 1 else None,
        )
        rows = self._slots.rows
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._running: list[_Running | None] = [None] * rows
        self._held: list[Held | None] = [None] * rows
        self._unread: collections.deque[_Unread] = collections.deque()
        self._group: list[_Unread] = []  # what is being read, from the place `_start` on
        self._start = 0
        self._tickets = 0
        if params is not None:
            self.load(params)

    def load(self, params: PyTree) -> None:
        """Goes on with these parameters (the first ones, or others of the same shapes after a training step): nothing
        is compiled again. Prompts that were read with others are read anew."""
        self._forget()
        self._start = 0
        self._slots.load(params)

    def unload(self) -> None:
        """Gives the memory of parameters and cache back, until the next `load`; no request may be open."""
        assert not self.busy
        self._forget()
        self._slots.unload()

    def warm_up(self) -> int:
        """Compiles every program that requests may need, while there are none; how many they are."""
        assert not self.busy
        self._forget()
        with self._slots.on_mesh():
            self._slots.warm_up()
        return self.compiled_programs

    def _forget(self) -> None:
        self._held = [None] * self._slots.rows

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
        """Adds a request to those that wait; its ticket.

        Raises:
          InputError: the prompt is empty, too long or not in the vocabulary, or the request asks for what this
            engine was not made for.
        """
        self._check(request, name)
        ticket = self._tickets
        self._tickets += 1
        self._waiting.append((ticket, request))
        return ticket

    def _check(self, request: Request, name: str) -> None:
        check_prompt(self._model, request.tokens, name, request.max_new_tokens)
        if len(request.tokens) >= self._places:
            raise InputError(
                f"{name} has {len(request.tokens)} tokens, which leaves no room for an answer in the {self._places} "
                "places of a slot; shorten it."
            )
        if not 0 < request.max_new_tokens <= self._new_tokens:
            raise InputError(
                f"max_new_tokens is {request.max_new_tokens}; it must lie between 1 and {self._new_tokens}."
            )
        if len(request.stop_token_ids) > self._stop_width:
            raise InputError(
                f"there are {len(request.stop_token_ids)} stop tokens; at most {self._stop_width} are possible."
            )
        if request.stop_strings and self._tokenizer is None:
            raise InputError("stop strings need the model's tokenizer, and there is none.")
        needs = Needs.of(request.sampling, min_tokens=request.min_new_tokens)
        if self._needs.union(needs) != self._needs:
            raise InputError(f"{name} asks for sampling options that this engine was not made for: {needs}.")
        try:
            self._slots.orders([request])
        except OverflowError as error:
            raise InputError(
                f"{name} comes with a number that is too large for the engine: {error}."
            ) from error

    def cancel(self, ticket: int) -> None:
        """Forgets a request; nothing more is said of it."""
        self._waiting = collections.deque(item for item in self._waiting if item[0] != ticket)
        ended_B = np.zeros(len(self._running), bool)
        for row, running in enumerate(self._running):
            if running is not None and running.ticket == ticket:
                ended_B[row] = running.begun
                self._running[row] = None
                for unread in [*self._group, *self._unread]:
                    if row in unread.slots:
                        unread.slots.remove(row)
        self._unread = collections.deque(unread for unread in self._unread if unread.slots)
        if ended_B.any():
            with self._slots.on_mesh():
                self._slots.release(ended_B)

    def step(self, steps: int = 1 << 20) -> list[Update]:
        """Gives free slots to waiting requests, then decodes at most `steps` tokens a slot (fewer when an answer ends
        and another request waits for its slot). Returns what is new, for each request that has a slot.
        """
        self.read()
        return self.write(steps)

    def read(self, tokens: int | None = None) -> None:
        """The first half of `step`: gives free slots to waiting requests and reads their prompts; with `tokens` only
        about so many of them now and the rest in later calls, so that other answers go on in between."""
        make_room()
        with self._slots.on_mesh():
            self._admit()
            left = 1 << 62 if tokens is None else tokens
            while left > 0 and (self._unread or self._group):
                left -= self._read_chunk()
            self._begin()

    def write(self, steps: int) -> list[Update]:
        """The second half of `step`: decodes for the requests whose prompts were read."""
        running = self._begun()
        if not running:
            return []
        if any(one.request.stop_strings for one in running):
            steps = min(steps, STOP_STRING_STEPS)
        slots = self._slots
        with slots.on_mesh():
            taken = max(len(one.request.tokens) + one.seen for one in running)
            slots.grow(slots.size_for(taken + min(steps, FEWEST_STEPS)))
            if slots.cached < self._places:
                steps = min(steps, slots.cached - taken)
            slots.decode(steps, until_finished=bool(self._waiting))
            return self._collect(slots.written())

    def _begun(self) -> list[_Running]:
        return [running for running in self._running if running is not None and running.begun]

    def _admit(self) -> None:
        """Gives free slots to the requests that waited longest, and notes which prompts are to be read."""
        free = [row for row, running in enumerate(self._running) if running is None]
        taken = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        if not taken:
            return
        everywhere = range(len(self._held))
        size = self._slots.size_for(max(len(request.tokens) for _, request in taken) + FEWEST_STEPS)
        shared = any(self._holder(request, everywhere) is not None for _, request in taken)
        if size < self._slots.cached and not self._begun() and not shared:
            self._slots.clear(size)  # nothing in it is needed any more, and a step costs less
            self._forget()
        self._slots.grow(size)
        # A request whose prompt lies in a free slot goes there, so that no other prompt is written over it.
        others = []
        for ticket, request in taken:
            row = self._holder(request, free)
            if row is None:
                others.append((ticket, request))
            else:
                free.remove(row)
                self._running[row] = _Running(ticket, request)
        for (ticket, request), row in zip(others, free, strict=False):
            source = self._holder(request, everywhere)
            self._running[row] = _Running(ticket, request)
            if source is None:
                self._held[row] = None
                self._will_read(request.tokens, row)
            else:
                self._slots.copy(source, row)
                self._held[row] = self._held[source]

    def _holder(self, request: Request, rows: Iterable[int]) -> int | None:
        """Which of the slots holds the request's prompt."""
        for row in rows:
            held = self._held[row]
            if held is not None and np.array_equal(held.tokens, request.tokens):
                return row
        return None

    def _will_read(self, tokens: np.ndarray, row: int) -> None:
        for unread in [*self._group, *self._unread]:
            if np.array_equal(unread.tokens, tokens):
                unread.slots.append(row)
                return
        self._unread.append(_Unread(tokens, [row]))

    def _read_chunk(self) -> int:
        """Reads a chunk of the prompts whose turn it is, and puts them into their slots when they are whole; how many
        tokens it read."""
        if not self._group:
            count = min(self._slots.read_rows, len(self._unread))
            self._group, self._start = [self._unread.popleft() for _ in range(count)], 0
        longest = max(len(unread.tokens) for unread in self._group)
        chunk = next_chunk(longest - self._start)
        tokens_PT = np.zeros((self._slots.read_rows, chunk), np.int32)
        lengths_P = np.ones(self._slots.read_rows, np.int32)
        for row, unread in enumerate(self._group):
            part = unread.tokens[self._start : self._start + chunk]
            tokens_PT[row, : len(part)] = part
            lengths_P[row] = len(unread.tokens)
        self._slots.read(tokens_PT, self._start, lengths_P)
        self._start += chunk
        if self._start >= longest:
            self._place_group()
        return chunk

    def _place_group(self) -> None:
        """Puts the prompts that were read into the slots that wait for them."""
        hidden_PD = self._slots.hidden_PD()
        slot_P = np.full(self._slots.read_rows, self._slots.rows, np.int32)
        for number, unread in enumerate(self._group):
            if unread.slots:
                slot_P[number] = unread.slots[0]
        self._slots.fill(slot_P)
        for number, unread in enumerate(self._group):
            for slot in unread.slots:
                if slot != slot_P[number]:
                    self._slots.copy(int(slot_P[number]), slot)
                self._held[slot] = Held(unread.tokens, hidden_PD[number])
        self._group = []

    def _begin(self) -> None:
        """Draws the first token of every answer whose prompt is in its slot by now."""
        ready, held_of, requests = [], [], []
        for row, (running, held) in enumerate(zip(self._running, self._held, strict=True)):
            if running is not None and held is not None and not running.begun:
                running.begun = True
                ready.append(row)
                held_of.append(held)
                requests.append(running.request)
        if ready:
            self._slots.begin(held_of, ready, requests)

    def _collect(self, written: Written) -> list[Update]:
        updates, cut_B = [], np.zeros(len(self._running), bool)
        for row, running in enumerate(self._running):
            if running is None or not running.begun:
                continue
            count, reason, stop_string, stop_at = int(written.count_B[row]), None, None, None
            if not written.live_B[row]:
                reason = "stop" if written.stopped_B[row] else "length"
            if running.request.stop_strings:
                found = self._find_stop(written.tokens_BN[row, :count], running)
                if found is not None:
                    count, stop_at, stop_string = found
                    reason, cut_B[row] = "stop", True
            new = slice(running.seen, count)
            alternatives: list[list[tuple[int, float]]] = []
            if self._needs.alternatives:
                alternatives = [
                    list(zip(ids.tolist(), values.tolist(), strict=True))
                    for ids, values in zip(
                        written.alternatives_BNK[row, new],
                        written.alternative_logps_BNK[row, new],
                        strict=True,
                    )
                ]
            updates.append(
                Update(
                    running.ticket,
                    written.tokens_BN[row, new].copy(),
                    written.logps_BN[row, new].copy(),
                    written.sample_logps_BN[row, new].copy(),
                    alternatives,
                    reason,
                    stop_string,
                    stop_at,
                )
            )
            running.seen = count
            if reason is not None:
                self._running[row] = None
        if (cut_B & written.live_B).any():
            self._slots.release(cut_B)
        return updates

    def _find_stop(self, tokens: np.ndarray, running: _Running) -> tuple[int, int, str] | None:
        """The number of tokens at which a stop string is first complete, where that begins in the text, and it."""
        tokenizer, stops = self._tokenizer, running.request.stop_strings
        least = running.request.min_new_tokens
        assert tokenizer is not None  # submit checked it

        def decoded(count: int) -> str:
            return tokenizer.decode(tokens[:count].tolist(), skip_special_tokens=True)

        start = len(decoded(least).rstrip(REPLACEMENT)) if least else 0

        def found(count: int) -> tuple[int, str] | None:
            text = decoded(count)
            places = [(text.find(stop, start), stop) for stop in stops if stop in text[start:]]
            return min(places) if places else None

        if len(tokens) < least or found(len(tokens)) is None:
            return None
        for count in range(max(running.seen, least, 1), len(tokens) + 1):
            first = found(count)
            if first is not None:
                return count, *first
        return None
