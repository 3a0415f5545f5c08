"""RLOO: REINFORCE with a leave-one-out baseline (arXiv:2402.14740). Several completions of a prompt are scored, and
each is compared with the mean of the others; there is no value network.

The whole completion is one action: its reward is the score less beta times the sum of its tokens' k1, its
log-probability the sum of its tokens'. With one update an iteration this is REINFORCE; with more, the ratio of the
completion's probabilities is clipped as in PPO (which in the paper happened to fewer than 5 % of the completions).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.algorithms.contract import Online, OnlineAlgorithm, OnlineSizes
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import check, setting
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import Array, Maximum, Metric, Metrics, Panel, PartMetrics, PyTree, TrainState
from posttrain_jax.forward.packed_rows import PackedRows
from posttrain_jax.losses.advantages import leave_one_out
from posttrain_jax.losses.ppo import clipped_policy_loss, ratio_max
from posttrain_jax.rollouts.experience import Experience, Networks, experience_of, logps_and_values
from posttrain_jax.rollouts.trajectory import TrajectoryBatch
from posttrain_jax.rollouts.updates import minibatch_updates
from posttrain_jax.run import curves, progress

PROGRESS = progress.ROLLOUTS
PANELS = (
    *curves.ROLLOUTS,
    Panel("clip fraction (share of completions)", ("train/clip_fraction",)),
    Panel("gradient norm", ("train/grad_norm",)),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `rloo` of a config."""

    epochs: int = setting(1, "passes over an iteration's completions", minimum=1)
    minibatches: int = setting(
        1, "updates in a pass; with 1 epoch and 1 minibatch it is REINFORCE", minimum=1
    )
    clip: float = setting(0.2, "how far the ratio of a completion's probabilities may leave 1", above=0)
    kl_coefficient: float = setting(0.05, "beta, of the KL to the reference")

    def __post_init__(self) -> None:
        check(self, "rloo")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithAdvantages:
    """Whole completions: log-probabilities under the policy before the updates, and advantages, `[N]`."""

    logps: Array
    advantages: Array


def with_advantages(experience: Experience, *, samples: int) -> WithAdvantages:
    """Every completion's reward (score and penalty) less the mean of the other completions' to its prompt.

    Args:
      experience: `[N, S]`, the completions of one prompt side by side. Those without a score have an empty mask: they
        are in no baseline, and their own advantage is 0.
      samples: K completions of a prompt.
    """
    learned = experience.mask != 0
    rewards_N = jnp.sum(jnp.where(learned, experience.rewards, 0.0), axis=-1)
    rewards_PK = rewards_N.reshape(-1, samples)
    baselines_PK = leave_one_out(rewards_PK, jnp.any(learned, axis=-1).reshape(-1, samples))
    logps_N = jnp.sum(jnp.where(learned, experience.logps, 0.0), axis=-1)
    return WithAdvantages(logps_N, (rewards_PK - baselines_PK).reshape(-1))


def completion_losses(
    params: PyTree, rows: PackedRows, targets: WithAdvantages, *, networks: Networks, options: Options
) -> tuple[Array, PartMetrics]:
    """Sum of the losses of the completions in packed rows (differentiable), and metrics."""
    logps_RT, _ = logps_and_values(params, rows, networks)
    logps_N, present_N = rows.sums(logps_RT), rows.present()
    output = clipped_policy_loss(logps_N, targets.logps, targets.advantages, present_N, clip=options.clip)
    metrics: PartMetrics = {
        **output.metrics,
        "ratio_max": Maximum(ratio_max(logps_N, targets.logps, present_N)),
    }
    return jnp.sum(output.loss), jax.lax.stop_gradient(metrics)


def train_step(
    state: TrainState,
    batch: TrajectoryBatch,
    *,
    networks: Networks,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
    options: Options,
    samples: int,
) -> tuple[TrainState, Metrics]:
    """One iteration: experience, advantages, then epochs x minibatches of updates."""
    beta = state.opt_state["kl_coefficient"]
    experience, collected = experience_of(combine(state.params, state.frozen), beta, batch, networks=networks)
    targets = with_advantages(experience, samples=samples)
    state, metrics = minibatch_updates(
        state,
        batch,
        experience.mask,
        targets=lambda member_N: targets,
        losses=functools.partial(completion_losses, networks=networks, options=options),
        optimizer=optimizer,
        schedule=schedule,
        ema_decay=ema_decay,
    )
    named = {f"train/{name}": metric for name, metric in collected.items()}
    return state, {**metrics, **named, "train/kl_coefficient": Metric.of(beta)}


def online(options: Options, sizes: OnlineSizes) -> Online:
    """The train step with its options, and what it asks for.

    Raises:
      InputError: prompts with one completion each.
    """
    if sizes.samples < 2:
        raise InputError(
            f"rollout.samples is {sizes.samples}; RLOO compares the completions of a prompt, so it needs 2 or more."
        )
    return Online(
        train_step=functools.partial(train_step, options=options, samples=sizes.samples),
        epochs=options.epochs,
        minibatches=options.minibatches,
        kl_coefficient=options.kl_coefficient,
        progress=PROGRESS,
        panels=PANELS,
    )


ALGORITHM = OnlineAlgorithm(section="rloo", options=Options, online=online)
