"""Log-probabilities of a prompt's own tokens, with the likeliest alternatives, by the training forward pass.

Prompts are packed into rows of a few lengths, so that few programs are compiled whatever the prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.masking import shift_left
from posttrain_jax.core.memory_maps import make_room
from posttrain_jax.core.sharding import shard_multiple
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.losses.logprobs import chunk_rows
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.shapes import mesh_of

ROW_TOKENS = (256, 1024)


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """Of a prompt of n tokens, in nats.

    Attributes:
      logprobs: float32 `[n - 1]`: of each token but the first, given those before it.
      alternatives: int32 `[n, K]`: the likeliest tokens after each of the n, the likeliest first, and
      alternative_logprobs: float32 `[n, K]`: their log-probabilities.
    """

    logprobs: np.ndarray
    alternatives: np.ndarray
    alternative_logprobs: np.ndarray


def row_tokens(tokens: int) -> int:
    """The length of a row for so many tokens: 256, 1024, 2048, 4096 ..."""
    return next((size for size in ROW_TOKENS if tokens <= size), 1 << (tokens - 1).bit_length())


def score_prompts(
    model: Model, params: PyTree, prompts: Sequence[np.ndarray], *, alternatives: int
) -> list[PromptScores]:
    """Scores prompts together, K = `alternatives` at least 1."""
    mesh = mesh_of(params)
    length = row_tokens(max(map(len, prompts)))
    starts: list[tuple[int, int]] = []  # of each prompt: its row, and its first index there
    row, end = 0, 0
    for prompt in prompts:
        if end + len(prompt) > length:
            row, end = row + 1, 0
        starts.append((row, end))
        end += len(prompt)
    together = shard_multiple(1, mesh)
    shape = (-(-(row + 1) // together) * together, length)
    tokens_BT, segments_BT, positions_BT = (np.zeros(shape, np.int32) for _ in range(3))
    for number, (prompt, (row, start)) in enumerate(zip(prompts, starts, strict=True), 1):
        part = slice(start, start + len(prompt))
        tokens_BT[row, part], segments_BT[row, part] = prompt, number
        positions_BT[row, part] = np.arange(len(prompt))
    parts: list[tuple[np.ndarray, ...]] = []
    make_room()
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for first in range(0, shape[0], together):
            arrays = (rows[first : first + together] for rows in (tokens_BT, segments_BT, positions_BT))
            scores = _scores(params, *arrays, model=model, alternatives=alternatives)
            parts.append(tuple(np.asarray(part) for part in scores))
    logps_BT, best_BTK, best_logps_BTK = (np.concatenate(part) for part in zip(*parts, strict=True))
    scored = []
    for prompt, (row, start) in zip(prompts, starts, strict=True):
        end = start + len(prompt)
        scored.append(
            PromptScores(
                logps_BT[row, start : end - 1], best_BTK[row, start:end], best_logps_BTK[row, start:end]
            )
        )
    return scored


@functools.partial(jax.jit, static_argnames=("model", "alternatives"))
def _scores(
    params: PyTree,
    tokens_BT: Array,
    segments_BT: Array,
    positions_BT: Array,
    *,
    model: Model,
    alternatives: int,
) -> tuple[Array, Array, Array]:
    """At every index: the next token's log-probability, and the likeliest tokens with theirs. Only one chunk of
    logits exists at a time, as in `losses/logprobs.py`."""
    rows, time = tokens_BT.shape
    output = model.apply(
        params, tokens_BT, segment_ids_BT=segments_BT, positions_BT=positions_BT, logits=False
    )
    positions, width = rows * time, output.hidden_BTD.shape[-1]
    size = chunk_rows(positions, model.config.vocab_size)
    padding = -positions % size
    hidden_ND = jnp.pad(output.hidden_BTD.reshape(positions, width), ((0, padding), (0, 0)))
    targets_N = jnp.pad(shift_left(tokens_BT).reshape(positions), (0, padding))

    def one_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden_CD, targets_C = chunk
        logps_CV = jax.nn.log_softmax(model.logits(params, hidden_CD), axis=-1)
        best_logps_CK, best_CK = jax.lax.top_k(logps_CV, alternatives)
        return jnp.take_along_axis(logps_CV, targets_C[:, None], axis=1)[:, 0], best_CK, best_logps_CK

    chunks = hidden_ND.reshape(-1, size, width), targets_N.reshape(-1, size)
    parts = jax.lax.map(one_chunk, chunks)
    logps_BT, best_BTK, best_logps_BTK = (
        part.reshape(-1, *part.shape[2:])[:positions].reshape(rows, time, *part.shape[2:]) for part in parts
    )
    return logps_BT, best_BTK, best_logps_BTK
