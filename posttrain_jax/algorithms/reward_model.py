"""Reward models: the transformer with a scalar head, trained so that what people preferred scores higher.

The step, from top to bottom: prompts with their completions, packed into rows -> hidden states, the prompt's once ->
the score at every completion's last token -> a loss of `losses/reward.py` over comparisons, rankings or ratings ->
gradient sums over the micro-batches that are not empty -> one division by the global count -> clip, optimiser, EMA.

A comparison loss does not see a constant added to all scores, so after the last step the head's gain and bias are set
by `reward.normalise` and stored with the model: "demonstrations" = the preferred completions score 0 on average
(InstructGPT, arXiv:2203.02155, section 3.5), "unit" = all completions have mean 0 and variance 1 (Ziegler et al. 2019,
arXiv:1909.08593), "none".

An ensemble (`reward.members` above 1) trains k models in one run, vmapped over their parameters: each has a head of
its own draw (and, with LoRA, adapters of its own on one trunk) and its own bootstrap of the prompts (Christiano et al.
2017, arXiv:1706.03741; Coste et al. 2023, arXiv:2310.02743).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config

from posttrain_jax.completions import map_completions, reward_scores
from posttrain_jax.data.loader import eval_batches
from posttrain_jax.data.preference_rows import PreferenceRows
from posttrain_jax.errors import InputError
from posttrain_jax.experiment import (
    Policy,
    Preferences,
    abstract_on_mesh,
    flops_per_token,
    is_trained,
    loader_from_config,
    mesh_from_config,
    micro_batches,
    optimizer_from_config,
    policy_from_config,
    preferences_from_config,
    seed_key,
    steps_from_config,
)
from posttrain_jax.losses import reward as losses
from posttrain_jax.metrics import Accumulator, say, to_host
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import Model
from posttrain_jax.optim import apply_gradients, gradient_sums, map_micro_batches, new_state, used_micro_batches
from posttrain_jax.sharding import batch_sharding, host_data_shards, jit_step, put_batch, replicated
from posttrain_jax.trees import combine, partition
from posttrain_jax.types import Array, LossOutput, Metric, Metrics, PreferenceBatch, PyTree, Task, TrainState

NORMALISE = ("none", "demonstrations", "unit")


@dataclasses.dataclass(frozen=True)
class Options:
    """The loss and its numbers.

    Attributes:
      loss: a name in LOSSES.
      label_smoothing: of "smoothed": how likely a label is wrong.
      centre: coefficient of (r_w + r_l)^2, which keeps scores near 0 (TRL's centre regularisation).
      margin_scale: the data's margins are multiplied by it ("margin").
      members: of the ensemble; 1 = a single model.
      bootstrap: each member counts each prompt as often as it was drawn, with replacement.
      seed: of the draws.
    """

    loss: str
    label_smoothing: float
    centre: float
    margin_scale: float
    members: int
    bootstrap: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of rows and of the two completions of each comparison, and what the losses need beside them."""

    scores_BN: Array
    chosen_BP: Array
    rejected_BP: Array
    weights_BP: Array
    prompt_weights_BN: Array
    batch: PreferenceBatch


def _by_prompt(scored: Scored) -> tuple[Array, Array, Array, Array]:
    """Scores, ranks and presence of each prompt's completions `[B, N, N]` (prompt, completion), and prompts' weights.

    A completion's rank is how many of its prompt were preferred to it.
    """
    batch = scored.batch
    count = batch.ends.shape[1]
    lost = (batch.weights != 0).astype(jnp.int32)
    ranks_BN = jax.vmap(lambda worse, lost: jnp.zeros((count,), jnp.int32).at[worse].add(lost))(batch.worse, lost)
    numbers_N = jnp.arange(1, count + 1)
    mask_BNN = (batch.group_ids[:, None, :] == numbers_N[None, :, None]) & (batch.sequence_ids != 0)[:, None, :]
    tiled = functools.partial(jnp.broadcast_to, shape=mask_BNN.shape)
    weights_BN = jnp.max(jnp.where(mask_BNN, scored.prompt_weights_BN[:, None, :], 0.0), axis=-1)
    return tiled(scored.scores_BN[:, None, :]), tiled(ranks_BN[:, None, :]), mask_BNN, weights_BN


def _kwise(scored: Scored, options: Options) -> LossOutput:
    scores, ranks, mask, weights = _by_prompt(scored)
    return losses.kwise_loss(scores, ranks, mask, weights_B=weights)


def _plackett_luce(scored: Scored, options: Options) -> LossOutput:
    scores, ranks, mask, weights = _by_prompt(scored)
    return losses.plackett_luce_loss(scores, ranks, mask, weights_B=weights)


def _regression(scored: Scored, options: Options) -> LossOutput:
    rated = ~jnp.isnan(scored.batch.ratings) & (scored.batch.sequence_ids != 0)
    weights_BN = jnp.where(rated, scored.prompt_weights_BN, 0.0)
    return losses.regression_loss(scored.scores_BN, scored.batch.ratings, weights_B=weights_BN)


RewardLoss = Callable[[Scored, Options], LossOutput]

LOSSES: dict[str, RewardLoss] = {
    "bradley_terry": lambda s, o: losses.bradley_terry_loss(
        s.chosen_BP, s.rejected_BP, weights_B=s.weights_BP
    ),
    "margin": lambda s, o: losses.margin_loss(
        s.chosen_BP, s.rejected_BP, o.margin_scale * s.batch.margins, weights_B=s.weights_BP
    ),
    "soft_label": lambda s, o: losses.soft_label_loss(
        s.chosen_BP, s.rejected_BP, s.batch.probabilities, weights_B=s.weights_BP
    ),
    "smoothed_label": lambda s, o: losses.smoothed_label_loss(
        s.chosen_BP, s.rejected_BP, label_smoothing=o.label_smoothing, weights_B=s.weights_BP
    ),
    "kwise": _kwise,
    "plackett_luce": _plackett_luce,
    "regression": _regression,
}


def score_losses(scores_BN: Array, batch: PreferenceBatch, counts_BN: Array, options: Options) -> tuple[Array, Metrics]:
    """Sum of the losses of rows `[B, ...]` given their scores (differentiable), and metrics.

    Args:
      scores_BN: of the completions.
      batch: the rows.
      counts_BN: how often this member drew the completion's prompt (1 without a bootstrap).
      options: the loss.
    """

    def gather(values_BN: Array, places_BP: Array) -> Array:
        return jnp.take_along_axis(values_BN, places_BP, axis=1)

    scored = Scored(
        scores_BN=scores_BN,
        chosen_BP=gather(scores_BN, batch.better),
        rejected_BP=gather(scores_BN, batch.worse),
        weights_BP=batch.weights * gather(counts_BN, batch.better),
        prompt_weights_BN=counts_BN,
        batch=batch,
    )
    output = LOSSES[options.loss](scored, options)
    total = jnp.sum(output.loss)
    if options.centre:
        penalty = losses.centre_penalty(
            scored.chosen_BP, scored.rejected_BP, coefficient=options.centre, weights_B=scored.weights_BP
        )
        total = total + jnp.sum(penalty.loss)
    metrics = dict(output.metrics) | {"loss": Metric(total, output.count)}
    return total, jax.lax.stop_gradient(metrics)


def draws_of(batch: PreferenceBatch, member: Array, options: Options) -> Array:
    """How often a member's bootstrap drew each completion's prompt, `[B, N]` float32.

    Poisson(1) counts, the limit of drawing as many prompts as there are with replacement (Oza and Russell 2001), drawn
    from the number of the prompt's first completion, so that they are the same in every epoch and on every mesh.
    """
    if options.members == 1 or not options.bootstrap:
        return jnp.ones(batch.sequence_ids.shape, jnp.float32)
    first_BN = jnp.min(
        jnp.where(
            batch.group_ids[:, :, None] == batch.group_ids[:, None, :],
            batch.sequence_ids[:, None, :],
            jnp.iinfo(jnp.int32).max,
        ),
        axis=-1,
    )
    key = jax.random.fold_in(jax.random.key(options.seed), member)
    keys = jax.vmap(jax.vmap(lambda number: jax.random.fold_in(key, number)))(first_BN)
    return jax.vmap(jax.vmap(lambda k: jax.random.poisson(k, 1.0)))(keys).astype(jnp.float32)


def reward_losses(
    params: PyTree, frozen: PyTree, batch: PreferenceBatch, *, model: Model, options: Options, share_prompt: bool
) -> tuple[Array, Metrics]:
    """Sum over rows `[B, ...]` (and over members) of the loss, and metrics (of an ensemble: means over members)."""

    def one(params: PyTree, member: Array) -> tuple[Array, Metrics]:
        head = params["score_head"]
        fixed = {name: jax.lax.stop_gradient(head[name]) for name in ("gain", "bias")}
        whole = combine({**params, "score_head": {**head, **fixed}}, frozen)
        scores_BN = reward_scores(whole, batch, model=model, share_prompt=share_prompt)
        return score_losses(scores_BN, batch, draws_of(batch, member, options), options)

    if options.members == 1:
        total, metrics = one(params, jnp.int32(0))
    else:
        totals, by_member = jax.vmap(one)(params["members"], jnp.arange(options.members, dtype=jnp.int32))
        # Each member's mean counts alike: sums over members, divided by one member's count on average.
        total = jnp.sum(totals)
        metrics = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), by_member)
        metrics["loss"] = Metric(total / options.members, metrics["loss"].count)
        metrics = jax.lax.stop_gradient(metrics)
    real = jnp.sum(batch.segment_ids != 0, dtype=jnp.float32)
    metrics |= {
        "pairs": Metric(jnp.sum(batch.weights != 0, dtype=jnp.float32), jnp.float32(1)),
        "tokens": Metric(real, jnp.float32(1)),
        "padding_share": Metric(jnp.float32(batch.tokens.size) - real, jnp.float32(batch.tokens.size)),
    }
    return total, metrics
