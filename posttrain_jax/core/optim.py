"""Schedules and optimizers from plain numbers, gradients as sums, and the guarded update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import global_norm, leaf_path
from posttrain_jax.core.types import Array, PyTree

SCHEDULES = ("constant", "linear", "cosine", "wsd")
OPTIMIZERS = ("adamw", "adafactor", "lion", "rmsprop", "sgd", "adam_tf")


def make_schedule(
    name: str,
    *,
    lr: float,
    steps: int,
    warmup: float = 0.0,
    warmup_start: float = 0.0,
    min_lr_ratio: float = 0.0,
    decay_share: float = 0.1,
) -> Callable[[Array], Array]:
    """Learning rate as a function of the 0-based step.

    The warm-up is linear, lr * (s + (1 - s) (t + 1) / W) at step t < W with s = `warmup_start`, so that the first step
    already learns. Then with u = (t - W) / (steps - W):

      constant  lr
      linear    from lr to min_lr_ratio * lr
      cosine    the same ends on half a cosine (arXiv:1608.03983)
      wsd       constant, then linear to min_lr_ratio * lr over the last `decay_share` (arXiv:2404.06395)

    Args:
      name: one of SCHEDULES.
      lr: peak learning rate.
      steps: optimizer steps in the whole run.
      warmup: W: below 1 a share of `steps`, else a number of steps.
      warmup_start: where it begins, relative to `lr` (InstructGPT: 0.1).
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
        if warmup_start:
            ramp = warmup_start + (1.0 - warmup_start) * ramp
        return lr * factor * ramp

    return schedule


def decay_mask(params: PyTree) -> PyTree:
    """True for matrices, False for norms' scales, gains and biases, which weight decay leaves alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not leaf_path(path).endswith(("scale", "bias", "gain")), params
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
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm (0 = off), then the named optimizer.

    Decay is masked and decoupled: lr x decay x parameter in every step (but SGD's goes through its momentum, as in
    PyTorch).

    AdamW (arXiv:1711.05101), Lion (arXiv:2302.06675), Adafactor (arXiv:1804.04235; no parameter scaling, so
    that `lr` means the same everywhere), RMSprop as PyTorch has it (its alpha is `beta2`; eps outside the root), SGD
    with momentum, and Adam as TensorFlow 1 has it (`scale_by_adam_tf`, the optimizer of OpenAI's RLHF code; decay as
    in AdamW).

    Raises:
      InputError: an unknown name.
    """
    if name == "adamw":
        rule = optax.adamw(schedule, beta1, beta2, eps, weight_decay=weight_decay, mask=decay_mask)
    elif name == "lion":
        rule = optax.lion(schedule, beta1, beta2, weight_decay=weight_decay, mask=decay_mask)
    elif name == "adafactor":
        decay = optax.add_decayed_weights(weight_decay, decay_mask)
        rule = optax.chain(scale_by_adafactor(), decay, optax.scale_by_learning_rate(schedule))
    elif name == "rmsprop":
        decay = optax.add_decayed_weights(weight_decay, decay_mask)
        rule = optax.chain(
            optax.scale_by_rms(decay=beta2, eps=eps, eps_in_sqrt=False),
            decay,
            optax.scale_by_learning_rate(schedule),
        )
    elif name == "sgd":
        decay = optax.add_decayed_weights(weight_decay, decay_mask)
        rule = optax.chain(decay, optax.sgd(schedule, momentum=momentum or None))
    elif name == "adam_tf":
        decay = optax.add_decayed_weights(weight_decay, decay_mask)
        rule = optax.chain(scale_by_adam_tf(beta1, beta2, eps), decay, optax.scale_by_learning_rate(schedule))
    else:
        raise InputError(f"optim.name is {name!r}; use one of {', '.join(OPTIMIZERS)}.")
    return optax.chain(divide_and_clip(clip_norm), rule)


def stacked_axes(path: str) -> int:
    """How many leading axes of a leaf are copies of one parameter: its layers, and an ensemble's members."""
    return sum(part in ("layers", "members") for part in path.split("/"))


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor's update of each layer's (and member's) matrix by itself: factored moments, clipped to an RMS of 1.

    Algorithm 4 and section 6 of arXiv:1804.04235 with optax's defaults. optax takes a leaf for one matrix, so of a
    stack of layers it would clip all by the RMS of all, and factor over the layers where they are many.
    """
    factored, clip = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)

    def each(path: tuple, function: Callable[..., Any]) -> Callable[..., Any]:
        for _ in range(stacked_axes(leaf_path(path))):
            function = jax.vmap(function)
        return function

    def joined(count: Array, states: list[tuple[Array, Array, Array]], like: PyTree) -> optax.FactoredState:
        moments = (jax.tree.unflatten(jax.tree.structure(like), part) for part in zip(*states, strict=True))
        return optax.FactoredState(count, *moments)

    def init(params: PyTree) -> optax.FactoredState:
        def one(leaf: Array) -> tuple[Array, Array, Array]:
            state = factored.init(leaf)
            return state.v_row, state.v_col, state.v

        leaves = jax.tree_util.tree_leaves_with_path(params)
        return joined(jnp.zeros((), jnp.int32), [each(path, one)(leaf) for path, leaf in leaves], params)

    def update(
        gradients: PyTree, state: optax.FactoredState, params: PyTree = None
    ) -> tuple[PyTree, optax.FactoredState]:
        def one(gradient: Array, *moments: Array) -> tuple[Array, tuple[Array, Array, Array]]:
            scaled, new = factored.update(gradient, optax.FactoredState(state.count, *moments), gradient)
            return clip.update(scaled, optax.EmptyState())[0], (new.v_row, new.v_col, new.v)

        moments = (jax.tree.leaves(part) for part in (state.v_row, state.v_col, state.v))
        leaves = zip(jax.tree_util.tree_leaves_with_path(gradients), *moments, strict=True)
        done = [each(path, one)(leaf, *rest) for (path, leaf), *rest in leaves]
        updates = jax.tree.unflatten(jax.tree.structure(gradients), [scaled for scaled, _ in done])
        return updates, joined(state.count + 1, [new for _, new in done], gradients)

    return optax.GradientTransformation(init, update)


def scale_by_adam_tf(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Adam with eps beside the uncorrected root: sqrt(1 - beta2^t) / (1 - beta1^t) * m_t / (sqrt(v_t) + eps).

    The formula before section 2.1 of arXiv:1412.6980 and TensorFlow 1's AdamOptimizer, with which OpenAI's
    lm-human-preferences was trained. The usual form has sqrt(v_t / (1 - beta2^t)) + eps, which is this one with an eps
    of sqrt(1 - beta2^t) times the size: its first steps are larger where gradients are not far above eps (Huang et
    al. 2023, "The N Implementation Details of RLHF with PPO").
    """

    def init(params: PyTree) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
        )

    def update(
        gradients: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        mu = jax.tree.map(lambda m, g: beta1 * m + (1.0 - beta1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1.0 - beta2) * jnp.square(g), state.nu, gradients)
        count = state.count + 1
        steps = count.astype(float)  # a whole power of a known number would be compiled anew at every step
        factor = jnp.sqrt(1.0 - beta2**steps) / (1.0 - beta1**steps)
        updates = jax.tree.map(lambda m, v: (factor * m / (jnp.sqrt(v) + eps)).astype(m.dtype), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def scale_and_delay(
    is_scaled: Callable[[str], bool], *, scale: float, delay: int
) -> optax.GradientTransformation:
    """A learning rate of their own for some parameters, and a start without the others: the last link of a chain.

    The updates of the named parameters are multiplied by `scale`, in every update. Those of all others are 0 in the
    first `delay` updates; the moments of an optimizer before this link are gathered meanwhile, so the first update that
    counts is of the usual size.

    Args:
      is_scaled: by a parameter's path.
      scale: their learning rate over the schedule's.
      delay: in updates (those that were skipped as not finite are not counted).
    """

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: optax.ScaleByScheduleState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        started = (state.count >= delay).astype(jnp.float32)
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * (scale if is_scaled(leaf_path(path)) else started), updates
        )
        return scaled, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def divide_and_clip(clip_norm: float) -> optax.GradientTransformationExtraArgs:
    """Turns gradient sums into the clipped mean in one multiplication: times min(1, clip_norm / norm) / count.

    The count and the mean's norm come as extra arguments of `update`, since the caller has them; nothing of the
    size of the parameters is written in between (on a CPU that is two passes over memory less). The members of an
    ensemble are models of their own, each clipped by its own norm.

    Args:
      clip_norm: largest global norm of the mean gradient; 0 = no clipping.
    """

    def update(
        sums: PyTree,
        state: optax.EmptyState,
        params: PyTree = None,
        *,
        count: Array | float = 1.0,
        norm: Array | None = None,
        **_: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        def factor(norm: Array) -> Array:
            mean = 1.0 / jnp.asarray(count, jnp.float32)
            return mean * jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30)) if clip_norm else mean

        if clip_norm and isinstance(sums, dict) and set(sums) == {"members"}:
            factors_E = factor(jax.vmap(global_norm)(sums["members"]) / count)
            scaled = jax.vmap(lambda member, by: jax.tree.map(lambda leaf: leaf * by, member))
            return {"members": scaled(sums["members"], factors_E)}, state
        by = factor(global_norm(sums) / count if norm is None else norm)
        return jax.tree.map(lambda leaf: leaf * by, sums), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
