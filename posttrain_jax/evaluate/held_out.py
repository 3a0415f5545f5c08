"""Held-out loss: how likely a model finds answers that it was not trained on, with an interval around it.

Every sequence's summed loss and its number of trained tokens are kept, so that all means, and their bootstrap over
sequences (tokens of one sequence are not independent), come from the same few numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain_jax.data.loader import eval_batch_count, eval_batches
from posttrain_jax.data.packing import PackedRows
from posttrain_jax.errors import InputError
from posttrain_jax.losses.logprobs import Projection
from posttrain_jax.masking import shift_left
from posttrain_jax.models.heads import sum_logps
from posttrain_jax.models.transformer import Model, head_VD
from posttrain_jax.sharding import BATCH_AXES, ambient_mesh
from posttrain_jax.types import Array, Batch, PyTree

BOOTSTRAP_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class SequenceLosses:
    """One entry per sequence that has a trained token, in the order of the rows.

    Attributes:
      names: "file:line" of each sequence.
      loss_S: float64, nats, summed over the sequence's trained tokens.
      trained_S: int64, how many those are.
      correct_S: int64, at how many of them the target is the likeliest token.
      length_S: int64, all tokens of the sequence.
    """

    names: list[str]
    loss_S: np.ndarray
    trained_S: np.ndarray
    correct_S: np.ndarray
    length_S: np.ndarray


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its 95 % confidence interval (percentile bootstrap over sequences)."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What `held_out_loss` found.

    Attributes:
      metrics: by name,
        loss_per_token: nats, sum of all losses / trained tokens; perplexity_per_token: its exp;
        token_accuracy: share of the trained tokens that are the model's likeliest;
        loss_per_sequence: nats, mean over sequences of the summed loss;
        mean_loss_per_sequence: nats, mean over sequences of the sequence's mean loss per token (every sequence
        counts the same); perplexity_per_sequence: its exp.
      tokens, trained_tokens, sequences, rows: how much was looked at; `rows` of the packed kind.
      per_sequence: where the numbers come from.
    """

    metrics: dict[str, Estimate]
    tokens: int
    trained_tokens: int
    sequences: int
    rows: int
    per_sequence: SequenceLosses

    def counts(self) -> dict[str, int]:
        """The counts by name."""
        return {
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "sequences": self.sequences,
            "rows": self.rows,
        }


def held_out_loss(
    model: Model,
    params: PyTree,
    rows: Sequence[PackedRows],
    *,
    batch_rows: int = 8,
    mesh: Mesh | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOut:
    """Held-out loss of all rows.

    Args:
      model, params: parameters sharded on `mesh`, or whole.
      rows: from `data.packing.pack`. With several processes every one reads all of them.
      batch_rows: rows at once, over all devices; rounded up to a multiple of mesh.data x mesh.fsdp.
      mesh: where the parameters lie; None = one device.
      bootstrap: resamples for the intervals; 0 makes them as narrow as the value.
      seed: of the resamples.
      progress: called with (batches done, batches).

    Raises:
      InputError: nothing to evaluate, or a loss that is not finite (names the sequence).
    """
    if batch_rows < 1:
        raise InputError(f"eval.batch_rows is {batch_rows}; it must be at least 1.")
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    batch_rows = -(-batch_rows // shards) * shards
    batches = eval_batches(rows, rows_per_step=batch_rows)
    total = eval_batch_count(rows, rows_per_step=batch_rows)
    parts: list[np.ndarray] = []
    # One batch runs on the device while the one before is summed up here.
    waiting: tuple[Any, dict[str, np.ndarray]] | None = None
    for done, batch in enumerate(batches, 1):
        running = (_scores(params, _put(batch.arrays, mesh), model, mesh), batch.arrays)
        if waiting is not None:
            parts.append(_sequence_sums(*waiting))
        waiting = running
        if progress is not None:
            progress(done, total)
    if waiting is not None:
        parts.append(_sequence_sums(*waiting))
    table = np.concatenate(parts) if parts else np.zeros((0, 4))
    names = [part.source.row_id(i) for part in rows for row in range(len(part)) for i in part.sequences(row)]
    return _summarise(table, names, sum(len(part) for part in rows), bootstrap, seed)


def _summarise(table: np.ndarray, names: list[str], rows: int, bootstrap: int, seed: int) -> HeldOut:
    kept = table[:, 1] > 0
    if not kept.any():
        raise InputError("There is nothing to evaluate: no held-out sequence has a trained token.")
    losses = SequenceLosses(
        names=[name for name, keep in zip(names, kept, strict=True) if keep],
        loss_S=table[kept, 0],
        trained_S=table[kept, 1].astype(np.int64),
        correct_S=table[kept, 2].astype(np.int64),
        length_S=table[kept, 3].astype(np.int64),
    )
    bad = np.flatnonzero(~np.isfinite(losses.loss_S))
    if bad.size:
        raise InputError(
            f"The loss of {bad.size} of {len(losses.names)} sequences is not finite, the first of them "
            f"{losses.names[bad[0]]}; the model's weights or model.dtype cannot be right."
        )
    return HeldOut(
        metrics=estimates(losses, bootstrap=bootstrap, seed=seed),
        tokens=int(table[:, 3].sum()),
        trained_tokens=int(losses.trained_S.sum()),
        sequences=len(losses.names),
        rows=rows,
        per_sequence=losses,
    )


def estimates(losses: SequenceLosses, *, bootstrap: int, seed: int) -> dict[str, Estimate]:
    """The metrics of `HeldOut`, with intervals from `bootstrap` resamples of the sequences."""
    columns_S4 = np.stack(
        [losses.loss_S, losses.trained_S, losses.correct_S, losses.loss_S / losses.trained_S], axis=1
    ).astype(np.float64)
    count = len(columns_S4)
    random = np.random.default_rng(seed)
    block = max(1, BOOTSTRAP_BLOCK // count)
    means = [columns_S4.mean(axis=0, keepdims=True)]
    for first in range(0, bootstrap, block):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(block, bootstrap - first))
        means.append(drawn @ columns_S4 / count)
    loss, trained, correct, mean_loss = np.concatenate(means).T
    with np.errstate(over="ignore"):
        resampled = {
            "loss_per_token": loss / trained,
            "perplexity_per_token": np.exp(loss / trained),
            "token_accuracy": correct / trained,
            "loss_per_sequence": loss,
            "mean_loss_per_sequence": mean_loss,
            "perplexity_per_sequence": np.exp(mean_loss),
        }
    return {name: _estimate(values) for name, values in resampled.items()}


def _estimate(values: np.ndarray) -> Estimate:
    """The first value is of the data itself, the others of resamples."""
    drawn = values[1:] if len(values) > 1 else values
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(values[0]), float(low), float(high))


def _put(arrays: dict[str, np.ndarray], mesh: Mesh | None) -> Batch:
    """The batch on the devices, rows split over data and fsdp; every process holds the whole batch."""
    if mesh is None:
        return Batch(**{name: jnp.asarray(rows) for name, rows in arrays.items()})
    sharding = NamedSharding(mesh, P(BATCH_AXES, None))

    def put(rows: np.ndarray) -> Array:
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    return Batch(**{name: put(rows) for name, rows in arrays.items()})


def _scores(params: PyTree, batch: Batch, model: Model, mesh: Mesh | None) -> tuple[Array, Array]:
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return _token_scores(params, batch, model=model)


@functools.partial(jax.jit, static_argnames=("model",))
def _token_scores(params: PyTree, batch: Batch, *, model: Model) -> tuple[Array, Array]:
    """Log-probability of each trained token, and whether it is the likeliest, at the place before it; `[B, T]`."""
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


def _sequence_sums(scores: tuple[Array, Array], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(loss, trained tokens, correct, length) of each sequence of a batch, in order, `[S, 4]` float64."""
    logps_BT, is_argmax_BT = (np.asarray(part, np.float64) for part in scores)
    segments_BT = arrays["segment_ids"]
    trained_BT = np.zeros(segments_BT.shape)
    trained_BT[:, :-1] = arrays["loss_mask"][:, 1:] != 0
    sums = []
    for logps, correct, trained, segments in zip(
        logps_BT, is_argmax_BT, trained_BT, segments_BT, strict=True
    ):
        columns = (-logps * trained, trained, correct * trained, np.ones(len(segments)))
        last = int(segments.max())
        by_segment = [np.bincount(segments, weights=column, minlength=last + 1) for column in columns]
        sums.append(np.stack(by_segment, axis=1)[1:])
    return np.concatenate(sums)
