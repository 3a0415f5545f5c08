"""Log-probabilities of given tokens by the training forward pass, and the check of the engine's against them.

RL weighs a sample by the probability that it was drawn with. If the engine and the train step disagree about that
number, every such weight is wrong, and nothing else in a run shows it. So a run that samples compares the two for
every token, reports the largest and the mean difference, and stops where they are too far apart.

Bounds, on real and random models (tests/sampling/test_score.py, tests/parity): 1e-4 nats in float32. In bfloat16 both
sides round at every layer, and in another order: BFLOAT16_LARGEST for the worst token and BFLOAT16_MEAN on average.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.masking import shift_left
from posttrain_jax.core.memory_maps import make_room
from posttrain_jax.core.sharding import BATCH_AXES, ambient_mesh, shard_multiple
from posttrain_jax.core.types import Array, Batch, PyTree
from posttrain_jax.forward.heads import sum_logps
from posttrain_jax.losses.logprobs import Projection
from posttrain_jax.models.transformer import Model, head_VD
from posttrain_jax.sampling.generate import Sample
from posttrain_jax.sampling.shapes import bucket, mesh_of

FLOAT32_LARGEST = 1e-4
BFLOAT16_LARGEST = 0.5
BFLOAT16_MEAN = 0.05


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two log-probabilities of the same tokens lie apart, in nats.

    Attributes:
      largest, mean: over all tokens; 0 where there are none.
      tokens: how many were compared.
    """

    largest: float
    mean: float
    tokens: int

    def check(self, threshold: float) -> None:
        """Stops a run whose sampler and trainer do not agree.

        Args:
          threshold: the largest difference that is accepted; 0 = any.

        Raises:
          InputError: some token lies further apart, or a log-probability is not finite.
        """
        if threshold and not self.largest <= threshold:
            raise InputError(
                f"The engine's log-probabilities differ from the training forward's by up to {self.largest:.3g} nats "
                f"(mean {self.mean:.3g} over {self.tokens} tokens), more than rollout.max_logp_difference="
                f"{threshold:g}; use one dtype for both, or raise the threshold if this is what bfloat16 gives."
            )


def difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Difference:
    """The difference of two sets of log-probabilities of the same samples, token by token."""
    pairs = zip(ours, theirs, strict=True)
    apart = [np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) for a, b in pairs]
    flat = np.concatenate(apart) if apart else np.zeros(0)
    if not flat.size:
        return Difference(0.0, 0.0, 0)
    return Difference(float(flat.max()), float(flat.mean()), int(flat.size))


def score_samples(
    model: Model,
    params: PyTree,
    prompts: Sequence[np.ndarray],
    samples: Sequence[Sample],
    *,
    batch_rows: int = 8,
) -> list[np.ndarray]:
    """The training forward's log-probability of every token of every sample, float32 `[n]` each, nats.

    Args:
      model, params: as for `generate`.
      prompts: the prompts of the samples, by `Sample.prompt`; cut as the engine read them.
      samples: the completions.
      batch_rows: rows of one forward pass; rounded up to what the mesh divides.
    """
    mesh = mesh_of(params)
    rows = shard_multiple(batch_rows, mesh)
    scores: list[np.ndarray] = []
    for first in range(0, len(samples), rows):
        part = samples[first : first + rows]
        texts = [np.concatenate([prompts[s.prompt][s.cut :], s.tokens]) for s in part]
        arrays = _rows(texts, [len(sample.tokens) for sample in part], rows)
        logps_BT = np.asarray(token_scores(model, params, arrays, mesh=mesh)[0])
        for row, (text, sample) in enumerate(zip(texts, part, strict=True)):
            scores.append(logps_BT[row, len(text) - len(sample.tokens) - 1 : len(text) - 1])
    return scores


def _rows(texts: Sequence[np.ndarray], completions: Sequence[int], rows: int) -> dict[str, np.ndarray]:
    """The leaves of a Batch, one text a row, padded on the right; the loss mask is on each text's completion, whose
    length `completions` gives."""
    length = bucket(max(len(text) for text in texts), smallest=64)
    shape = (rows, length)
    tokens, mask, segments = (np.zeros(shape, np.int32) for _ in range(3))
    for row, (text, completion) in enumerate(zip(texts, completions, strict=True)):
        tokens[row, : len(text)] = text
        segments[row, : len(text)] = 1
        mask[row, len(text) - completion : len(text)] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return {"tokens": tokens, "loss_mask": mask, "segment_ids": segments, "positions": positions}


def token_scores(
    model: Model, params: PyTree, arrays: dict[str, np.ndarray], *, mesh: Mesh | None
) -> tuple[Array, Array]:
    """Of each token with loss mask 1: its log-probability (nats), and 1.0 where it is the model's likeliest.

    Args:
      model, params: parameters sharded on `mesh`, or whole.
      arrays: the leaves of a `Batch`, `[B, T]`; with several processes every one holds all of them.
      mesh: where the parameters lie; None = one device. Rows must be a `shard_multiple`.

    Returns:
      Two float32 `[B, T]`, each value at the index before its token; they are computed while the caller goes on.
    """
    make_room()
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return _token_scores(params, _put(arrays, mesh), model=model)


def _put(arrays: dict[str, np.ndarray], mesh: Mesh | None) -> Batch:
    """The batch on the devices, rows split over data and fsdp; every process holds the whole batch."""
    if mesh is None:
        return Batch(**{name: jnp.asarray(rows) for name, rows in arrays.items()})
    sharding = NamedSharding(mesh, P(BATCH_AXES, None))

    def put(rows: np.ndarray) -> Array:
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    return Batch(**{name: put(rows) for name, rows in arrays.items()})


@functools.partial(jax.jit, static_argnames=("model",))
def _token_scores(params: PyTree, batch: Batch, *, model: Model) -> tuple[Array, Array]:
    output = model.apply(
        params,
        batch.tokens,
        segment_ids_BT=batch.segment_ids,
        positions_BT=batch.positions,
        logits=False,
    )
    _, logps_BT, is_argmax_BT = sum_logps(
        output.hidden_BTD,
        head_VD(params),
        shift_left(batch.tokens),
        shift_left(batch.loss_mask),
        Projection(softcap=model.config.logits_softcap),
    )
    scores = (logps_BT, is_argmax_BT)
    if ambient_mesh() is not None:
        scores = jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), scores)
    return scores
