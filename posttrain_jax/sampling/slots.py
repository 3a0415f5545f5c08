"""The engine's slots on the device: their cache, the state of their answers, and the prompts that are being read.

What runs there is in `decode.py`; here are the arrays, and which programs they have needed.
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
from posttrain_jax.models import transformer
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling import decode as device
from posttrain_jax.sampling.choose import Needs, SamplingRows
from posttrain_jax.sampling.decode import Orders, Reading, State
from posttrain_jax.sampling.requests import Request
from posttrain_jax.sampling.shapes import READ_CHUNKS, next_chunk

FIRST_PLACES = 256
READ_TOGETHER = 4  # prompts that an accelerator reads at a time; one keeps a CPU busy


@dataclasses.dataclass(frozen=True)
class Held:
    """A prompt that a slot's cache begins with, and the hidden state `[D]` of its last token."""

    tokens: np.ndarray
    hidden_D: np.ndarray


@dataclasses.dataclass(frozen=True)
class Written:
    """What the device says of the slots, on the host; see `State`."""

    count_B: np.ndarray
    live_B: np.ndarray
    stopped_B: np.ndarray
    tokens_BN: np.ndarray
    logps_BN: np.ndarray
    sample_logps_BN: np.ndarray
    alternatives_BNK: np.ndarray
    alternative_logps_BNK: np.ndarray


class Slots:
    """`rows` slots, and room to read `read_rows` prompts at a time. `load` comes before everything else.

    Args:
      model, needs, stop_width, mesh: as of the engine.
      slots: at least so many rows; as many as the mesh divides.
      places: most tokens of a prompt with its answer. The cache has `cached` of them: FIRST_PLACES, twice that ...
      new_tokens: most tokens of an answer.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        places: int,
        new_tokens: int,
        needs: Needs,
        stop_width: int,
        mesh: Mesh | None,
    ) -> None:
        self._model = model
        self._needs = needs
        self._new_tokens = new_tokens
        self._stop_width = stop_width
        self._mesh = mesh
        self.places = places
        self.rows = shard_multiple(slots, mesh)
        together = 1 if jax.default_backend() == "cpu" else READ_TOGETHER
        self.read_rows = shard_multiple(min(together, slots), mesh)
        self.cached = 0
        self.shapes: set[tuple[str, int]] = set()  # of the programs that were needed
        self._layers: list[PyTree] = []

    def load(self, params: PyTree) -> None:
        """Goes on with these parameters; what the slots hold was read with others."""
        self._params = params
        with self.on_mesh():
            self._decode_params = decode_params(self._model, params)
            if not self.cached:
                self._state: State = device.empty_state(
                    model=self._model,
                    rows=self.rows,
                    new_tokens=self._new_tokens,
                    needs=self._needs,
                    stop_width=self._stop_width,
                )
                self._reading: Reading = device.empty_reading(
                    model=self._model, rows=self.read_rows, places=self.places
                )
                self.clear(self.size_for(1))

    def unload(self) -> None:
        """Gives all memory back, until the next `load`."""
        self.cached, self._layers = 0, []
        del self._params, self._decode_params, self._state, self._reading

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Everything else is called within it."""
        return jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext()

    def size_for(self, tokens: int) -> int:
        """The smallest size of the cache with so many places, or the largest."""
        size = min(FIRST_PLACES, self.places)
        while size < min(tokens, self.places):
            size = self._next_size(size)
        return size

    def _next_size(self, size: int) -> int:
        return min(2 * size, self.places)

    def clear(self, places: int) -> None:
        """An empty cache of such a size."""
        self._layers = []
        self._layers = device.empty_layers(model=self._model, rows=self.rows, places=places)
        self.cached = places

    def grow(self, places: int) -> None:
        """The same cache, at least of such a size."""
        while self.cached < places:
            self.shapes.add(("grow", self.cached))
            self.cached = self._next_size(self.cached)
            self._each_layer(lambda number, layer: device.grow(layer, places=self.cached))

    def read(self, tokens_PT: np.ndarray, start: int, lengths_P: np.ndarray) -> None:
        """See `decode.read`."""
        self.shapes.add(("read", tokens_PT.shape[1]))
        self._reading = device.read(
            self._params, self._reading, tokens_PT, np.int32(start), lengths_P, model=self._model
        )

    def hidden_PD(self) -> np.ndarray:
        """The hidden states of the last tokens of the prompts that were read."""
        return fetch(self._reading.hidden_PD)

    def fill(self, slot_P: np.ndarray) -> None:
        """Puts the prompts that were read into slots (`rows` = nowhere)."""
        self.shapes.add(("fill", self.cached))
        self._each_layer(lambda number, layer: device.fill(layer, self._reading, np.int32(number), slot_P))

    def copy(self, source: int, slot: int) -> None:
        """Puts what a slot holds into another one too."""
        self.shapes.add(("copy", self.cached))
        self._each_layer(lambda _, layer: device.copy_row(layer, np.int32(source), np.int32(slot)))

    def _each_layer(self, change: Callable[[int, PyTree], PyTree]) -> None:
        """Changes the cache layer by layer. On a mesh of CPU devices one program ends before the next starts: each
        collective that is under way holds a thread of XLA's pool for every device, and when all threads are held by
        some devices' parts, the others' parts never start."""
        waits = self._mesh is not None and jax.default_backend() == "cpu"
        for number, layer in enumerate(self._layers):
            self._layers[number] = change(number, layer)
            if waits:
                jax.block_until_ready(self._layers[number])

    def begin(self, held: Sequence[Held], slots: Sequence[int], requests: Sequence[Request]) -> None:
        """Draws the first tokens of answers to prompts that slots hold; see `decode.begin`."""
        self.shapes.add(("begin", self.rows))
        more = self.rows - len(slots)  # these go nowhere
        held, requests = [*held, *[held[0]] * more], [*requests, *[requests[0]] * more]
        vocab = self._model.config.vocab_size if self._needs.penalties else 0
        prompt_RV = np.zeros((self.rows, vocab), bool)
        if vocab:
            for row, one in enumerate(held):
                prompt_RV[row, one.tokens] = True
        self._state = device.begin(
            self._params,
            self._state,
            np.stack([one.hidden_D for one in held]),
            np.asarray([len(one.tokens) for one in held], np.int32),
            prompt_RV,
            np.asarray([*slots, *[self.rows] * more], np.int32),
            self.orders(requests),
            model=self._model,
            needs=self._needs,
        )

    def decode(self, steps: int, *, until_finished: bool) -> None:
        """See `decode.decode`."""
        self.shapes.add(("decode", self.cached))
        self._layers, self._state = device.decode(
            self._decode_params,
            self._layers,
            self._state,
            np.int32(steps),
            np.bool_(until_finished),
            model=self._model,
            needs=self._needs,
        )

    def release(self, ended_B: np.ndarray) -> None:
        """Ends the answers of some slots where they are."""
        self._state = device.release(self._state, ended_B)

    def written(self) -> Written:
        """The answers so far."""
        state = self._state
        return Written(
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
        """Compiles everything by running it once on nothing."""
        nowhere_P = np.full(self.read_rows, self.rows, np.int32)
        for chunk in {next_chunk(tokens) for tokens in range(1, min(self.places, 2 * READ_CHUNKS[0]))}:
            self.read(np.zeros((self.read_rows, chunk), np.int32), 0, np.ones(self.read_rows, np.int32))
        held = Held(np.zeros(1, np.int32), self.hidden_PD()[0])
        self.begin([held], [self.rows], [Request(held.tokens, 1)])
        first = size = self.size_for(1)
        while True:
            self.clear(size)
            self.fill(nowhere_P)
            self.copy(0, self.rows)
            self.decode(0, until_finished=False)
            self.release(np.zeros(self.rows, bool))
            if size == self.places:
                break
            size = self._next_size(size)
            self.grow(size)
        self.clear(first)
        jax.block_until_ready(self._layers)

    def orders(self, requests: Sequence[Request]) -> Orders:
        """The requests as the device reads them.

        Raises:
          OverflowError: a number is too large.
        """
        rows = len(requests)
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
        room = [self.places - len(request.tokens) for request in requests]
        limits = [min(request.max_new_tokens, left) for request, left in zip(requests, room, strict=True)]
        return Orders(
            ids_B3=host_array(ids, np.uint32),
            limit_B=host_array(limits, np.int32),
            min_tokens_B=host_array([request.min_new_tokens for request in requests], np.int32),
            stop_BW=stop_RW,
            prompt_end_BW=end_RW,
            sampling=SamplingRows.of([request.sampling for request in requests]),
        )


_turned = jax.jit(transformer.decode_layers, static_argnames="lora_scale")


def decode_params(model: Model, params: PyTree) -> PyTree:
    """The parameters as decoding reads them: themselves, but a copy in another layout on a CPU; see `Engine`. That copy
    has its adapters in the kernels, which bfloat16 is too coarse for (`transformer.lora_matmul`)."""
    coarse = model.lora.rank > 0 and jnp.dtype(model.dtype) != jnp.float32
    if jax.default_backend() != "cpu" or coarse:
        return params
    layers = _turned(params["layers"], lora_scale=model.lora.scale if model.lora.rank else 0.0)
    return {**params, "layers": layers}


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on this host, also when it is spread over several."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
