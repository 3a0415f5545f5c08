"""Epochs and minibatches of updates over an iteration's trajectories, inside one jitted train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import Array, Maximum, Metric, Metrics, PartMetrics, PyTree, TrainState
from posttrain_jax.core.updates import apply_gradients, gradient_sums, used_micro_batches
from posttrain_jax.forward.packed_rows import PackedRows, packed_rows
from posttrain_jax.rollouts.trajectory import TrajectoryBatch


@dataclasses.dataclass(frozen=True)
class AuxiliaryLoss:
    """A second loss, whose gradient is added to that of the trajectories in every minibatch.

    Attributes:
      batch: leaves `[M, B, ...]`; the i-th minibatch of every epoch has the i-th of K equal shares of the M.
      losses: (whole parameters, `[B, ...]`) -> (sum of losses, metrics with `name`).
      name: of the metric that holds the loss's sum and count.
      coefficient: of the mean of this loss, beside the mean of the first.
    """

    batch: PyTree
    losses: Callable[[PyTree, Any], tuple[Array, Metrics]]
    name: str
    coefficient: float


def minibatch_updates(
    state: TrainState,
    batch: TrajectoryBatch,
    mask_NS: Array,
    *,
    targets: Callable[[Array], PyTree],
    losses: Callable[[PyTree, PackedRows, PyTree], tuple[Array, PartMetrics]],
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
    auxiliary: AuxiliaryLoss | None = None,
) -> tuple[TrainState, Metrics]:
    """One update for each minibatch of `batch.indices`, one epoch after the other.

    Args:
      state: as `wiring.online.init_state` makes it.
      batch: the trajectories and their packed rows.
      mask_NS: non-zero on the tokens that are learned from.
      targets: (which trajectories are in the minibatch, bool `[N]`) -> what the losses need of them, arrays `[N, ...]`.
      losses: (whole parameters, packed rows of a micro-batch, targets) -> (sum of losses, metrics with "loss").
      optimizer, schedule, ema_decay: as everywhere.
      auxiliary: a second loss.

    Returns:
      The state one step later, and metrics over all updates, named "train/..." (the schedule's is of the first).
    """
    epochs, minibatches, micro_batches, micro_rows, row_length = batch.indices.shape
    trajectories, size = batch.tokens.shape[0], batch.tokens.size

    def add_auxiliary(
        state: TrainState, second: AuxiliaryLoss, number: Array, gradients: PyTree, count: Array
    ) -> tuple[PyTree, Metrics]:
        shares = jax.tree.map(lambda leaf: leaf.reshape(minibatches, -1, *leaf.shape[1:]), second.batch)
        share = jax.tree.map(lambda leaf: leaf[number % minibatches], shares)

        def loss_sum(params: PyTree, part: PyTree) -> tuple[Array, Metrics]:
            return second.losses(combine(params, state.frozen), part)

        more, metrics = gradient_sums(loss_sum, state.params, share)
        # The update divides by the trajectories' count, so that this sum becomes coefficient x its own mean.
        factor = second.coefficient * count / jnp.maximum(metrics[second.name].count, 1.0)
        return jax.tree.map(lambda own, other: own + factor * other, gradients, more), metrics

    def update(state: TrainState, turn: tuple[Array, Array]) -> tuple[TrainState, PartMetrics]:
        number, indices_MRT = turn
        member_N = (
            jnp.zeros(trajectories, bool)
            .at[indices_MRT.reshape(-1) // batch.tokens.shape[1]]
            .set(True, mode="drop")
        )
        of_minibatch = targets(member_N)

        def loss_sum(params: PyTree, indices_RT: Array) -> tuple[Array, PartMetrics]:
            rows = packed_rows(indices_RT, batch.tokens, mask_NS)
            return losses(combine(params, state.frozen), rows, of_minibatch)

        used = used_micro_batches(indices_MRT < size)
        gradients, metrics = gradient_sums(loss_sum, state.params, indices_MRT, used=used)
        loss = metrics["loss"]
        assert isinstance(loss, Metric)
        if auxiliary is not None:
            gradients, more = add_auxiliary(state, auxiliary, number, gradients, loss.count)
            mean = more[auxiliary.name].sum / jnp.maximum(more[auxiliary.name].count, 1.0)
            loss = Metric(loss.sum + auxiliary.coefficient * mean * loss.count, loss.count)
            metrics |= more | {"loss": loss}
        before = state.skipped
        state, update_metrics = apply_gradients(
            state, gradients, loss.sum, optimizer=optimizer, count=loss.count, ema_decay=ema_decay
        )
        computed = jnp.float32(micro_rows * row_length) * used
        padding = computed - jnp.sum(indices_MRT < size, dtype=jnp.float32)
        named: PartMetrics = {f"train/{name}": metric for name, metric in metrics.items()}
        named |= {**update_metrics, "train/padding_share": Metric(padding, computed)}
        kept = state.skipped == before

        def counted(metric: Metric | Maximum) -> Metric | Maximum:
            """As it is, or nothing: an update that is skipped, because something is not finite, is in no mean."""
            if isinstance(metric, Maximum):
                return Maximum(jnp.where(kept, metric.value, -jnp.inf))
            return jax.tree.map(lambda leaf: jnp.where(kept, leaf, 0), metric)

        return state, {name: counted(metric) for name, metric in named.items()}

    updates = state.opt_state["updates"]
    inner = dataclasses.replace(state, opt_state=state.opt_state["optimizer"])
    turns = (
        jnp.arange(epochs * minibatches),
        batch.indices.reshape(epochs * minibatches, micro_batches, micro_rows, row_length),
    )
    inner, stacked = jax.lax.scan(update, inner, turns)
    joined = {name: metric.over_leading_axis() for name, metric in stacked.items()}
    metrics = {
        name: metric.as_metric() if isinstance(metric, Maximum) else metric for name, metric in joined.items()
    }
    metrics |= {
        # The optimizer does not count skipped updates.
        "train/lr": Metric.of(schedule(updates - state.skipped)),
        "train/skipped": Metric.of(inner.skipped),
        "train/skipped_in_row": Metric.of(inner.skipped_in_row),
    }
    opt_state = {**state.opt_state, "optimizer": inner.opt_state, "updates": updates + epochs * minibatches}
    return dataclasses.replace(inner, step=state.step + 1, opt_state=opt_state), metrics
