"""What is learnt from: scored answers, with log-probabilities of policy and reference, values, rewards per token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from posttrain_jax.core.masking import masked_sum, shift_left
from posttrain_jax.core.trees import partition
from posttrain_jax.core.types import Array, Maximum, Metric, Metrics, PyTree
from posttrain_jax.core.updates import map_micro_batches
from posttrain_jax.forward.heads import token_logps
from posttrain_jax.losses.advantages import per_token_rewards
from posttrain_jax.losses.kl import k1, k2, k3
from posttrain_jax.losses.logprobs import Projection
from posttrain_jax.models.reward_head import scores
from posttrain_jax.models.transformer import Model, head_VD
from posttrain_jax.rollouts.draw import RolloutBatch


@dataclasses.dataclass(frozen=True)
class Networks:
    """The definitions, and the temperature that answers are drawn at.

    Attributes:
      policy: what answers.
      reference: what the KL is measured to; the policy's definition without adapters where these are left out.
      value: None = no values (a leave-one-out baseline); the policy's own where the trunk is shared.
      temperature: logits are divided by it.
    """

    policy: Model
    reference: Model
    value: Model | None
    temperature: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """An iteration's answers, `[M, B, T]`; a token's numbers stand at the place that predicts it.

    Attributes:
      tokens, segment_ids: as in `Rollouts`.
      response_mask: as in `Rollouts`, and 0 everywhere in a completion that has no score: nothing is learnt from it,
        and it is in no mean, deviation or baseline of the others.
      logps: of the policy that drew the tokens, as the trainer computes them.
      values: of the states before the tokens; 0 without a value network.
      rewards: -beta k1 of every token, and the score at the last one.
    """

    tokens: Array
    segment_ids: Array
    response_mask: Array
    logps: Array
    values: Array
    rewards: Array


Rows = RolloutBatch | Experience


def logps_and_values(params: PyTree, rows: Rows, networks: Networks) -> tuple[Array, Array]:
    """Log-probabilities of the answers' tokens and values of the states before them, `[B, T]` float32 each.

    Args:
      params: the policy's, with the value network (or, on a shared trunk, its head alone) under "value".
      rows: `[B, T]`.
      networks: the definitions.
    """
    hidden_BTD = _hidden(params, rows, networks.policy)
    logps_BT = _logps(params, hidden_BTD, rows, networks.policy, networks.temperature)
    if networks.value is None:
        return logps_BT, jnp.zeros_like(logps_BT)
    if "embed" in params["value"]:
        hidden_BTD = _hidden(params["value"], rows, networks.value)
    values_BT = scores(params["value"]["score_head"], hidden_BTD, _places(rows))
    return logps_BT, jnp.where(rows.response_mask != 0, values_BT, 0.0)


def policy_params(params: PyTree) -> PyTree:
    """Whole parameters without the value network's."""
    return {name: part for name, part in params.items() if name != "value"}


def _places(rows: Rows) -> Array:
    return jnp.broadcast_to(jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None], rows.tokens.shape)


def _hidden(params: PyTree, rows: Rows, model: Model) -> Array:
    return model.apply(
        policy_params(params),
        rows.tokens,
        segment_ids_BT=rows.segment_ids,
        positions_BT=_places(rows),
        logits=False,
    ).hidden_BTD


def _logps(params: PyTree, hidden_BTD: Array, rows: Rows, model: Model, temperature: float) -> Array:
    projection = Projection(softcap=model.config.logits_softcap, temperature=temperature)
    return token_logps(hidden_BTD, head_VD(params), shift_left(rows.tokens), rows.response_mask, projection)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Of rows `[M, B, T]`."""

    logps: Array
    reference: Array
    values: Array
    rewards: Array


def experience_of(
    params: PyTree,
    kl_coefficient: Array,
    batch: RolloutBatch,
    reference_params: PyTree,
    *,
    networks: Networks,
) -> tuple[Experience, Metrics]:
    """Scored answers `[M, B, T]` -> what is learnt from, and what is said of them, without gradient.

    Args:
      params: policy and value, whole.
      kl_coefficient: beta, scalar.
      batch: rows, with their scores.
      reference_params: {} = the policy's without its LoRA adapter.
      networks: the definitions.
    """

    def of_rows(rows: RolloutBatch) -> tuple[Array, Array, Array, Array]:
        logps_BT, values_BT = logps_and_values(params, rows, networks)
        reference = reference_params or partition(params, _is_adapter)[1]
        hidden_BTD = _hidden(reference, rows, networks.reference)
        reference_BT = _logps(reference, hidden_BTD, rows, networks.reference, networks.temperature)
        rewards_BT = per_token_rewards(
            rows.scores[:, 0],
            logps_BT,
            reference_BT,
            rows.response_mask,
            kl_coefficient=kl_coefficient,
            score_at_B=rows.last_token_index[:, 0] - 1,
        )
        return logps_BT, reference_BT, values_BT, rewards_BT

    found = _Found(*map_micro_batches(of_rows, batch, jnp.int32(batch.tokens.shape[0])))
    experience = Experience(
        tokens=batch.tokens,
        segment_ids=batch.segment_ids,
        response_mask=batch.response_mask * batch.has_score,
        logps=found.logps,
        values=found.values,
        rewards=found.rewards,
    )
    return experience, _metrics(batch, found, kl_coefficient)


def _is_adapter(path: str) -> bool:
    return path.endswith(("lora_a", "lora_b"))


def _metrics(batch: RolloutBatch, found: _Found, kl_coefficient: Array) -> Metrics:
    """Per answer that has a score: score, reward; per answer: the three estimates of the KL, tokens; per token: entropy
    (the mean of -log pi of what was drawn, an unbiased estimate for the distribution drawn from); the largest and the
    mean gap between the engine's log-probability of a token and the trainer's."""
    acts = batch.response_mask != 0
    answers, drawn = jnp.float32(batch.scores.size), jnp.sum(acts, dtype=jnp.float32)
    scored = jnp.sum(batch.has_score, dtype=jnp.float32)

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(acts, values, 0.0))

    pair = found.logps, found.reference
    gaps = jnp.where(acts, jnp.abs(found.logps - batch.sampler_logps), 0.0)
    return {
        "score": Metric(masked_sum(batch.scores, batch.has_score), scored),
        "reward_per_sequence": Metric(total(found.rewards * batch.has_score), scored),
        "kl_per_sequence": Metric(total(k1(*pair)), answers),
        "kl_per_token": Metric(total(k1(*pair)), drawn),
        "kl_k2_per_sequence": Metric(total(k2(*pair)), answers),
        "kl_k3_per_sequence": Metric(total(k3(*pair)), answers),
        "kl_coefficient": Metric.of(kl_coefficient),
        "entropy_per_token": Metric(-total(found.logps), drawn),
        "completion_tokens": Metric(drawn, answers),
        "tokens": Metric.of(jnp.sum(batch.segment_ids != 0, dtype=jnp.float32)),
        "sampler_logp_gap_max": Maximum(jnp.max(gaps)).as_metric(),
        "sampler_logp_gap_per_token": Metric(jnp.sum(gaps), drawn),
    }
