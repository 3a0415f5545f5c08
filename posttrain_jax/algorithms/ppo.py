"""PPO: the policy completes prompts, a reward scores the completions, and the policy moves towards what scored well,
with a penalty on its KL to a reference (InstructGPT, arXiv:2203.02155, eq. 2; Ziegler et al. 2019, arXiv:1909.08593).

One iteration is one step of the training loop:
`rollouts/collector.py`: prompts -> trajectories from the engine -> a score each -> log-probabilities of the reference
`train_step`: log-probabilities of the policy, values, a reward per token -> epochs x minibatches, each with advantages
-> clipped losses on packed rows -> gradient sums -> clip, Adam, EMA.
The mathematics is in `losses/ppo.py` and `losses/advantages.py`.

What "The N Implementation Details of RLHF with PPO" (Huang, Liu, von Werra 2023) lists, and where it is done here:

     1  values read prompt and completion together                 `logps_and_values`
     2  padding is never a token: rows carry segment ids           `forward/packed_rows.py`
     3  positions do not count padding                             `PackedRows.positions`
     4  completions end at their EOS; no token after it counts     `Trajectory.response_mask`
     5  learning rate falls to 0                                   `optim.schedule`
     6  logits / temperature wherever log-probabilities are        `Projection.temperature`
     7  the value head, kernel and bias, starts at 0               `ValueNetwork`
     8  no dropout                                                 the transformer has none
     9  truncation at a token; a missing EOS has its score         `rollout.truncate_token`, `score.missing_eos`
    10  no discount (gamma 1)                                      `ppo.gamma`
    11  every epoch shuffles anew; minibatches of micro-batches    `minibatch_updates`
    12  the KL penalty is per token, the score at the last one     `losses/advantages.py`
    13  rewards whitened without moving their mean (biased)        `ppo.whiten_rewards`
    14  advantages whitened per minibatch (biased)                 `ppo.whiten_advantages`
    15  the value's change is clipped                              `ppo.value_clip`
    16  the KL coefficient adapts                                  `ppo.kl_target`, `ppo.kl_horizon`
    17  Adam's epsilon where TensorFlow has it                     `optim.name=adam_tf`
    18  scores normalized to mean 0, variance 1 at the start       `score.normalize`

Not done: a seed of its own for every process (a sample's noise depends on its prompt, so it needs none), and queries
that begin and end at a full stop (prompts are the data's). Its details of the reward model are in `reward_model.py`.

And from its sequel on TL;DR (Huang et al. 2024, arXiv:2403.17031) and from InstructGPT:

    19  the value network starts as the reward model               `ppo.value=MODEL`
    20  a missing EOS makes the score -1 (the EOS trick)           `score.missing_eos=replace`
    21  a moving average of the weights (decay 0.992)              `optim.ema`; `rollout.reference=ema`
    22  pretraining text is learned beside it (PPO-ptx)            `ppo.ptx_*`, `text_losses`
    23  the value network has a learning rate of its own           `ppo.value_lr`
    24  the value network learns first, alone                      `ppo.value_warmup`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.algorithms.contract import Online, OnlineAlgorithm, OnlineSizes, TextOptions
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.masking import masked_sum, shift_left, whiten_biased
from posttrain_jax.core.schema import check, setting
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import (
    Array,
    Batch,
    Maximum,
    Metric,
    Metrics,
    Panel,
    PartMetrics,
    PyTree,
    TrainState,
)
from posttrain_jax.data.options import Source
from posttrain_jax.forward.heads import sum_logps
from posttrain_jax.forward.packed_rows import PackedRows
from posttrain_jax.losses.advantages import gae
from posttrain_jax.losses.kl import adapted_kl_coefficient
from posttrain_jax.losses.logprobs import Projection
from posttrain_jax.losses.ppo import clipped_policy_loss, clipped_value_loss, explained_variance, ratio_max
from posttrain_jax.models.transformer import Model, head_VD
from posttrain_jax.rollouts.experience import (
    Experience,
    Networks,
    experience_of,
    logps_and_values,
    policy_params,
)
from posttrain_jax.rollouts.trajectory import TrajectoryBatch
from posttrain_jax.rollouts.updates import AuxiliaryLoss, minibatch_updates
from posttrain_jax.run import curves, progress

PROGRESS = progress.ROLLOUTS
PANELS = (
    *curves.ROLLOUTS,
    Panel("clip fraction (share of tokens)", ("train/clip_fraction", "train/value_clip_fraction")),
    Panel("explained variance of the returns", ("train/explained_variance",)),
)

VALUE_METRICS = ("returns", "returns_squared", "value_errors", "value_errors_squared")


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `ppo` of a config."""

    epochs: int = setting(4, "passes over an iteration's completions", minimum=1)
    minibatches: int = setting(1, "updates in a pass, each with its own part of the completions", minimum=1)
    clip: float = setting(0.2, "how far the ratio may fall below 1, and rise above it", above=0)
    clip_high: float = setting(0.0, "how far the ratio may rise, where not clip (DAPO: 0.28); 0 = clip")
    dual_clip: float = setting(0.0, "bound of a loss with a negative advantage, above 1; 0 = off")
    value: str = setting(
        "policy", "the value network: policy (a copy of it), shared (a head on its trunk), or a reward MODEL"
    )
    value_lr: float = setting(0.0, "the value network's peak learning rate; 0 = optim.lr")
    value_warmup: int = setting(0, "the value network alone is trained at first", unit="iterations")
    value_clip: float = setting(0.2, "how far a value may move, in the unit of the rewards; 0 = off")
    value_coefficient: float = setting(0.1, "of the value loss")
    gamma: float = setting(1.0, "discount per token", maximum=1)
    lam: float = setting(0.95, "lambda of generalized advantage estimation", maximum=1)
    kl_coefficient: float = setting(0.05, "beta, of the KL to the reference (where it starts)")
    kl_target: float = setting(
        0.0, "the KL that beta is adapted to; 0 = beta stays", unit="nats per sequence"
    )
    kl_horizon: float = setting(10_000.0, "in which beta adapts by about 20 %", unit="completions", above=0)
    whiten_rewards: bool = setting(False, "rewards of a minibatch get variance 1")
    whiten_advantages: bool = setting(True, "advantages of a minibatch get mean 0 and variance 1")
    ptx_coefficient: float = setting(0.0, "of the pretraining loss (InstructGPT: 27.8); 0 = off")
    ptx_data: Source = setting("", "pretraining text, as data.train of SFT")
    ptx_rows: int = setting(0, "packed rows of text in an iteration (InstructGPT: 8 for each completion)")
    ptx_length: int = setting(0, "tokens in such a row; 0 = data.max_length")

    def __post_init__(self) -> None:
        check(self, "ppo")
        if self.dual_clip and not self.dual_clip > 1:
            raise InputError(f"ppo.dual_clip is {self.dual_clip}; it must be more than 1, or 0 (off).")
        if self.kl_target and not self.kl_coefficient:
            raise InputError(
                "ppo.kl_target adapts the KL coefficient by a factor, and ppo.kl_coefficient is 0; set where it "
                "starts."
            )
        if self.value == "none":
            raise InputError(
                "ppo.value is none, but PPO's advantages need values; use policy, shared or a MODEL."
            )
        if self.ptx_coefficient and not self.ptx_data:
            raise InputError("ppo.ptx_coefficient mixes pretraining text in, but ppo.ptx_data names none.")
        if self.ptx_data and not self.ptx_coefficient:
            raise InputError(
                "ppo.ptx_data names pretraining text, but ppo.ptx_coefficient is 0, so nothing is learned from it."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What a minibatch's tokens are moved towards, `[N, S]` (see `Experience`)."""

    logps: Array
    values: Array
    advantages: Array
    returns: Array


def targets_of(member_N: Array, experience: Experience, *, options: Options) -> Targets:
    """Advantages and returns of a minibatch (lm-human-preferences, `PPOTrainer.loss`).

    Args:
      member_N: which trajectories are in it.
      experience: of all.
      options: which whitening.
    """
    mask_NS = experience.mask * member_N[:, None]
    rewards_NS = experience.rewards
    if options.whiten_rewards:
        rewards_NS = whiten_biased(rewards_NS, mask_NS, shift_mean=False)
    estimates = gae(rewards_NS, experience.values, mask_NS, gamma=options.gamma, lam=options.lam)
    advantages_NS = estimates.advantages_BT
    if options.whiten_advantages:
        advantages_NS = whiten_biased(advantages_NS, mask_NS, shift_mean=True)
    return Targets(experience.logps, experience.values, advantages_NS, estimates.returns_BT)


def token_losses(
    params: PyTree, rows: PackedRows, targets: Targets, *, networks: Networks, options: Options
) -> tuple[Array, PartMetrics]:
    """Sum over the tokens of packed rows of policy loss and value loss (differentiable), and metrics."""
    logps_RT, values_RT = logps_and_values(params, rows, networks)
    old_logps_RT, old_values_RT = rows.at_targets(targets.logps), rows.at_targets(targets.values)
    returns_RT = rows.at_targets(targets.returns)
    policy = clipped_policy_loss(
        logps_RT,
        old_logps_RT,
        rows.at_targets(targets.advantages),
        rows.mask,
        clip=options.clip,
        clip_high=options.clip_high or None,
        dual_clip=options.dual_clip or None,
    )
    value = clipped_value_loss(values_RT, old_values_RT, returns_RT, rows.mask, clip=options.value_clip)
    total = jnp.sum(policy.loss) + options.value_coefficient * jnp.sum(value.loss)
    advantages_RT = returns_RT - old_values_RT  # before whitening
    metrics: PartMetrics = {
        **value.metrics,
        **policy.metrics,
        "policy_loss": policy.metrics["loss"],
        "value_loss": value.metrics["loss"],
        "loss": Metric(total, policy.count),
        "ratio_max": Maximum(ratio_max(logps_RT, old_logps_RT, rows.mask)),
        "advantages": Metric(masked_sum(advantages_RT, rows.mask), policy.count),
        "advantages_squared": Metric(masked_sum(jnp.square(advantages_RT), rows.mask), policy.count),
    }
    return total, jax.lax.stop_gradient(metrics)


def text_losses(params: PyTree, batch: Batch, *, model: Model) -> tuple[Array, Metrics]:
    """Sum of the negative log-likelihoods of packed pretraining text `[B, T]` (differentiable), and its metric."""
    policy = policy_params(params)
    output = model.apply(
        policy,
        batch.tokens,
        segment_ids_BT=batch.segment_ids,
        positions_BT=batch.positions,
        logits=False,
    )
    mask_BT = shift_left(batch.loss_mask)
    projection = Projection(softcap=model.config.logits_softcap)
    total, _, _ = sum_logps(output.hidden_BTD, head_VD(policy), shift_left(batch.tokens), mask_BT, projection)
    count = jnp.sum(mask_BT != 0, dtype=jnp.float32)
    return -total, {"pretraining_loss": Metric(jax.lax.stop_gradient(-total), count)}


def train_step(
    state: TrainState,
    batch: TrajectoryBatch,
    *,
    networks: Networks,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
    options: Options,
) -> tuple[TrainState, Metrics]:
    """One iteration: experience, then epochs x minibatches of updates, then the KL coefficient.

    Args:
      state: `opt_state` holds the optimizer's and `kl_coefficient`.
      batch: this iteration's trajectories; `auxiliary` is pretraining text where that is mixed in.
      networks: policy and value network.
      optimizer, schedule, ema_decay: as everywhere.
      options: PPO's numbers.
    """
    beta = state.opt_state["kl_coefficient"]
    experience, collected = experience_of(combine(state.params, state.frozen), beta, batch, networks=networks)
    auxiliary = None
    if options.ptx_coefficient:
        losses = functools.partial(text_losses, model=networks.policy)
        auxiliary = AuxiliaryLoss(batch.auxiliary, losses, "pretraining_loss", options.ptx_coefficient)
    state, metrics = minibatch_updates(
        state,
        batch,
        experience.mask,
        targets=functools.partial(targets_of, experience=experience, options=options),
        losses=functools.partial(token_losses, networks=networks, options=options),
        optimizer=optimizer,
        schedule=schedule,
        ema_decay=ema_decay,
        auxiliary=auxiliary,
    )
    explained = explained_variance({name: metrics[f"train/{name}"] for name in VALUE_METRICS})
    # Where all returns are one number there is none; a metric that counts nothing is not logged.
    known = jnp.isfinite(explained)
    metrics |= {
        "train/explained_variance": Metric(jnp.where(known, explained, 0.0), known.astype(jnp.float32)),
        "train/returns_std": _deviation(metrics, "returns"),
        "train/advantages_std": _deviation(metrics, "advantages"),
        "train/kl_coefficient": Metric.of(beta),
    }
    metrics = {name: metric for name, metric in metrics.items() if not name.endswith("_squared")}
    metrics |= {f"train/{name}": metric for name, metric in collected.items()}
    if options.kl_target:
        kl = collected["kl_per_sequence"]
        adapted = adapted_kl_coefficient(
            beta,
            kl.sum / kl.count,
            target=options.kl_target,
            horizon=options.kl_horizon,
            episodes=batch.tokens.shape[0],
        )
        # While the value network learns alone, the policy does not move.
        adapted = jnp.where(state.step > options.value_warmup, adapted, beta)
        state = dataclasses.replace(state, opt_state={**state.opt_state, "kl_coefficient": adapted})
    return state, metrics


def _deviation(metrics: Metrics, name: str) -> Metric:
    """Standard deviation, from the means of a number and of its square; it counts nothing where they do."""
    first, second = metrics[f"train/{name}"], metrics[f"train/{name}_squared"]
    count = jnp.maximum(second.count, 1.0)
    variance = second.sum / count - jnp.square(first.sum / count)
    return Metric(jnp.sqrt(jnp.maximum(variance, 0.0)), (second.count > 0).astype(jnp.float32))


def online(options: Options, sizes: OnlineSizes) -> Online:
    """The train step with its options, and what it asks for.

    Raises:
      InputError: the KL coefficient could become negative.
    """
    completions = sizes.prompts * sizes.samples
    if options.kl_target and completions >= 5 * options.kl_horizon:
        raise InputError(
            f"ppo.kl_horizon is {options.kl_horizon:g} completions, and an iteration has {completions}: the KL "
            f"coefficient could become negative; use a horizon above {completions / 5:g}."
        )
    text = None
    if options.ptx_coefficient:
        text = TextOptions(options.ptx_data, options.ptx_rows, options.ptx_length or sizes.max_length)
    return Online(
        train_step=functools.partial(train_step, options=options),
        epochs=options.epochs,
        minibatches=options.minibatches,
        kl_coefficient=options.kl_coefficient,
        progress=PROGRESS,
        panels=PANELS,
        value=options.value,
        value_lr=options.value_lr,
        value_warmup=options.value_warmup,
        text=text,
    )


ALGORITHM = OnlineAlgorithm(section="ppo", options=Options, online=online)
