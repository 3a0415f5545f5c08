"""The engine's slots on the device: their cache, the state of their completions, and the prompts in prefill.

`decode.py` has the compiled functions; this file holds the arrays and knows which programs were needed so far.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.sharding import shard_multiple
from posttrain_jax.core.types import PyTree
from posttrain_jax.models.decoding import decode_layers
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling import decode as device
from posttrain_jax.sampling.choose import SamplingRows, StaticSamplingOptions
from posttrain_jax.sampling.decode import PrefillState, RequestBatch, State
from posttrain_jax.sampling.requests import Request
from posttrain_jax.sampling.shapes import PREFILL_CHUNKS, next_chunk

INITIAL_CACHE_LENGTH = 256
PREFILL_ROWS = 4  # prompts that an accelerator prefills at a time; one keeps a CPU busy


@dataclasses.dataclass(frozen=True)
class CachedPrompt:
    """The prompt at the start of a slot's cache, and the hidden state `[D]` of its last token."""

    tokens: np.ndarray
    hidden_D: np.ndarray


@dataclasses.dataclass(frozen=True)
class SlotOutputs:
    """The completions so far, on the host; see `State`."""

    count_B: np.ndarray
    live_B: np.ndarray
    stopped_B: np.ndarray
    tokens_BN: np.ndarray
    logps_BN: np.ndarray
    sample_logps_BN: np.ndarray
    alternatives_BNK: np.ndarray
    alternative_logps_BNK: np.ndarray


class Slots:
    """`rows` slots, and room to prefill `prefill_rows` prompts at a time. `load` comes before everything else.

    Args:
      model, max_new_tokens, static_options, max_stop_tokens, mesh: as for `Engine`.
      slots: number of slots; rounded up to what the mesh divides.
      max_length: most tokens of a prompt with its completion. The cache holds `cache_length` tokens a slot:
        INITIAL_CACHE_LENGTH at first, then twice as many, up to `max_length`.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        max_length: int,
        max_new_tokens: int,
        static_options: StaticSamplingOptions,
        max_stop_tokens: int,
        mesh: Mesh | None,
    ) -> None:
        self._model = model
        self._static_options = static_options
        self._max_new_tokens = max_new_tokens
        self._max_stop_tokens = max_stop_tokens
        self._mesh = mesh
        self.max_length = max_length
        self.rows = shard_multiple(slots, mesh)
        prefill_rows = 1 if jax.default_backend() == "cpu" else PREFILL_ROWS
        self.prefill_rows = shard_multiple(min(prefill_rows, slots), mesh)
        self.cache_length = 0
        self.shapes: set[tuple[str, int]] = set()  # (name, size) of every program needed so far
        self._layers: list[PyTree] = []

    def load(self, params: PyTree) -> None:
        """Takes these parameters; what the slots hold was computed with others."""
        self._params = params
        with self.on_mesh():
            self._decode_params = decode_params(self._model, params)
            if not self.cache_length:
                self._state: State = device.empty_state(
                    model=self._model,
                    rows=self.rows,
                    max_new_tokens=self._max_new_tokens,
                    static_options=self._static_options,
                    max_stop_tokens=self._max_stop_tokens,
                )
                self._prefill: PrefillState = device.empty_prefill(
                    model=self._model, rows=self.prefill_rows, length=self.max_length
                )
                self.clear(self.cache_length_for(1))

    def unload(self) -> None:
        """Frees all memory, until the next `load`."""
        self.cache_length, self._layers = 0, []
        del self._params, self._decode_params, self._state, self._prefill

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which everything else is called."""
        return jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext()

    def cache_length_for(self, tokens: int) -> int:
        """The smallest length of the cache that holds so many tokens, or the largest."""
        length = min(INITIAL_CACHE_LENGTH, self.max_length)
        while length < min(tokens, self.max_length):
            length = self._next_length(length)
        return length

    def _next_length(self, length: int) -> int:
        return min(2 * length, self.max_length)

    def clear(self, cache_length: int) -> None:
        """Makes an empty cache of this length."""
        self._layers = []
        self._layers = device.empty_layers(model=self._model, rows=self.rows, length=cache_length)
        self.cache_length = cache_length

    def grow(self, cache_length: int) -> None:
        """Makes the cache at least this long; it keeps what it holds."""
        while self.cache_length < cache_length:
            self.shapes.add(("grow", self.cache_length))
            self.cache_length = self._next_length(self.cache_length)
            self._each_layer(lambda number, layer: device.grow(layer, length=self.cache_length))

    def prefill(self, tokens_PT: np.ndarray, start: int, lengths_P: np.ndarray) -> None:
        """See `decode.prefill`."""
        self.shapes.add(("prefill", tokens_PT.shape[1]))
        self._prefill = device.prefill(
            self._params, self._prefill, tokens_PT, np.int32(start), lengths_P, model=self._model
        )

    def hidden_PD(self) -> np.ndarray:
        """The hidden states of the prefilled prompts' last tokens."""
        return fetch(self._prefill.hidden_PD)

    def fill(self, slot_P: np.ndarray) -> None:
        """Puts the prefilled prompts into slots (`rows` = nowhere)."""
        self.shapes.add(("fill", self.cache_length))
        self._each_layer(lambda number, layer: device.fill(layer, self._prefill, np.int32(number), slot_P))

    def copy(self, source: int, slot: int) -> None:
        """Copies one slot's cache into another slot."""
        self.shapes.add(("copy", self.cache_length))
        self._each_layer(lambda _, layer: device.copy_row(layer, np.int32(source), np.int32(slot)))

    def _each_layer(self, change: Callable[[int, PyTree], PyTree]) -> None:
        """Changes the cache layer by layer. On a mesh of CPU devices one program ends before the next starts: a running
        collective holds one thread of XLA's pool per device, and where some devices' parts hold all threads, the
        other devices' parts never start."""
        waits = self._mesh is not None and jax.default_backend() == "cpu"
        for number, layer in enumerate(self._layers):
            self._layers[number] = change(number, layer)
            if waits:
                jax.block_until_ready(self._layers[number])

    def begin(
        self, prompts: Sequence[CachedPrompt], slots: Sequence[int], requests: Sequence[Request]
    ) -> None:
        """Draws the first tokens of completions of prompts that slots hold; see `decode.begin`."""
        self.shapes.add(("begin", self.rows))
        padding = self.rows - len(slots)  # rows that go nowhere
        prompts, requests = [*prompts, *[prompts[0]] * padding], [*requests, *[requests[0]] * padding]
        vocab = self._model.config.vocab_size if self._static_options.penalties else 0
        prompt_RV = np.zeros((self.rows, vocab), bool)
        if vocab:
            for row, prompt in enumerate(prompts):
                prompt_RV[row, prompt.tokens] = True
        self._state = device.begin(
            self._params,
            self._state,
            np.stack([prompt.hidden_D for prompt in prompts]),
            np.asarray([len(prompt.tokens) for prompt in prompts], np.int32),
            prompt_RV,
            np.asarray([*slots, *[self.rows] * padding], np.int32),
            self.request_batch(requests),
            model=self._model,
            static_options=self._static_options,
        )

    def decode(self, steps: int, *, until_finished: bool) -> None:
        """See `decode.decode`."""
        self.shapes.add(("decode", self.cache_length))
        self._layers, self._state = device.decode(
            self._decode_params,
            self._layers,
            self._state,
            np.int32(steps),
            np.bool_(until_finished),
            model=self._model,
            static_options=self._static_options,
        )

    def release(self, ended_B: np.ndarray) -> None:
        """Ends the completions of some slots where they are."""
        self._state = device.release(self._state, ended_B)

    def outputs(self) -> SlotOutputs:
        """The completions so far, on the host."""
        state = self._state
        return SlotOutputs(
            count_B=fetch(state.count_B),
            live_B=fetch(state.live_B),
            stopped_B=fetch(state.stopped_B),
            tokens_BN=fetch(state.tokens_BN),
            logps_BN=fetch(state.logps_BN),
            sample_logps_BN=fetch(state.sample_logps_BN),
            alternatives_BNK=fetch(state.alternatives_BNK),
            alternative_logps_BNK=fetch(state.alternative_logps_BNK),
        )

    def warm_up(self) -> None:
        """Compiles every program by running it once on empty data."""
        nowhere_P = np.full(self.prefill_rows, self.rows, np.int32)
        for chunk in {next_chunk(tokens) for tokens in range(1, min(self.max_length, 2 * PREFILL_CHUNKS[0]))}:
            self.prefill(
                np.zeros((self.prefill_rows, chunk), np.int32), 0, np.ones(self.prefill_rows, np.int32)
            )
        prompt = CachedPrompt(np.zeros(1, np.int32), self.hidden_PD()[0])
        self.begin([prompt], [self.rows], [Request(prompt.tokens, 1)])
        first = length = self.cache_length_for(1)
        while True:
            self.clear(length)
            self.fill(nowhere_P)
            self.copy(0, self.rows)
            self.decode(0, until_finished=False)
            self.release(np.zeros(self.rows, bool))
            if length == self.max_length:
                break
            length = self._next_length(length)
            self.grow(length)
        self.clear(first)
        jax.block_until_ready(self._layers)

    def request_batch(self, requests: Sequence[Request]) -> RequestBatch:
        """The requests as arrays.

        Raises:
          OverflowError: a number is too large.
        """

        def host_array(values: Any, dtype: type) -> Any:
            return np.asarray(values, dtype)

        rows = len(requests)
        stop_RW: Any = np.full((rows, self._max_stop_tokens), -1, np.int32)
        for row, request in enumerate(requests):
            stop_RW[row, : len(request.stop_token_ids)] = request.stop_token_ids
        width = self._static_options.bad_words_context
        end_RW: Any = np.full((rows, width), -1, np.int32)
        for row, request in enumerate(requests):
            end = request.tokens[-width:] if width else request.tokens[:0]
            end_RW[row, width - len(end) :] = end
        ids = [(request.seed % 2**32, request.prompt, request.sample) for request in requests]
        room = [self.max_length - len(request.tokens) for request in requests]
        limits = [min(request.max_new_tokens, left) for request, left in zip(requests, room, strict=True)]
        return RequestBatch(
            ids_B3=host_array(ids, np.uint32),
            limit_B=host_array(limits, np.int32),
            min_tokens_B=host_array([request.min_new_tokens for request in requests], np.int32),
            stop_BW=stop_RW,
            prompt_end_BW=end_RW,
            sampling=SamplingRows.of([request.sampling for request in requests]),
        )


_decode_layers = jax.jit(decode_layers, static_argnames="lora_scale")


def decode_params(model: Model, params: PyTree) -> PyTree:
    """The parameters for decoding: on a CPU a copy in another layout, elsewhere the same arrays; see `Engine`.
    The copy has the adapters merged into the kernels, for which bfloat16 is too coarse (`lora_matmul`)."""
    too_coarse = model.lora.rank > 0 and jnp.dtype(model.dtype) != jnp.float32
    if jax.default_backend() != "cpu" or too_coarse:
        return params
    layers = _decode_layers(params["layers"], lora_scale=model.lora.scale if model.lora.rank else 0.0)
    return {**params, "layers": layers}


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on this host, also when it is sharded over several."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
