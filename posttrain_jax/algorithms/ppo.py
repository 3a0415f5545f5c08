"""PPO: the policy answers prompts, a reward scores the answers, and the policy moves towards what scored well while the
KL to where it started is charged for (InstructGPT, arXiv:2203.02155, eq. 2; Ziegler et al. 2019, arXiv:1909.08593).

An iteration, from top to bottom (the first line is `algorithms/online.py`):
prompts -> answers from the engine -> a score each -> log-probabilities of policy and reference, values, token rewards
-> `train_step`: epochs x minibatches, each with advantages -> clipped losses -> gradient sums -> clip, Adam, EMA.
One iteration is one step of the training loop.

What "The N Implementation Details of RLHF with PPO" (Huang, Liu, von Werra 2023) lists, and where it is done here:

     1  values read prompt and answer together                     `experience_of`
     2  padding is never a token: rows carry segment ids           `rollouts/draw.py`
     3  positions do not count padding                             rows are padded on the right
     4  answers end at their end token; no token after it counts   `Rollouts.response_mask`
     5  learning rate falls to 0                                   `optim.schedule`
     6  logits / temperature wherever log-probabilities are        `Projection.temperature`
     7  the value head, kernel and bias, starts at 0               `ValueNetwork`
     8  no dropout                                                 the transformer has none
     9  truncation at a token; a missing end token has its score   `rollout.truncate_token`, `score.missing_eos`
    10  no discount (gamma 1)                                      `ppo.gamma`
    11  every epoch shuffles anew; minibatches of micro-batches    `train_step`
    12  the KL is charged per token, the score at the last one     `losses/advantages.py`
    13  rewards whitened without moving their mean (biased)        `ppo.whiten_rewards`
    14  advantages whitened per minibatch (biased)                 `ppo.whiten_advantages`
    15  the value's change is clipped                              `ppo.value_clip`
    16  the KL's price adapts                                      `ppo.kl_target`, `ppo.kl_horizon`
    17  Adam's epsilon where TensorFlow has it                     `optim.name=adam_tf`
    18  scores normalized to mean 0, variance 1 at the start       `score.normalize`

Not done: a seed of its own for every process (a sample's noise depends on its prompt, so it needs none), and queries
that begin and end at a full stop (prompts are the data's). Its details of the reward model are in `reward_model.py`.

And from its sequel on TL;DR (Huang et al. 2024, arXiv:2403.17031) and from InstructGPT:

    19  the value network starts as the reward model               `ppo.value=MODEL`
    20  a missing end token makes the score -1 (the EOS trick)     `score.missing_eos=replace`
    21  a moving average of the weights (decay 0.992)              `optim.ema`; `rollout.reference=ema`
    22  pretraining text is learnt beside the answers (PPO-ptx)    `ppo.ptx_*`, `algorithms/pretraining.py`
    23  the value network has a learning rate of its own           `ppo.value_lr`
    24  the value network learns first, alone                      `ppo.value_warmup`
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

from posttrain_jax.algorithms.online import Mixed, Online, minibatch_updates, online_task
from posttrain_jax.algorithms.pretraining import pretraining_from_config, pretraining_losses
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.masking import masked_sum, whiten_biased
from posttrain_jax.core.types import Array, Maximum, Metric, Metrics, PartMetrics, PyTree, Task, TrainState
from posttrain_jax.losses.advantages import gae
from posttrain_jax.losses.kl import adapted_kl_coefficient
from posttrain_jax.losses.ppo import clipped_policy_loss, clipped_value_loss, explained_variance, ratio_max
from posttrain_jax.rollouts.experience import Experience, Networks, logps_and_values
from posttrain_jax.wiring.experiment import mesh_from_config, model_spec_from_config

VALUE_METRICS = ("returns", "returns_squared", "value_errors", "value_errors_squared")


@dataclasses.dataclass(frozen=True)
class Options:
    """PPO's numbers.

    Attributes:
      epochs, minibatches: passes over an iteration's answers, and into how many parts each is cut.
      clip, clip_high: the ratio is held between 1 - clip and 1 + clip_high (0 = clip).
      dual_clip: above 1 it bounds the loss of negative advantages (0 = off).
      value_clip: how far a value may move from the one that was acted on (0 = off).
      value_coefficient: of the value's loss.
      gamma, lam: discount, and GAE's lambda.
      kl_coefficient: beta at the start; adapted where `kl_target` (nats per answer) is more than 0, over
        `kl_horizon` answers.
      value_warmup: iterations in which the value network alone is trained, and beta is not adapted.
      whiten_rewards, whiten_advantages: per minibatch.
      ptx_coefficient: gamma of the pretraining text's mean loss (0 = none).
    """

    epochs: int
    minibatches: int
    clip: float
    clip_high: float
    dual_clip: float
    value_clip: float
    value_coefficient: float
    gamma: float
    lam: float
    kl_coefficient: float
    kl_target: float
    kl_horizon: float
    value_warmup: int
    whiten_rewards: bool
    whiten_advantages: bool
    ptx_coefficient: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """Answers with what their tokens are to be moved towards, `[N, T]`."""

    rows: Experience
    advantages: Array
    returns: Array


def targets_of(minibatch: Experience, *, options: Options) -> Targets:
    """Advantages and returns of a minibatch (lm-human-preferences, `PPOTrainer.loss`)."""
    rewards_NT = minibatch.rewards
    if options.whiten_rewards:
        rewards_NT = whiten_biased(rewards_NT, minibatch.response_mask, shift_mean=False)
    found = gae(rewards_NT, minibatch.values, minibatch.response_mask, gamma=options.gamma, lam=options.lam)
    advantages_NT = found.advantages_BT
    if options.whiten_advantages:
        advantages_NT = whiten_biased(advantages_NT, minibatch.response_mask, shift_mean=True)
    return Targets(minibatch, advantages_NT, found.returns_BT)


def token_losses(
    params: PyTree, targets: Targets, *, networks: Networks, options: Options
) -> tuple[Array, PartMetrics]:
    """Sum over the answers' tokens of policy loss and value loss (differentiable), and metrics, of `[B, T]`."""
    rows = targets.rows
    logps_BT, values_BT = logps_and_values(params, rows, networks)
    policy = clipped_policy_loss(
        logps_BT,
        rows.logps,
        targets.advantages,
        rows.response_mask,
        clip=options.clip,
        clip_high=options.clip_high or None,
        dual_clip=options.dual_clip or None,
    )
    value = clipped_value_loss(
        values_BT, rows.values, targets.returns, rows.response_mask, clip=options.value_clip
    )
    total = jnp.sum(policy.loss) + options.value_coefficient * jnp.sum(value.loss)
    advantages_BT = targets.returns - rows.values  # before whitening
    metrics: PartMetrics = {
        **value.metrics,
        **policy.metrics,
        "policy_loss": policy.metrics["loss"],
        "value_loss": value.metrics["loss"],
        "loss": Metric(total, policy.count),
        "ratio_max": Maximum(ratio_max(logps_BT, rows.logps, rows.response_mask)),
        "advantages": Metric(masked_sum(advantages_BT, rows.response_mask), policy.count),
        "advantages_squared": Metric(masked_sum(jnp.square(advantages_BT), rows.response_mask), policy.count),
    }
    return total, jax.lax.stop_gradient(metrics)


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
    """One iteration on `[M, B, T]`: epochs x minibatches, each an update; then the KL's price.

    Args:
      state: `opt_state` holds the optimizer's and `kl_coefficient`.
      experience: of this iteration's answers.
      kl: nats per answer, of these answers.
      pretraining: packed text, a `Batch` `[M', B', T']`; {} where none is mixed in.
    """
    mixed = None
    if options.ptx_coefficient:
        losses = functools.partial(pretraining_losses, model=networks.policy)
        mixed = Mixed(pretraining, losses, "pretraining_loss", options.ptx_coefficient)
    state, metrics = minibatch_updates(
        state,
        experience,
        epochs=options.epochs,
        minibatches=options.minibatches,
        targets=functools.partial(targets_of, options=options),
        losses=functools.partial(token_losses, networks=networks, options=options),
        optimizer=optimizer,
        schedule=schedule,
        ema_decay=ema_decay,
        mixed=mixed,
    )
    explained = explained_variance({name: metrics[f"train/{name}"] for name in VALUE_METRICS})
    # Where all returns are one number there is none; a metric that counts nothing is not logged.
    known = jnp.isfinite(explained)
    metrics |= {
        "train/explained_variance": Metric(jnp.where(known, explained, 0.0), known.astype(jnp.float32)),
        "train/returns_std": Metric.of(_deviation(metrics, "returns")),
        "train/advantages_std": Metric.of(_deviation(metrics, "advantages")),
    }
    metrics = {name: metric for name, metric in metrics.items() if not name.endswith("_squared")}
    if options.kl_target:
        before = state.opt_state["kl_coefficient"]
        coefficient = adapted_kl_coefficient(
            before,
            kl,
            target=options.kl_target,
            horizon=options.kl_horizon,
            episodes=experience.tokens.shape[0] * experience.tokens.shape[1],
        )
        coefficient = jnp.where(state.step > options.value_warmup, coefficient, before)
        state = dataclasses.replace(state, opt_state={**state.opt_state, "kl_coefficient": coefficient})
    return state, metrics


def _deviation(metrics: Metrics, name: str) -> Array:
    """Standard deviation, from the means of a number and of its square."""
    first, second = metrics[f"train/{name}"], metrics[f"train/{name}_squared"]
    variance = second.sum / second.count - jnp.square(first.sum / first.count)
    return jnp.sqrt(jnp.maximum(variance, 0.0))


def from_config(config: Config, workdir: Path) -> Task:
    """Everything the training loop needs, from an experiment's config.

    Raises:
      InputError: a bad value, a bad prompt, a model or a reward that cannot be used.
    """
    options = options_from_config(config)
    mesh = mesh_from_config(config)
    policy = model_spec_from_config(config)
    if config.ppo.value == "none":
        raise InputError(
            "ppo.value is none, but PPO's advantages need values; use policy, shared or a MODEL."
        )
    online = Online(
        train_step=functools.partial(train_step, options=options),
        updates=options.epochs * options.minibatches,
        minibatches=options.minibatches,
        value=config.ppo.value,
        kl_coefficient=options.kl_coefficient,
        value_lr=config.ppo.value_lr,
        value_warmup=config.ppo.value_warmup,
        pretraining=pretraining_from_config(config, policy, mesh, workdir, minibatches=options.minibatches),
    )
    return online_task(config, workdir, policy, mesh, online)


def options_from_config(config: Config) -> Options:
    """PPO's numbers.

    Raises:
      InputError: a number out of its range.
    """
    ppo = config.ppo
    positive = {
        "epochs": ppo.epochs,
        "minibatches": ppo.minibatches,
        "clip": ppo.clip,
        "kl_horizon": ppo.kl_horizon,
    }
    for name, value in positive.items():
        if not value > 0:
            raise InputError(f"ppo.{name} is {value}; it must be more than 0.")
    not_negative = {
        "kl_coefficient": ppo.kl_coefficient,
        "kl_target": ppo.kl_target,
        "clip_high": ppo.clip_high,
        "value_clip": ppo.value_clip,
        "value_coefficient": ppo.value_coefficient,
        "value_lr": ppo.value_lr,
        "value_warmup": ppo.value_warmup,
        "ptx_coefficient": ppo.ptx_coefficient,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise InputError(f"ppo.{name} is {value}; it must be 0 or more.")
    for name, value in {"gamma": ppo.gamma, "lam": ppo.lam}.items():
        if not 0 <= value <= 1:
            raise InputError(f"ppo.{name} is {value}; it must lie between 0 and 1.")
    rows = config.train.rows_per_step * config.rollout.samples
    if ppo.kl_target and not ppo.kl_coefficient:
        raise InputError(
            "ppo.kl_target adapts the KL coefficient by a factor, and ppo.kl_coefficient is 0; set where it starts."
        )
    if ppo.kl_target and rows >= 5 * ppo.kl_horizon:
        raise InputError(
            f"ppo.kl_horizon is {ppo.kl_horizon:g} answers, and an iteration has {rows}: the KL coefficient could "
            f"become negative; use a horizon above {rows / 5:g}."
        )
    if ppo.dual_clip and not ppo.dual_clip > 1:
        raise InputError(f"ppo.dual_clip is {ppo.dual_clip}; it must be more than 1, or 0 (off).")
    return Options(
        epochs=ppo.epochs,
        minibatches=ppo.minibatches,
        clip=ppo.clip,
        clip_high=ppo.clip_high,
        dual_clip=ppo.dual_clip,
        value_clip=ppo.value_clip,
        value_coefficient=ppo.value_coefficient,
        gamma=ppo.gamma,
        lam=ppo.lam,
        kl_target=ppo.kl_target,
        kl_horizon=ppo.kl_horizon,
        kl_coefficient=ppo.kl_coefficient,
        value_warmup=ppo.value_warmup,
        whiten_rewards=ppo.whiten_rewards,
        whiten_advantages=ppo.whiten_advantages,
        ptx_coefficient=ppo.ptx_coefficient,
    )
