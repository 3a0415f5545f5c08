"""What an iteration learns from besides its trajectories: log-probabilities of the policy that it starts from, values,
and a reward for every token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from posttrain_jax.core.masking import masked_sum
from posttrain_jax.core.types import Array, Maximum, Metric, Metrics, PyTree
from posttrain_jax.core.updates import map_micro_batches, used_micro_batches
from posttrain_jax.forward.packed_rows import (
    PackedRows,
    every_index,
    hidden_states,
    packed_rows,
    scatter,
    target_logps,
)
from posttrain_jax.losses.advantages import per_token_rewards
from posttrain_jax.losses.kl import k1, k2, k3
from posttrain_jax.models.reward_head import scores
from posttrain_jax.models.transformer import Model
from posttrain_jax.rollouts.trajectory import TrajectoryBatch


@dataclasses.dataclass(frozen=True)
class Networks:
    """What is trained, and the temperature of the sampling.

    Attributes:
      policy: its definition.
      value: the value network's; None = no values. The policy's own where the trunk is shared.
      temperature: logits are divided by it.
    """

    policy: Model
    value: Model | None
    temperature: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """Of N trajectories, `[N, S]`; a token's numbers stand at the token.

    Attributes:
      mask: int32, 1 on the tokens that are learned from: those that the policy sampled, in trajectories with a score.
        The others are in no mean, deviation or baseline.
      logps: of the policy before this iteration's updates, as the trainer computes them.
      values: of the states before the tokens; 0 without a value network.
      rewards: -beta k1 of every token, and the score at the last one.
    """

    mask: Array
    logps: Array
    values: Array
    rewards: Array


def policy_params(params: PyTree) -> PyTree:
    """Whole parameters without the value network's."""
    return {name: part for name, part in params.items() if name != "value"}


def logps_and_values(params: PyTree, rows: PackedRows, networks: Networks) -> tuple[Array, Array]:
    """Log-probabilities of the rows' targets, and values of the states before them, float32 `[R, T]` each.

    Args:
      params: the policy's, with the value network (or, on a shared trunk, its head alone) under "value".
      rows: packed trajectories.
      networks: the definitions.
    """
    policy = policy_params(params)
    hidden_RTD = hidden_states(policy, rows, networks.policy)
    logps_RT = target_logps(policy, hidden_RTD, rows, networks.policy, networks.temperature)
    if networks.value is None:
        return logps_RT, jnp.zeros_like(logps_RT)
    if "embed" in params["value"]:
        hidden_RTD = hidden_states(params["value"], rows, networks.value)
    values_RT = scores(params["value"]["score_head"], hidden_RTD, every_index(rows.tokens))
    return logps_RT, jnp.where(rows.mask != 0, values_RT, 0.0)


def experience_of(
    params: PyTree, kl_coefficient: Array, batch: TrajectoryBatch, *, networks: Networks
) -> tuple[Experience, Metrics]:
    """Scored trajectories -> what is learned from, and metrics of them (without a prefix); no gradient.

    The log-probabilities are computed in the rows of the first epoch's minibatches: in bfloat16 a token's depends on
    its place in a row, and so the first update of every trajectory begins at a ratio of 1.

    Args:
      params: policy and value network, whole.
      kl_coefficient: beta, scalar; not used without a reference.
      batch: an iteration's trajectories.
      networks: the definitions.
    """
    shape, size = batch.tokens.shape, batch.tokens.size

    def of_minibatch(indices_MRT: Array) -> tuple[Array, Array]:
        def of_rows(indices_RT: Array) -> tuple[Array, Array]:
            rows = packed_rows(indices_RT, batch.tokens, batch.response_mask)
            return logps_and_values(params, rows, networks)

        return map_micro_batches(of_rows, indices_MRT, used_micro_batches(indices_MRT < size))

    first_epoch_KMRT = batch.indices[0]
    logps_KMRT, values_KMRT = jax.lax.map(of_minibatch, first_epoch_KMRT)
    counted_KMRT = packed_rows(first_epoch_KMRT, batch.tokens, batch.response_mask).mask
    logps = scatter(logps_KMRT, first_epoch_KMRT, counted_KMRT, shape)
    values = scatter(values_KMRT, first_epoch_KMRT, counted_KMRT, shape)
    reference_logps = logps if batch.reference_logps is None else batch.reference_logps
    rewards = per_token_rewards(
        batch.scores, logps, reference_logps, batch.response_mask, kl_coefficient=kl_coefficient
    )
    experience = Experience(batch.response_mask * batch.has_score[:, None], logps, values, rewards)
    return experience, _metrics(batch, experience)


def _metrics(batch: TrajectoryBatch, experience: Experience) -> Metrics:
    """Per trajectory with a score: score and reward; per trajectory: tokens, and the estimates of the KL to the
    reference; per token: entropy (the mean of -log pi of what was sampled, an unbiased estimate for the distribution
    sampled from), KL, and the gap between the sampler's log-probability and the trainer's."""
    sampled = batch.response_mask != 0
    trajectories = jnp.sum(jnp.any(sampled, axis=-1), dtype=jnp.float32)
    tokens = jnp.sum(sampled, dtype=jnp.float32)
    scored = jnp.sum(batch.has_score, dtype=jnp.float32)
    filled = batch.indices[0] < batch.tokens.size

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(sampled, values, 0.0))

    gaps = jnp.where(sampled, jnp.abs(experience.logps - batch.sampler_logps), 0.0)
    metrics = {
        "score": Metric(masked_sum(batch.scores, batch.has_score), scored),
        "reward_per_sequence": Metric(total(experience.rewards * batch.has_score[:, None]), scored),
        "entropy_per_token": Metric(-total(experience.logps), tokens),
        "completion_tokens": Metric(tokens, trajectories),
        "tokens": Metric.of(jnp.sum(filled, dtype=jnp.float32)),
        "sampler_logp_gap_max": Maximum(jnp.max(gaps)).as_metric(),
        "sampler_logp_gap_per_token": Metric(jnp.sum(gaps), tokens),
    }
    if batch.reference_logps is None:
        return metrics
    pair = experience.logps, batch.reference_logps
    return metrics | {
        "kl_per_sequence": Metric(total(k1(*pair)), trajectories),
        "kl_per_token": Metric(total(k1(*pair)), tokens),
        "kl_k2_per_sequence": Metric(total(k2(*pair)), trajectories),
        "kl_k3_per_sequence": Metric(total(k3(*pair)), trajectories),
    }
