"""RLOO: REINFORCE with a leave-one-out baseline (arXiv:2402.14740). Several answers to a prompt are scored, and each is
compared with the mean of the others; there is no value network.

The whole answer is one action: its reward is the score less beta times the sum of its tokens' k1, its log-probability
the sum of its tokens'. With one update an iteration this is REINFORCE; with more, the ratio of the answer's
probabilities is clipped as in PPO (which in the paper happened to fewer than 5 % of the answers).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict as Config

from posttrain_jax.algorithms.online import Online, minibatch_updates, online_task
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.types import Array, Maximum, Metrics, PartMetrics, PyTree, Task, TrainState
from posttrain_jax.losses.advantages import leave_one_out
from posttrain_jax.losses.ppo import clipped_policy_loss, ratio_max
from posttrain_jax.rollouts.experience import Experience, Networks, logps_and_values
from posttrain_jax.wiring.experiment import mesh_from_config, model_spec_from_config


@dataclasses.dataclass(frozen=True)
class Options:
    """RLOO's numbers.

    Attributes:
      samples: answers per prompt, at least 2.
      epochs, minibatches: as in PPO; 1 and 1 = REINFORCE.
      clip: of the ratio of an answer's probabilities.
    """

    samples: int
    epochs: int
    minibatches: int
    clip: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compared:
    """Answers `[..., T]` with their advantages `[...]`."""

    rows: Experience
    advantages: Array


def compared(experience: Experience, *, samples: int) -> Compared:
    """Every answer's reward (score and penalty) less the mean of the other answers' to its prompt.

    Args:
      experience: `[M, B, T]`, the completions of one prompt side by side. Those without a score have an empty
        response mask: they are in no baseline, and their own advantage is 0.
      samples: K.
    """
    acts = experience.response_mask != 0
    rewards = jnp.sum(jnp.where(acts, experience.rewards, 0.0), axis=-1)
    grouped_PK = rewards.reshape(-1, samples)
    baselines_PK = leave_one_out(grouped_PK, jnp.any(acts, axis=-1).reshape(-1, samples))
    return Compared(experience, (grouped_PK - baselines_PK).reshape(rewards.shape))


def answer_losses(
    params: PyTree, part: Compared, *, networks: Networks, options: Options
) -> tuple[Array, PartMetrics]:
    """Sum of the losses of the answers `[B, T]` (differentiable), and metrics."""
    rows = part.rows
    logps_BT, _ = logps_and_values(params, rows, networks)
    acts = rows.response_mask != 0
    present_B = jnp.any(acts, axis=-1)
    logps_B = jnp.sum(jnp.where(acts, logps_BT, 0.0), axis=-1)
    old_logps_B = jnp.sum(jnp.where(acts, rows.logps, 0.0), axis=-1)
    output = clipped_policy_loss(logps_B, old_logps_B, part.advantages, present_B, clip=options.clip)
    metrics = output.metrics | {"ratio_max": Maximum(ratio_max(logps_B, old_logps_B, present_B))}
    return jnp.sum(output.loss), jax.lax.stop_gradient(metrics)


def train_step(
    state: TrainState,
    experience: Experience,
    kl: Array,
    pretraining: PyTree,
    *,
    networks: Networks,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
    options: Options,
) -> tuple[TrainState, Metrics]:
    """One iteration on `[M, B, T]`; beta is fixed and no text is mixed in."""
    del kl, pretraining
    return minibatch_updates(
        state,
        compared(experience, samples=options.samples),
        epochs=options.epochs,
        minibatches=options.minibatches,
        targets=lambda minibatch: minibatch,
        losses=functools.partial(answer_losses, networks=networks, options=options),
        optimizer=optimizer,
        schedule=schedule,
        ema_decay=ema_decay,
    )


def from_config(config: Config, workdir: Path) -> Task:
    """Everything the training loop needs, from an experiment's config.

    Raises:
      InputError: a bad value, a bad prompt, a model or a reward that cannot be used.
    """
    options = options_from_config(config)
    mesh = mesh_from_config(config)
    policy = model_spec_from_config(config)
    online = Online(
        train_step=functools.partial(train_step, options=options),
        updates=options.epochs * options.minibatches,
        minibatches=options.minibatches,
        value="none",
        kl_coefficient=config.rloo.kl_coefficient,
    )
    return online_task(config, workdir, policy, mesh, online)


def options_from_config(config: Config) -> Options:
    """RLOO's numbers.

    Raises:
      InputError: a number out of its range.
    """
    rloo, samples = config.rloo, config.rollout.samples
    for name in ("kl_target", "ptx_coefficient", "value_lr", "value_warmup"):
        if config.ppo[name]:
            raise InputError(
                f"ppo.{name} is {config.ppo[name]:g}, but algorithm=rloo does not look at it; leave it 0."
            )
    if samples < 2:
        raise InputError(
            f"rollout.samples is {samples}; RLOO compares the answers to a prompt, so it needs 2 or more."
        )
    for name, value in {"epochs": rloo.epochs, "minibatches": rloo.minibatches, "clip": rloo.clip}.items():
        if not value > 0:
            raise InputError(f"rloo.{name} is {value}; it must be more than 0.")
    if not rloo.kl_coefficient >= 0:
        raise InputError(f"rloo.kl_coefficient is {rloo.kl_coefficient}; it must be 0 or more.")
    return Options(samples=samples, epochs=rloo.epochs, minibatches=rloo.minibatches, clip=rloo.clip)
