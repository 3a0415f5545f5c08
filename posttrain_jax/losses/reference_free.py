"""Preference losses without a reference policy: SLiC-HF, SimPO, ORPO, CPO.

The first two arguments are log-probabilities of whole completions in nats, summed over tokens: `policy_chosen_logps_B`
= log pi(y_w|x) and `policy_rejected_logps_B` = log pi(y_l|x); lengths |y| are in tokens, those over which the sums
run. Any shape, the same for all arrays of a call (else ValueError). Weights and metrics are those of `dpo.py`; each
function says what its reward is. s is the logistic function.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from posttrain_jax.core.types import Array, LossOutput
from posttrain_jax.losses.pairs import pair_metrics
from posttrain_jax.losses.weighted_rows import per_token, rows_like

LARGEST_MEAN_LOGP = -1e-6  # above it 1 - p is lost in float32


def log1mexp(values: Array) -> Array:
    """log(1 - exp(x)) for x < 0, without cancellation for x near 0 or far below it."""
    near_zero = values > -0.6931472
    # Each branch gets a value it can bear, so that the gradient of the one not taken is not NaN.
    small = jnp.where(near_zero, values, -0.5)
    large = jnp.where(near_zero, -1.0, values)
    return jnp.where(near_zero, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def slic_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    target_logps_B: Array,
    *,
    delta: float,
    lambda_: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """SLiC-HF: max(0, delta - log pi(y_w) + log pi(y_l)) - lambda log pi(y_ref); gradient of the hinge 0 at its kink.

    arXiv:2305.10425, eq. 1. `target_logps_B` = log pi(y_ref|x), the completion that the policy is kept close to (the
    supervised target, or the chosen completion). delta in nats. Reward: log pi(y|x).
    """
    rows = rows_like(policy_chosen_logps_B, weights_B)
    chosen_B = rows.keep(policy_chosen_logps_B)
    rejected_B = rows.keep(policy_rejected_logps_B)
    loss_B = jax.nn.relu(delta - chosen_B + rejected_B) - lambda_ * rows.keep(target_logps_B)
    return rows.output(loss_B, pair_metrics(rows, chosen_B, rejected_B, chosen_B, rejected_B))


def simpo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    chosen_lengths_B: Array,
    rejected_lengths_B: Array,
    *,
    beta: float,
    gamma: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """SimPO: -log s(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma).

    arXiv:2405.14734, eq. 6. gamma is the paper's target margin; the authors' configurations give gamma / beta.
    Reward: beta log pi(y|x) / |y| (eq. 4).
    """
    rows = rows_like(policy_chosen_logps_B, weights_B)
    chosen_B = rows.keep(policy_chosen_logps_B)
    rejected_B = rows.keep(policy_rejected_logps_B)
    chosen_rewards_B = beta * per_token(chosen_B, rows.keep(chosen_lengths_B))
    rejected_rewards_B = beta * per_token(rejected_B, rows.keep(rejected_lengths_B))
    loss_B = -log_sigmoid(chosen_rewards_B - rejected_rewards_B - gamma)
    return rows.output(loss_B, pair_metrics(rows, chosen_rewards_B, rejected_rewards_B, chosen_B, rejected_B))


def orpo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    chosen_lengths_B: Array,
    rejected_lengths_B: Array,
    *,
    lambda_: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """ORPO: -log P(y_w) - lambda log s(log [odds(y_w) / odds(y_l)]), odds = P / (1 - P), P = pi(y|x)^(1 / |y|).

    arXiv:2403.07691, eq. 3 to 7. The first term is the chosen completion's NLL per token, per pair; TRL takes it over
    prompt and completion and over all tokens of the batch. Mean log-probabilities above -1e-6 enter the odds as -1e-6
    (without gradient): there 1 - P is 0 in float32. Reward: lambda log P, as TRL (whose beta is lambda). Additional
    metrics: `nll_loss` and `log_odds_ratio`, means over pairs.
    """
    rows = rows_like(policy_chosen_logps_B, weights_B)
    chosen_B = rows.keep(policy_chosen_logps_B)
    rejected_B = rows.keep(policy_rejected_logps_B)
    chosen_mean_B = per_token(chosen_B, rows.keep(chosen_lengths_B))
    rejected_mean_B = per_token(rejected_B, rows.keep(rejected_lengths_B))
    log_odds_B = _log_odds(chosen_mean_B) - _log_odds(rejected_mean_B)
    metrics = pair_metrics(rows, lambda_ * chosen_mean_B, lambda_ * rejected_mean_B, chosen_B, rejected_B)
    metrics |= {"nll_loss": rows.metric(-chosen_mean_B), "log_odds_ratio": rows.metric(log_odds_B)}
    return rows.output(-chosen_mean_B - lambda_ * log_sigmoid(log_odds_B), metrics)


def _log_odds(mean_logps_B: Array) -> Array:
    mean_logps_B = jnp.where(mean_logps_B < LARGEST_MEAN_LOGP, mean_logps_B, LARGEST_MEAN_LOGP)
    return mean_logps_B - log1mexp(mean_logps_B)


def cpo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    chosen_lengths_B: Array,
    *,
    beta: float,
    alpha: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Contrastive preference optimization: -log s(beta (log pi(y_w) - log pi(y_l))) - alpha log pi(y_w) / |y_w|.

    arXiv:2401.08417, eq. 3 and 5 (alpha = 1). The NLL is per token and per pair; the paper's equation does not
    divide by the length, and TRL divides the batch's sum by the batch's tokens. Reward: beta log pi(y|x). Additional
    metric: `nll_loss`, the mean over pairs.
    """
    rows = rows_like(policy_chosen_logps_B, weights_B)
    chosen_B = rows.keep(policy_chosen_logps_B)
    rejected_B = rows.keep(policy_rejected_logps_B)
    nll_B = -per_token(chosen_B, rows.keep(chosen_lengths_B))
    loss_B = -log_sigmoid(beta * (chosen_B - rejected_B)) + alpha * nll_B
    metrics = pair_metrics(rows, beta * chosen_B, beta * rejected_B, chosen_B, rejected_B)
    return rows.output(loss_B, {**metrics, "nll_loss": rows.metric(nll_B)})
