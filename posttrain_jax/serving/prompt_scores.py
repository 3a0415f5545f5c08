"""Log-probabilities of a prompt's own tokens, with the likeliest alternatives, by the training forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.losses.logprobs import chunk_rows
from posttrain_jax.masking import shift_left
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.engine import GROUP_TOKENS, bucket, mesh_of
from posttrain_jax.sharding import shard_multiple
from posttrain_jax.types import Array, PyTree


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


def group_size(length: int) -> int:
    """How many prompts of so many tokens are scored at once."""
    return max(1, GROUP_TOKENS // bucket(length))


def score_prompts(
    model: Model, params: PyTree, prompts: Sequence[np.ndarray], *, alternatives: int
) -> list[PromptScores]:
    """Scores prompts of like length together, K = `alternatives` at least 1."""
    mesh = mesh_of(params)
    rows = shard_multiple(1 << (len(prompts) - 1).bit_length(), mesh)
    lengths = [len(prompt) for prompt in prompts]
    tokens_BT = np.zeros((rows, bucket(max(lengths))), np.int32)
    lengths_B = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
        lengths_B[row] = len(prompt)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        scores = _scores(params, tokens_BT, lengths_B, model=model, alternatives=alternatives)
    logps_BT, best_BTK, best_logps_BTK = (np.asarray(part) for part in scores)
    return [
        PromptScores(logps_BT[row, : n - 1], best_BTK[row, :n], best_logps_BTK[row, :n])
        for row, n in enumerate(lengths)
    ]


@functools.partial(jax.jit, static_argnames=("model", "alternatives"))
def _scores(
    params: PyTree, tokens_BT: Array, lengths_B: Array, *, model: Model, alternatives: int
) -> tuple[Array, Array, Array]:
    """At every place: the next token's log-probability, and the likeliest tokens with theirs. Only one chunk of
    logits exists at a time, as in `losses/logprobs.py`."""
    rows, time = tokens_BT.shape
    real_BT = (jnp.arange(time)[None] < lengths_B[:, None]).astype(jnp.int32)
    output = model.apply(params, tokens_BT, segment_ids_BT=real_BT, logits=False)
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
