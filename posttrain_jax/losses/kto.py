"""Preference losses on single completions that are good or bad, without pairs: KTO and BCO.

Arguments: `policy_logps_B` = log pi_theta(y|x) and `reference_logps_B` = log pi_ref(y|x), nats, summed over the
completion's tokens; `desirable_B`, non-zero where the completion is good. Any shape, the same for all (else
ValueError). In the equations r = log pi_theta(y|x) / pi_ref(y|x) and s is the logistic function.

`weights_B` (None = 1 everywhere) weighs the completions; 0 = no completion, whose loss and gradient are exactly 0
whatever stands there. The functions return the weight times the completion's loss; `count` = the sum of the weights.
Metrics: `rewards/chosen`, `logps/chosen` are means over the desirable completions and `rewards/rejected`,
`logps/rejected` over the others, with rewards beta * r; the margin is the difference of the two means and no mean
itself, so it is not among them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from posttrain_jax.core.types import Array, LossOutput, Metric, Metrics
from posttrain_jax.losses.weighted_rows import Rows, rows_like


@dataclasses.dataclass(frozen=True)
class _Completions:
    rows: Rows
    policy_B: Array
    log_ratio_B: Array
    is_desirable_B: Array

    def metrics(self, beta: float) -> Metrics:
        desirable = Rows(jnp.where(self.is_desirable_B, self.rows.weights_B, 0.0))
        undesirable = Rows(jnp.where(self.is_desirable_B, 0.0, self.rows.weights_B))
        return {
            "rewards/chosen": desirable.metric(beta * self.log_ratio_B),
            "rewards/rejected": undesirable.metric(beta * self.log_ratio_B),
            "logps/chosen": desirable.metric(self.policy_B),
            "logps/rejected": undesirable.metric(self.policy_B),
        }


def _completions(
    policy_logps_B: Array, reference_logps_B: Array, desirable_B: Array, weights_B: Array | None
) -> _Completions:
    rows = rows_like(policy_logps_B, weights_B)
    policy_B = rows.keep(policy_logps_B)
    return _Completions(
        rows=rows,
        policy_B=policy_B,
        log_ratio_B=policy_B - rows.keep(reference_logps_B),
        is_desirable_B=rows.keep(desirable_B) != 0,
    )


def kto_kl_baseline(policy_logps_B: Array, reference_logps_B: Array, weights_B: Array | None = None) -> Array:
    """KTO's reference point z0 = max(0, mean of log pi_theta(y'|x) / pi_ref(y'|x)), scalar, nats, without gradient.

    arXiv:2402.01306, section 4. y' are completions to other prompts (the batch's, moved on by one), for which the
    log-ratio estimates KL(pi_theta || pi_ref) with a small variance and a bias. The mean is taken over the arrays
    given, so it is the global batch's where they are; 0 when all weights are 0.
    """
    rows = rows_like(policy_logps_B, weights_B)
    ratio = rows.metric(rows.keep(policy_logps_B) - rows.keep(reference_logps_B))
    mean = ratio.sum / jnp.where(ratio.count > 0, ratio.count, 1.0)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto_loss(
    policy_logps_B: Array,
    reference_logps_B: Array,
    desirable_B: Array,
    *,
    beta: float,
    kl_baseline: float | Array,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights_B: Array | None = None,
) -> LossOutput:
    """Kahneman-Tversky optimization: lambda_D (1 - s(beta (r - z0))) for good, lambda_U (1 - s(beta (z0 - r))) for bad.

    arXiv:2402.01306, eq. 8 (lambda_y - v). `kl_baseline` = z0, a scalar in nats (no gradient; see
    `kto_kl_baseline`), `desirable_weight` = lambda_D, `undesirable_weight` = lambda_U; the latter two do not enter
    `count`, as in TRL. Additional metric: `kl`, the baseline.
    """
    completions = _completions(policy_logps_B, reference_logps_B, desirable_B, weights_B)
    baseline = jax.lax.stop_gradient(jnp.asarray(kl_baseline, jnp.float32))
    above_B = beta * (completions.log_ratio_B - baseline)
    loss_B = jnp.where(
        completions.is_desirable_B,
        desirable_weight * sigmoid(-above_B),
        undesirable_weight * sigmoid(above_B),
    )
    return completions.rows.output(loss_B, {**completions.metrics(beta), "kl": Metric.of(baseline)})


def bco_unpaired_loss(
    policy_logps_B: Array,
    reference_logps_B: Array,
    desirable_B: Array,
    *,
    beta: float,
    delta: float | Array,
    weights_B: Array | None = None,
) -> LossOutput:
    """Binary classifier optimization: -log s(beta r - delta) for a good completion, -log s(delta - beta r) for a bad
    one.

    arXiv:2404.04656. `delta` is a scalar, the reward shift (no gradient); see `anchored.bco_loss`, the form for pairs.
    """
    completions = _completions(policy_logps_B, reference_logps_B, desirable_B, weights_B)
    above_B = beta * completions.log_ratio_B - jax.lax.stop_gradient(jnp.asarray(delta, jnp.float32))
    loss_B = -log_sigmoid(jnp.where(completions.is_desirable_B, above_B, -above_B))
    return completions.rows.output(loss_B, completions.metrics(beta))
