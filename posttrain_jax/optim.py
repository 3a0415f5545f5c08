"""Schedules and optimisers from plain numbers, gradients as sums, and the guarded update."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.errors import InputError
from posttrain_jax.trees import global_norm, leaf_path
from posttrain_jax.types import Array, Batch, Metric, Metrics, PyTree, TrainState

SCHEDULES = ("constant", "linear", "cosine", "wsd")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")


def make_schedule(
    name: str,
    *,
    lr: float,
    steps: int,
    warmup: float = 0.0,
    min_lr_ratio: float = 0.0,
    decay_share: float = 0.1,
) -> Callable[[Array], Array]:
    """Learning rate as a function of the 0-based step.

    The warm-up is linear, lr * (t + 1) / W at step t < W, so that the first step already learns. Then with
    u = (t - W) / (steps - W):

      constant  lr
      linear    from lr to min_lr_ratio * lr
      cosine    the same ends on half a cosine (arXiv:1608.03983)
      wsd       constant, then linear to min_lr_ratio * lr over the last `decay_share` (arXiv:2404.06395)

    Args:
      name: one of SCHEDULES.
      lr: peak learning rate.
      steps: optimiser steps in the whole run.
      warmup: W: below 1 a share of `steps`, else a number of steps.
      min_lr_ratio: the floor, relative to `lr`.
      decay_share: "wsd" only.

    Raises:
      InputError: an unknown name.
    """
    if name not in SCHEDULES:
        raise InputError(f"optim.schedule is {name!r}; use one of {', '.join(SCHEDULES)}.")
    warmup_steps = round(warmup * steps) if warmup < 1 else int(warmup)
    rest = max(steps - warmup_steps, 1)

    def schedule(step: Array) -> Array:
        t = jnp.asarray(step, jnp.float32)
        u = jnp.clip((t - warmup_steps) / rest, 0.0, 1.0)
        if name == "linear":
            factor = 1.0 - (1.0 - min_lr_ratio) * u
        elif name == "cosine":
            factor = min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + jnp.cos(jnp.pi * u))
        elif name == "wsd":
            fall = jnp.clip((u - (1.0 - decay_share)) / max(decay_share, 1e-9), 0.0, 1.0)
            factor = 1.0 - (1.0 - min_lr_ratio) * fall
        else:
            factor = jnp.ones_like(t)
        ramp = jnp.minimum((t + 1.0) / max(warmup_steps, 1), 1.0)
        return lr * factor * ramp

    return schedule


def decay_mask(params: PyTree) -> PyTree:
    """True for matrices, False for norms' scales and biases, which weight decay leaves alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not leaf_path(path).endswith(("scale", "bias")), params
    )


def make_optimizer(
    name: str,
    schedule: Callable[[Array], Array],
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    momentum: float = 0.0,
) -> optax.GradientTransformation:
    """Clipping by global norm (0 = off), then the named optimiser; decay is decoupled and masked.

    AdamW (arXiv:1711.05101), Lion (arXiv:2302.06675), Adafactor (arXiv:1804.04235; no parameter scaling, so
    that `lr` means the same everywhere), SGD with momentum.

    Raises:
      InputError: an unknown name.
    """
    if name == "adamw":
        rule = optax.adamw(schedule, beta1, beta2, eps, weight_decay=weight_decay, mask=decay_mask)
    elif name == "lion":
        rule = optax.lion(schedule, beta1, beta2, weight_decay=weight_decay, mask=decay_mask)
    elif name == "adafactor":
        rule = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=False,
            weight_decay_rate=weight_decay or None,
            weight_decay_mask=decay_mask,
        )
    elif name == "sgd":
        decay = optax.add_decayed_weights(weight_decay, decay_mask)
        rule = optax.chain(decay, optax.sgd(schedule, momentum=momentum or None))
    else:
        raise InputError(f"optim.name is {name!r}; use one of {', '.join(OPTIMIZERS)}.")
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule) if clip_norm else rule


def gradient_sums(
    loss_sum: Callable[[PyTree, Batch], tuple[Array, Metrics]], params: PyTree, batch: Batch
) -> tuple[PyTree, Metrics]:
    """Gradient and metrics of a loss that is a sum, added over the micro-batches on the batch's leading axis.

    Nothing is averaged here: the caller divides once by the global count, so how rows are cut into
    micro-batches (or spread over devices) never changes the result.

    Args:
      loss_sum: (params, micro-batch `[B, T]`) -> (sum of losses, metrics).
      params: differentiated.
      batch: leaves `[M, B, T]`.
    """
    gradient = jax.grad(loss_sum, has_aux=True)
    micro_batches = jax.tree.leaves(batch)[0].shape[0]
    if micro_batches == 1:
        return gradient(params, jax.tree.map(lambda leaf: leaf[0], batch))

    def body(total: PyTree, micro: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradient(params, micro)), None

    first = jax.tree.map(lambda leaf: leaf[0], batch)
    shapes = jax.eval_shape(gradient, params, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(body, zeros, batch)[0]


def apply_gradients(
    state: TrainState,
    gradients: PyTree,
    loss: Array,
    *,
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One optimiser step, or none: when the loss or the gradient norm is not finite, parameters, optimiser
    state and EMA stay as they are, the step still counts, and `skipped` goes up."""
    norm = global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay:
        ema = jax.tree.map(lambda old, new: ema_decay * old + (1.0 - ema_decay) * new, ema, params)

    def keep(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skip = 1 - finite.astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        frozen=state.frozen,
        opt_state=keep(opt_state, state.opt_state),
        ema=keep(ema, state.ema),
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


def new_state(
    params: PyTree, frozen: PyTree, key: Array, optimizer: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        frozen=frozen,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        key=key,
        skipped=zero,
        skipped_in_row=zero,
    )
