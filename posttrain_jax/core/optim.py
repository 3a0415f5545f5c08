"""Schedules and optimizers from plain numbers, gradients as sums, and the guarded update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.core.schema import check, setting
from posttrain_jax.core.trees import global_norm, leaf_path
from posttrain_jax.core.types import Array, PyTree

SCHEDULES = ("constant", "linear", "cosine", "wsd")
OPTIMIZERS = ("adamw", "adafactor", "lion", "rmsprop", "sgd", "adam_tf")
LARGEST_DECAY = 0.9999999
"""Of a moment: what is nearer to 1 is 1 in float32, and the first update 0 / 0."""


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """The section `optim` of a config."""

    name: str = setting("adamw", "the optimizer", choices=OPTIMIZERS)
    lr: float = setting(1e-5, "peak learning rate", maximum=1e6)
    schedule: str = setting("cosine", "of the learning rate after the warm-up", choices=SCHEDULES)
    warmup: float = setting(
        0.0, "linear warm-up: below 1 a share of the run's updates, else a number of them", maximum=2**31 - 1
    )
    warmup_start: float = setting(
        0.0, "where the warm-up begins, as a share of lr (InstructGPT: 0.1)", maximum=1
    )
    min_lr_ratio: float = setting(0.0, "lowest learning rate, as a share of lr", maximum=1)
    decay_share: float = setting(0.1, "wsd: the last share of the updates, in which lr falls", maximum=1)
    beta1: float = setting(0.9, "decay of the first moment", maximum=LARGEST_DECAY)
    beta2: float = setting(
        0.999, "decay of the second moment (rmsprop: PyTorch's alpha)", maximum=LARGEST_DECAY
    )
    eps: float = setting(1e-8, "added to the root of the second moment", maximum=1e6)
    weight_decay: float = setting(0.0, "decoupled: lr x decay x parameter in every update", maximum=1e6)
    momentum: float = setting(0.0, "sgd", maximum=1)
    clip_norm: float = setting(1.0, "largest global norm of the gradient; 0 = off")
    ema: float = setting(0.0, "decay of the moving average of the weights; 0 = off", below=1)

    def __post_init__(self) -> None:
        check(self, "optim")


def make_schedule(options: OptimOptions, *, steps: int) -> Callable[[Array], Array]:
    """Learning rate as a function of the 0-based step.

    The warm-up is linear, lr * (s + (1 - s) (t + 1) / W) at step t < W with s = `warmup_start`, so that the first step
    already learns. Then with u = (t - W) / (steps - W):

      constant  lr
      linear    from lr to min_lr_ratio * lr
      cosine    the same ends on half a cosine (arXiv:1608.03983)
      wsd       constant, then linear to min_lr_ratio * lr over the last `decay_share` (arXiv:2404.06395)

    Args:
      options: `lr`, `schedule`, and its numbers; W is `warmup`, or that share of `steps`.
      steps: optimizer steps in the whole run.
    """
    name, lr, min_lr_ratio = options.schedule, options.lr, options.min_lr_ratio
    warmup, warmup_start, decay_share = options.warmup, options.warmup_start, options.decay_share
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
    options: OptimOptions, schedule: Callable[[Array], Array]
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm (0 = off), then the named optimizer.

    Decay is masked and decoupled: lr x decay x parameter in every step (but SGD's goes through its momentum, as in
    PyTorch).

    AdamW (arXiv:1711.05101), Lion (arXiv:2302.06675), Adafactor (arXiv:1804.04235; no parameter scaling, so
    that `lr` means the same everywhere), RMSprop as PyTorch has it (its alpha is `beta2`; eps outside the root), SGD
    with momentum, and Adam as TensorFlow 1 has it (`scale_by_adam_tf`, the optimizer of OpenAI's RLHF code; decay as
    in AdamW).
    """
    beta1, beta2, eps = options.beta1, options.beta2, options.eps
    decay = optax.add_decayed_weights(options.weight_decay, decay_mask)
    scale = optax.scale_by_learning_rate(schedule)
    rules: dict[str, tuple[optax.GradientTransformation, ...]] = {
        "adamw": (optax.scale_by_adam(beta1, beta2, eps), decay, scale),
        "lion": (optax.scale_by_lion(beta1, beta2), decay, scale),
        "adafactor": (scale_by_adafactor(), decay, scale),
        "rmsprop": (optax.scale_by_rms(decay=beta2, eps=eps, eps_in_sqrt=False), decay, scale),
        "sgd": (decay, optax.sgd(schedule, momentum=options.momentum or None)),
        "adam_tf": (scale_by_adam_tf(beta1, beta2, eps), decay, scale),
    }
    return optax.chain(divide_and_clip(options.clip_norm), optax.chain(*rules[options.name]))


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
    """Gives some parameters another learning rate, and trains them alone at first; the last link of an optax chain.

    The updates of these parameters are multiplied by `scale`. The updates of all others are 0 in the first `delay`
    updates. The optimizer before this link gathers its moments meanwhile, so the first update that counts has the
    usual size.

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
