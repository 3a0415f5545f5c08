"""What every train step ends with: gradient sums over micro-batches, one division, one update, or none.

A loss is a sum, and the caller divides once by the global count, so that micro-batches, devices and packing never
change the result. An update whose loss or gradient is not finite is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.core.trees import global_norm
from posttrain_jax.core.types import (
    Array,
    Maximum,
    Metric,
    Metrics,
    PartMetrics,
    PyTree,
    TrainState,
    is_metric,
)

M = TypeVar("M", Metrics, PartMetrics)

TOTALS = frozenset({"tokens", "trained_tokens", "pairs", "completions"})
"""Metrics that are totals of a step, whatever number of micro-batches it has; the others are means."""


def gradient_sums(
    loss_sum: Callable[[PyTree, PyTree], tuple[Array, M]],
    params: PyTree,
    batch: PyTree,
    *,
    used: Array | None = None,
) -> tuple[PyTree, M]:
    """Gradient and metrics of a loss that is a sum, added over the micro-batches on the batch's leading axis.

    Nothing is averaged here: the caller divides once by the global count, so how rows are cut into
    micro-batches (or spread over devices) never changes the result.

    Args:
      loss_sum: (params, micro-batch `[B, ...]`) -> (sum of losses, metrics).
      params: differentiated.
      batch: leaves `[M, B, ...]`.
      used: scalar int32, how many micro-batches to do (the others are empty); None = all.
    """
    gradient = jax.grad(loss_sum, has_aux=True)
    micro_batches = jax.tree.leaves(batch)[0].shape[0]
    if micro_batches == 1:
        return gradient(params, jax.tree.map(lambda leaf: leaf[0], batch))

    def body(total: PyTree, micro: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(_join, total, gradient(params, micro), is_leaf=is_metric), None

    first = jax.tree.map(lambda leaf: leaf[0], batch)
    shapes = jax.eval_shape(gradient, params, first)
    zeros = jax.tree.map(_nothing, shapes, is_leaf=is_metric)
    if used is None:
        return jax.lax.scan(body, zeros, batch)[0]

    def one(number: Array, total: PyTree) -> PyTree:
        micro = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), batch)
        return body(total, micro)[0]

    return jax.lax.fori_loop(0, used, one, zeros)


def _join(total: Any, part: Any) -> Any:
    """Maxima by the maximum, all else by the sum."""
    return total.join(part) if isinstance(total, Maximum) else total + part


def _nothing(shape: Any) -> Any:
    """What a sum, or a maximum, begins with."""
    if isinstance(shape, Maximum):
        return Maximum(jnp.full(shape.value.shape, -jnp.inf, shape.value.dtype))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)


def used_micro_batches(segment_ids_MBT: Array) -> Array:
    """How many micro-batches come before the first that holds padding alone (empty rows lie last), at least 1."""
    filled_M = jnp.any(segment_ids_MBT != 0, axis=(1, 2))
    count = segment_ids_MBT.shape[0]
    return jnp.max(jnp.where(filled_M, jnp.arange(1, count + 1, dtype=jnp.int32), 1))


def map_micro_batches(function: Callable[[PyTree], PyTree], batch: PyTree, used: Array) -> PyTree:
    """`function` of each of the first `used` micro-batches, stacked on a leading axis; zeros for the others."""
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    count = jax.tree.leaves(batch)[0].shape[0]
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), shapes)

    def one(number: Array, out: PyTree) -> PyTree:
        micro = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), batch)
        return jax.tree.map(lambda whole, part: whole.at[number].set(part), out, function(micro))

    return jax.lax.fori_loop(0, used, one, zeros)


def apply_gradients(
    state: TrainState,
    gradients: PyTree,
    loss: Array,
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    count: Array | float = 1.0,
    ema_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One optimizer step, or none: when the loss or the gradient norm is not finite, parameters, optimizer
    state and EMA stay as they are, the step still counts, and `skipped` goes up. They stay as they are, too, where
    nothing counted (count 0), which is no fault.

    Args:
      state: before the step.
      gradients: sums; the step uses gradients / count.
      loss: anything that is finite exactly when the loss is.
      optimizer: from `make_optimizer`.
      count: what the sums are divided by, the global count (of trained tokens, or of weights).
      ema_decay: of the moving average of the parameters; 0 = off.
    """
    count = jnp.asarray(count, jnp.float32)
    counted = count > 0
    count = jnp.where(counted, count, 1.0)
    norm = global_norm(gradients) / count
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    # A branch and not a `where` over old and new: XLA then updates in place, where a `where` makes it copy parameters,
    # moments and all (of PPO's minibatches in a scan, 1.75 times the size of the parameters).
    def take(params: PyTree, opt_state: PyTree, ema: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        updates, opt_state = optimizer.update(gradients, opt_state, params, count=count, norm=norm)
        params = optax.apply_updates(params, updates)
        if ema_decay:
            ema = jax.tree.map(lambda old, new: ema_decay * old + (1.0 - ema_decay) * new, ema, params)
        return params, opt_state, ema

    def leave(params: PyTree, opt_state: PyTree, ema: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        return params, opt_state, ema

    params, opt_state, ema = jax.lax.cond(
        finite & counted, take, leave, state.params, state.opt_state, state.ema
    )
    skip = 1 - finite.astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=params,
        frozen=state.frozen,
        opt_state=opt_state,
        ema=ema,
        key=state.key,
        skipped=state.skipped + skip,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1).astype(jnp.int32),
    )
    metrics = {
        "train/grad_norm": Metric.of(norm),
        "train/skipped": Metric.of(state.skipped),
        "train/skipped_in_row": Metric.of(state.skipped_in_row),
    }
    return state, metrics


def update(
    state: TrainState,
    loss_sum: Callable[[PyTree, PyTree], tuple[Array, Metrics]],
    batch: PyTree,
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
    used: Array | None = None,
) -> tuple[TrainState, Metrics]:
    """One update by the gradient of a loss over the micro-batches of a step, and the metrics under "train/".

    Args:
      state: before the step.
      loss_sum: as in `gradient_sums`; its metric "loss" has the sum, and the count that the gradient is divided by.
      batch: leaves `[M, B, ...]`.
      optimizer, schedule, ema_decay: as everywhere.
      used: as in `gradient_sums`.
    """
    gradients, metrics = gradient_sums(loss_sum, state.params, batch, used=used)
    loss = metrics["loss"]
    lr = schedule(state.step - state.skipped)  # the optimizer does not count skipped steps
    state, update_metrics = apply_gradients(
        state, gradients, loss.sum, optimizer=optimizer, count=loss.count, ema_decay=ema_decay
    )
    named = {
        f"train/{name}": Metric.of(metric.sum) if name in TOTALS else metric
        for name, metric in metrics.items()
    }
    return state, {**named, **update_metrics, "train/lr": Metric.of(lr)}


def eval_sums(micro_metrics: Callable[[PyTree], Metrics], batch: PyTree) -> Metrics:
    """Metrics of a batch `[M, B, ...]` of rows with `segment_ids`, added over the micro-batches that are not empty."""
    stacked = map_micro_batches(micro_metrics, batch, used_micro_batches(batch.segment_ids))
    return {name: metric.over_leading_axis() for name, metric in stacked.items()}


def padding_metrics(segment_ids_BT: Array) -> Metrics:
    """How many tokens rows hold, and which share of their places is padding."""
    places = jnp.float32(segment_ids_BT.size)
    tokens = jnp.sum(segment_ids_BT != 0, dtype=jnp.float32)
    return {"tokens": Metric(tokens, jnp.float32(1)), "padding_share": Metric(places - tokens, places)}


def new_state(
    params: PyTree, frozen: PyTree, key: Array, optimizer: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        key=key,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )
