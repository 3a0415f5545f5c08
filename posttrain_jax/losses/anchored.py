"""Preference losses that hold each completion of a pair against an anchor of its own: APO, NCA, BCO, SPPO.

DPO sees only the difference of the two completions' log-ratios a_w and a_l, so both may fall. The losses here see each
of them. Arguments, shapes, weights, metrics and symbols are those of `dpo.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from posttrain_jax.core.types import Array, LossOutput
from posttrain_jax.losses.pairs import log_ratio_pairs


def apo_zero_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Anchored preference optimization, zero: 1 - s(beta a_w) + s(beta a_l); raises y_w and lowers y_l.

    arXiv:2408.06266, eq. 7: for chosen completions that are better than the policy's own.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    loss_B = sigmoid(-beta * pairs.chosen_B) + sigmoid(beta * pairs.rejected_B)
    return pairs.output_with_beta(loss_B, beta)


def apo_down_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Anchored preference optimization, down: s(beta a_w) + 1 - s(beta h); lowers y_w, and y_l more.

    arXiv:2408.06266, eq. 8: for chosen completions that are worse than the policy's own.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    loss_B = sigmoid(beta * pairs.chosen_B) + sigmoid(-beta * pairs.difference_B)
    return pairs.output_with_beta(loss_B, beta)


def nca_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Noise contrastive alignment on pairs: -log s(beta a_w) - 1/2 log s(-beta a_w) - 1/2 log s(-beta a_l).

    arXiv:2402.05369 (NCA, two completions, preference labels).
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    chosen_B, rejected_B = beta * pairs.chosen_B, beta * pairs.rejected_B
    loss_B = -log_sigmoid(chosen_B) - 0.5 * log_sigmoid(-chosen_B) - 0.5 * log_sigmoid(-rejected_B)
    return pairs.output_with_beta(loss_B, beta)


def bco_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    delta: float | Array,
    weights_B: Array | None = None,
) -> LossOutput:
    """Binary classifier optimization on pairs: -log s(beta a_w - delta) - log s(-(beta a_l - delta)).

    arXiv:2404.04656. `delta` (a scalar, without gradient) is the reward shift: the running mean of the rewards beta a
    over chosen and rejected completions, which the caller keeps. `kto.bco_unpaired_loss` is the same on single
    completions.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    delta = jax.lax.stop_gradient(jnp.asarray(delta, jnp.float32))
    loss_B = -log_sigmoid(beta * pairs.chosen_B - delta) - log_sigmoid(delta - beta * pairs.rejected_B)
    return pairs.output_with_beta(loss_B, beta)


def bco_pair_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Binary classifier optimization without a shift (TRL's `bco_pair`): -log s(beta a_w) - log s(-beta a_l)."""
    return bco_loss(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        beta=beta,
        delta=0.0,
        weights_B=weights_B,
    )


def sppo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    chosen_win_rates_B: Array,
    rejected_win_rates_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Self-play preference optimization: (a_w - (P_w - 1/2) / beta)^2 + (a_l - (P_l - 1/2) / beta)^2.

    arXiv:2405.00675, eq. 4.7, with 1 / beta = its eta. P_w, P_l in [0, 1] are the probabilities that the completion
    beats one of the policy it was sampled from (no gradient). The paper's equation sums, as this and TRL; the authors'
    code takes half of it.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    chosen_target_B = jax.lax.stop_gradient(pairs.rows.keep(chosen_win_rates_B) - 0.5) / beta
    rejected_target_B = jax.lax.stop_gradient(pairs.rows.keep(rejected_win_rates_B) - 0.5) / beta
    loss_B = jnp.square(pairs.chosen_B - chosen_target_B) + jnp.square(pairs.rejected_B - rejected_target_B)
    return pairs.output_with_beta(loss_B, beta)


def sppo_hard_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """`sppo_loss` with P_w = 1 and P_l = 0 (TRL's `sppo_hard`): (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2."""
    return sppo_loss(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        jnp.ones(jnp.shape(policy_chosen_logps_B), jnp.float32),
        jnp.zeros(jnp.shape(policy_chosen_logps_B), jnp.float32),
        beta=beta,
        weights_B=weights_B,
    )
