"""The generation engine: a fixed number of slots, prompts that wait, and answers that come out as they end.

A finished answer gives its slot to the next prompt at once (continuous batching, as in Orca, OSDI 2022), so long
answers do not hold up short ones. Prompts are padded to a few lengths (`bucket`) and read 1, 4, 16 ... at a time;
samples of one prompt share one reading, also those that start later, for as long as a slot holds the prompt. So the
number of compiled programs is small: one decode loop, for every bucket of prompt lengths one reader for each power of 4
up to GROUP_TOKENS tokens (times the powers of 2 of samples, where prompts have several), and one that shares for each
power of 2 of slots; `compiled_programs` counts those that were needed.

What is drawn for a sample depends on its request's (seed, prompt, sample) alone: not on the number of slots, the slot,
the other requests or their order (but for ties in floating point that a program for other shapes may break
differently).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from posttrain_jax.errors import InputError
from posttrain_jax.models import transformer
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import GREEDY, Needs, Sampling, SamplingRows
from posttrain_jax.sampling.decode import Orders, admit, decode, empty_slots, release, resize, share
from posttrain_jax.sampling.prompts import REPLACEMENT
from posttrain_jax.sharding import shard_multiple
from posttrain_jax.types import PyTree

SMALLEST_BUCKET = 16
GROUP_TOKENS = 2048
STOP_STRING_STEPS = 8
FIRST_PLACES = 256
FEWEST_STEPS = 16


class Decoder(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str: ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
      tokens: the prompt's ids, 1-D, not empty.
      max_new_tokens: most tokens of the answer, the stop token included.
      min_new_tokens: no stop token before so many.
      stop_token_ids: an answer ends with one of these.
      stop_strings: an answer ends with the token that completes one of these in its text, where the text of the
        first `min_new_tokens` does not count.
      sampling: how tokens are drawn.
      seed, prompt, sample: what the random numbers depend on.
    """

    tokens: np.ndarray
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    seed: int = 0
    prompt: int = 0
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class Update:
    """What became of a request since the last `step`.

    Attributes:
      ticket: what `submit` returned.
      tokens, logprobs, sample_logprobs: the new tokens; see `Sample`.
      alternatives: for each new token the likeliest ones as (id, log-probability) pairs, the likeliest first.
      finish_reason: None while there is more to come, else "stop" or "length".
      stop_string: the stop string that ended it, if one did, and
      stop_at: where that begins in the answer's text, in characters.
    """

    ticket: int
    tokens: np.ndarray
    logprobs: np.ndarray
    sample_logprobs: np.ndarray
    alternatives: list[list[tuple[int, float]]]
    finish_reason: str | None
    stop_string: str | None = None
    stop_at: int | None = None


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128 ...: at most a half more than asked for."""
    power = max(smallest, 1 << max(size - 1, 0).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > smallest else power


def check_prompt(model: Model, prompt: np.ndarray, name: str, max_new_tokens: int) -> None:
    """Raises InputError, with the prompt's name, for a prompt that the model cannot answer."""
    config = model.config
    if prompt.ndim != 1 or prompt.size == 0:
        raise InputError(f"{name} has no tokens; a model needs at least one token to go on from.")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise InputError(f"{name} holds {prompt.dtype} values; token ids are whole numbers.")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        wrong = int(prompt[(prompt < 0) | (prompt >= config.vocab_size)][0])
        raise InputError(f"{name} holds the token id {wrong}; the model knows 0 to {config.vocab_size - 1}.")
    if prompt.size > config.max_length - (max_new_tokens > 0):
        raise InputError(
            f"{name} has {prompt.size} tokens, which leaves no room for an answer in the model's context of "
            f"{config.max_length}; shorten it."
        )


@dataclasses.dataclass
class _Running:
    """A request that has a slot, and how many of its tokens were handed out."""

    ticket: int
    request: Request
    seen: int = 0


class Engine:
    """Answers requests in `slots` slots. Not thread-safe: one thread calls it.

    Args:
      model, params: as `load_model` or a train state holds them, sharded or not. The engine does not copy them, but on
        a CPU it keeps the layers' weights a second time, as decoding reads them fastest (XLA's CPU backend would copy
        each layer's part of the stack for every token), but not with an adapter in bfloat16.
      slots: answers written side by side.
      places: prompt and answer together have to fit in so many tokens; at most the model's context. The cache starts
        with FIRST_PLACES and doubles as answers grow, for a step costs what the cache has, not what is in it.
      new_tokens: most tokens of an answer.
      needs: what the requests may ask for; each of them is checked against it.
      stop_width: most stop tokens of a request.
      tokenizer: needed for stop strings.
    """

    def __init__(
        self,
        model: Model,
        params: PyTree,
        *,
        slots: int,
        places: int,
        new_tokens: int,
        needs: Needs,
        stop_width: int = 4,
        tokenizer: Decoder | None = None,
    ) -> None:
        self._model = model
        self._needs = needs
        self._places = min(places, model.config.max_length)
        self._cached = min(FIRST_PLACES, self._places)
        self._new_tokens = new_tokens
        self._stop_width = max(stop_width, 1)
        self._tokenizer = tokenizer
        self._mesh = mesh_of(params)
        self._rows = shard_multiple(slots, self._mesh)
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._running: list[_Running | None] = [None] * self._rows
        self._held: list[np.ndarray | None] = []  # the prompt that each slot's cache begins with
        self._tickets = 0
        self._shapes: set[tuple[int, ...]] = set()  # of the programs that were needed
        self.set_params(params)
        with self._on_mesh():
            self._slots = empty_slots(
                model=model,
                rows=self._rows,
                places=self._cached,
                new_tokens=min(new_tokens, self._places),
                needs=needs,
                stop_width=self._stop_width,
            )

    def set_params(self, params: PyTree) -> None:
        """Goes on with other parameters of the same shapes (after a training step)."""
        self._params = params
        self._held = [None] * self._rows
        with self._on_mesh():
            self._decode_params = decode_params(self._model, params)

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
        """How many programs this engine's requests have needed so far: a decode loop for every size of the cache, and
        one for every shape in which prompts were read or shared."""
        return len(self._shapes)

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
            self._orders([request], 1)
        except OverflowError as error:
            raise InputError(
                f"{name} comes with a number that is too large for the engine: {error}."
            ) from error

    def cancel(self, ticket: int) -> None:
        """Forgets a request; nothing more is said of it."""
        self._waiting = collections.deque(item for item in self._waiting if item[0] != ticket)
        ended_B = np.zeros(self._rows, bool)
        for row, running in enumerate(self._running):
            if running is not None and running.ticket == ticket:
                ended_B[row] = True
                self._running[row] = None
        if ended_B.any():
            with self._on_mesh():
                self._slots = release(self._slots, ended_B)

    def step(self, steps: int = 1 << 20) -> list[Update]:
        """Gives free slots to waiting requests, then decodes at most `steps` tokens a slot (fewer when an answer ends
        and another request waits for its slot). Returns what is new, for each request that has a slot.
        """
        with self._on_mesh():
            self._admit()
            if not any(self._running):
                return []
            if any(running is not None and running.request.stop_strings for running in self._running):
                steps = min(steps, STOP_STRING_STEPS)
            taken = max(len(running.request.tokens) + running.seen for running in self._running if running)
            self._fit(taken + min(steps, FEWEST_STEPS))
            if self._cached < self._places:
                steps = min(steps, self._cached - taken)
            self._shapes.add((self._cached,))
            self._slots = decode(
                self._decode_params,
                self._slots,
                np.int32(steps),
                np.bool_(bool(self._waiting)),
                model=self._model,
                needs=self._needs,
            )
            return self._collect()

    def _fit(self, tokens: int) -> None:
        """Makes room for so many tokens a slot; gives room back when no slot is taken."""
        size = FIRST_PLACES if not any(self._running) else self._cached
        while size < tokens:
            size *= 2
        size = min(size, self._places)
        if size != self._cached:
            fits = [prompt is not None and len(prompt) < size for prompt in self._held]
            self._held = [prompt if fit else None for prompt, fit in zip(self._held, fits, strict=True)]
            self._slots = resize(self._slots, model=self._model, places=size)
            self._cached = size

    def _admit(self) -> None:
        """Fills the free slots in the order of the requests: those whose prompt a slot holds by one program run, the
        others by one for each group of like length."""
        free = [row for row, running in enumerate(self._running) if running is None]
        taken = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        if not taken:
            return
        self._fit(max(len(request.tokens) for _, request in taken) + FEWEST_STEPS)
        held = {_key(prompt): row for row, prompt in enumerate(self._held) if prompt is not None}
        shared: list[tuple[int, int]] = []  # slots: from, to
        groups: dict[int, dict[bytes, list[int]]] = {}  # by length and prompt: the slots it goes to
        for row, (ticket, request) in zip(free, taken, strict=False):
            self._running[row] = _Running(ticket, request)
            self._held[row] = request.tokens
            prompt = _key(request.tokens)
            if prompt in held:
                shared.append((held[prompt], row))
            else:
                groups.setdefault(bucket(len(request.tokens)), {}).setdefault(prompt, []).append(row)
        if shared:  # first, as the others may be written over what is shared
            self._share(*(list(side) for side in zip(*shared, strict=True)))
        for length, prompts in sorted(groups.items()):
            alike = list(prompts.values())
            while alike:
                size = _group_size(len(alike), length)
                self._read(alike[:size], length)
                alike = alike[size:]

    def _share(self, sources: list[int], slots: list[int]) -> None:
        """Puts prompts that slots hold into other slots too."""
        requests, slot_R = self._taken(slots)
        rows = len(slot_R)
        source_R, length_R = np.zeros(rows, np.int32), np.ones(rows, np.int32)
        source_R[: len(sources)] = sources
        length_R[: len(sources)] = [len(request.tokens) for request in requests]
        self._shapes.add((rows, self._cached))
        self._slots = share(
            self._params,
            self._slots,
            source_R,
            length_R,
            slot_R,
            self._orders(requests, rows),
            model=self._model,
            needs=self._needs,
        )

    def _read(self, group: list[list[int]], length: int) -> None:
        """Reads each of the group's prompts once and puts it into all its slots.

        As many rows are read as the mesh divides; those beyond the prompts are empty.
        """
        prompts = shard_multiple(len(group), self._mesh)
        tokens_PT = np.zeros((prompts, length), np.int32)
        lengths_P = np.ones(prompts, np.int32)
        for source, alike in enumerate(group):
            tokens = self._held[alike[0]]
            assert tokens is not None  # `_admit` put it there
            tokens_PT[source, : len(tokens)] = tokens
            lengths_P[source] = len(tokens)
        requests, slot_R = self._taken([row for alike in group for row in alike])
        rows = len(slot_R)
        source_R = np.zeros(rows, np.int32)
        source_R[: len(requests)] = [source for source, alike in enumerate(group) for _ in alike]
        self._shapes.add((prompts, length, rows, self._cached))
        self._slots = admit(
            self._params,
            self._slots,
            tokens_PT,
            lengths_P,
            source_R,
            slot_R,
            self._orders(requests, rows),
            model=self._model,
            needs=self._needs,
        )

    def _taken(self, slots: list[int]) -> tuple[list[Request], np.ndarray]:
        """The requests that were given these slots, and the slots, filled up to a power of 2 with one out of range."""
        slot_R = np.full(1 << (len(slots) - 1).bit_length(), self._rows, np.int32)
        slot_R[: len(slots)] = slots
        running = [self._running[slot] for slot in slots]
        return [one.request for one in running if one is not None], slot_R

    def _orders(self, requests: list[Request], rows: int) -> Orders:
        requests = requests + [requests[0]] * (rows - len(requests))  # the rest goes nowhere
        stop_RW: Any = np.full((rows, self._stop_width), -1, np.int32)
        for row, request in enumerate(requests):
            stop_RW[row, : len(request.stop_token_ids)] = request.stop_token_ids

        def host_array(values: Any, dtype: type) -> Any:
            return np.asarray(values, dtype)

        width = self._needs.words_width
        end_RW: Any = np.full((rows, width), -1, np.int32)
        for row, request in enumerate(requests):
            end = request.tokens[-width:] if width else request.tokens[:0]
            end_RW[row, width - len(end) :] = end
        ids = [(request.seed % 2**32, request.prompt, request.sample) for request in requests]
        room = [self._places - len(request.tokens) for request in requests]
        limits = [min(request.max_new_tokens, left) for request, left in zip(requests, room, strict=True)]
        return Orders(
            ids_B3=host_array(ids, np.uint32),
            limit_B=host_array(limits, np.int32),
            min_tokens_B=host_array([request.min_new_tokens for request in requests], np.int32),
            stop_BW=stop_RW,
            prompt_end_BW=end_RW,
            sampling=SamplingRows.of([request.sampling for request in requests]),
        )

    def _collect(self) -> list[Update]:
        slots = self._slots
        parts = (
            slots.count_B,
            slots.live_B,
            slots.stopped_B,
            slots.tokens_BN,
            slots.logps_BN,
            slots.sample_logps_BN,
        )
        counts, live, stopped, tokens, logps, sample_logps = (_fetch(part) for part in parts)
        best = _fetch(slots.alternatives_BNK) if self._needs.alternatives else None
        best_logps = _fetch(slots.alternative_logps_BNK) if self._needs.alternatives else None
        updates, cut_B = [], np.zeros(self._rows, bool)
        for row, running in enumerate(self._running):
            if running is None:
                continue
            count, reason, stop_string, stop_at = int(counts[row]), None, None, None
            if not live[row]:
                reason = "stop" if stopped[row] else "length"
            if running.request.stop_strings:
                found = self._find_stop(tokens[row, :count], running)
                if found is not None:
                    count, stop_at, stop_string = found
                    reason, cut_B[row] = "stop", True
            new = slice(running.seen, count)
            alternatives: list[list[tuple[int, float]]] = []
            if best is not None and best_logps is not None:
                alternatives = [
                    list(zip(ids.tolist(), values.tolist(), strict=True))
                    for ids, values in zip(best[row, new], best_logps[row, new], strict=True)
                ]
            updates.append(
                Update(
                    running.ticket,
                    tokens[row, new].copy(),
                    logps[row, new].copy(),
                    sample_logps[row, new].copy(),
                    alternatives,
                    reason,
                    stop_string,
                    stop_at,
                )
            )
            running.seen = count
            if reason is not None:
                self._running[row] = None
        if (cut_B & live).any():
            self._slots = release(self._slots, cut_B)
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

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext()


_turned = jax.jit(transformer.decode_layers, static_argnames="lora_scale")


def decode_params(model: Model, params: PyTree) -> PyTree:
    """The parameters as decoding reads them: themselves, but a copy in another layout on a CPU; see `Engine`. That copy
    has its adapters in the kernels, which bfloat16 is too coarse for (`transformer.lora_matmul`)."""
    coarse = model.lora.rank > 0 and jnp.dtype(model.dtype) != jnp.float32
    if jax.default_backend() != "cpu" or coarse:
        return params
    layers = _turned(params["layers"], lora_scale=model.lora.scale if model.lora.rank else 0.0)
    return {**params, "layers": layers}


def _key(prompt: np.ndarray) -> bytes:
    """The same for the same token ids, whatever their type."""
    return prompt.astype(np.int32).tobytes()


def _group_size(prompts: int, length: int) -> int:
    """How many prompts to read together: 1, 4, 16 ..., at most GROUP_TOKENS tokens."""
    most = max(1, min(prompts, GROUP_TOKENS // length))
    return 4 ** ((most.bit_length() - 1) // 2)


def _fetch(array: jax.Array) -> np.ndarray:
    """The whole array on this host, also when it is spread over several."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def mesh_of(params: PyTree) -> Mesh | None:
    """The mesh that the parameters lie on, or None when it is a single device."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    assert isinstance(sharding.mesh, Mesh)  # of an array that exists
    return sharding.mesh


def total_tokens(updates: Iterable[Update]) -> int:
    """How many tokens the updates hold."""
    return sum(len(update.tokens) for update in updates)


def places_for(prompts: Sequence[np.ndarray], max_new_tokens: int) -> int:
    """Places of a slot that holds the longest prompt and its answer, rounded up to few sizes."""
    longest = max((len(prompt) for prompt in prompts), default=1) + max_new_tokens
    step = 64 if longest <= 1024 else 256
    return -(-longest // step) * step
