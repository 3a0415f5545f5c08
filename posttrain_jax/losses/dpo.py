"""Preference losses on pairs with a reference policy: DPO and its variants, one function each.

The first four arguments are log-probabilities of whole completions in nats, summed over the completion's
tokens: `policy_chosen_logps_B` = log pi_theta(y_w|x), `policy_rejected_logps_B` = log pi_theta(y_l|x), and the same
two under the reference pi_ref. Any shape will do ([B], [M, B], a scalar), as long as all arrays of one call have the
same; otherwise ValueError. In the equations

    a_w = log pi_theta(y_w|x) / pi_ref(y_w|x),    a_l = log pi_theta(y_l|x) / pi_ref(y_l|x),    h = a_w - a_l,

s is the logistic function, |y| a completion's number of tokens and beta the strength of the KL penalty (1 / nats).

`weights_B` (None = 1 everywhere) weighs the pairs; 0 = no pair, whose loss and gradient are exactly 0 whatever stands
there. Every function returns the weight times the pair's loss, float32, in the arrays' shape; `count` = the sum of
the weights. Metrics are means over pairs under the same weights: `loss`, `rewards/chosen`, `rewards/rejected`,
`rewards/margins`, `rewards/accuracies` (chosen strictly above rejected), `logps/chosen`, `logps/rejected`. The
reward of a completion is beta * a, unless the function says otherwise.

Equations are numbered as in the paper's arXiv version. Losses that hold each completion against an anchor of its own
are in `anchored.py`, losses without a reference in `reference_free.py`, losses on single completions in `kto.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from posttrain_jax.core.types import Array, LossOutput, Metric
from posttrain_jax.losses.pairs import check_smoothing, log_ratio_pairs, soft_label_nll
from posttrain_jax.losses.weighted_rows import per_token, rows_like


def dpo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Direct preference optimization: -log s(beta h).

    arXiv:2305.18290, eq. 7. Its gradient is -beta s(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)) with the
    rewards r = beta a (section 4).
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    return pairs.output_with_beta(-log_sigmoid(beta * pairs.difference_B), beta)


def cdpo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    label_smoothing: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Conservative DPO: -(1 - e) log s(beta h) - e log s(-beta h), least where s(beta h) = 1 - e.

    E. Mitchell, "A note on DPO with noisy preferences" (2023), eq. 3. `label_smoothing` = e in [0, 0.5), the share of
    labels thought to be wrong (ValueError otherwise); 0 is DPO. TRL's `sigmoid` loss ignores this argument.
    """
    check_smoothing(label_smoothing)
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    loss_B = soft_label_nll(beta * pairs.difference_B, 1.0 - label_smoothing)
    return pairs.output_with_beta(loss_B, beta)


def robust_dpo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    label_smoothing: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Robust DPO, unbiased under flipped labels: [-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2 e).

    arXiv:2403.00409. `label_smoothing` = e in [0, 0.5), the known share of flipped labels (ValueError otherwise). The
    expectation over flips is the DPO loss of the true labels; a single pair's loss may be negative.
    """
    check_smoothing(label_smoothing)
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    logits_B = beta * pairs.difference_B
    loss_B = -(1.0 - label_smoothing) * log_sigmoid(logits_B) + label_smoothing * log_sigmoid(-logits_B)
    return pairs.output_with_beta(loss_B / (1.0 - 2.0 * label_smoothing), beta)


def ipo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Identity preference optimization on whole completions: (h - 1 / (2 beta))^2; beta is the paper's tau.

    arXiv:2310.12036, eq. 17, with sums over tokens as in the DPO authors' code. TRL's `ipo` is `ipo_mean_loss`.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    return pairs.output_with_beta(jnp.square(pairs.difference_B - 1.0 / (2.0 * beta)), beta)


def ipo_mean_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    chosen_lengths_B: Array,
    rejected_lengths_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Identity preference optimization per token: (a_w / |y_w| - a_l / |y_l| - 1 / (2 beta))^2.

    arXiv:2310.12036, eq. 17, with means over tokens, which TRL says the paper's authors used. The
    log-probabilities are sums here too; the lengths (tokens) divide them. Reward: beta a / |y|.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    chosen_B = per_token(pairs.chosen_B, pairs.rows.keep(chosen_lengths_B))
    rejected_B = per_token(pairs.rejected_B, pairs.rows.keep(rejected_lengths_B))
    loss_B = jnp.square(chosen_B - rejected_B - 1.0 / (2.0 * beta))
    return pairs.output(loss_B, beta * chosen_B, beta * rejected_B)


def hinge_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """The hinge of RSO (its loss "hinge-norm"): max(0, 1 - beta h); gradient 0 at the kink.

    arXiv:2309.06657, section 3; beta is the paper's gamma.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    return pairs.output_with_beta(jax.nn.relu(1.0 - beta * pairs.difference_B), beta)


def normalized_dpo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    chosen_lengths_B: Array,
    rejected_lengths_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Length-normalized DPO of Tulu 3: -log s(beta a_w / |y_w| - beta a_l / |y_l|).

    arXiv:2411.15124, section 5 (there with beta = 5). Lengths in tokens. Reward: beta a / |y|, the quantity that is
    compared; TRL (`sigmoid_norm`) logs beta a.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    chosen_rewards_B = beta * per_token(pairs.chosen_B, pairs.rows.keep(chosen_lengths_B))
    rejected_rewards_B = beta * per_token(pairs.rejected_B, pairs.rows.keep(rejected_lengths_B))
    loss_B = -log_sigmoid(chosen_rewards_B - rejected_rewards_B)
    return pairs.output(loss_B, chosen_rewards_B, rejected_rewards_B)


def rdpo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    chosen_lengths_B: Array,
    rejected_lengths_B: Array,
    *,
    beta: float,
    alpha: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Length-regularized DPO (R-DPO): -log s(beta h + alpha (|y_w| - |y_l|)), lengths in tokens, alpha per token.

    arXiv:2403.19159. The sign is plus: the optimal policy of the penalized reward r - alpha |y| is proportional to
    pi_ref exp((r - alpha |y|) / beta), so r = beta a + alpha |y| up to a term in x. A pair whose chosen completion is
    the longer one is then already explained in part by its length, and pulls less.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    longer_B = pairs.rows.keep(chosen_lengths_B) - pairs.rows.keep(rejected_lengths_B)
    return pairs.output_with_beta(-log_sigmoid(beta * pairs.difference_B + alpha * longer_B), beta)


def dpop_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    lambda_: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """DPO-Positive of Smaug: -log s(beta (h - lambda max(0, -a_w))).

    arXiv:2402.13228. The penalty is there while the chosen completion is less likely than under the reference.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    fallen_B = jax.nn.relu(-pairs.chosen_B)
    return pairs.output_with_beta(-log_sigmoid(beta * (pairs.difference_B - lambda_ * fallen_B)), beta)


def tdpo1_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    chosen_kls_B: Array,
    rejected_kls_B: Array,
    *,
    beta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Token-level DPO, first form: -log s(beta (h - (K_l - K_w))).

    arXiv:2404.11999 (TDPO1). `chosen_kls_B` = K_w and `rejected_kls_B` = K_l are sequential KLs in nats,
    K = sum_t KL(pi_ref(.|x, y_<t) || pi_theta(.|x, y_<t)) over the completion's tokens; the gradient goes through both.
    Reward, as in the authors' code: beta (a + K).
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    chosen_rewards_B = beta * (pairs.chosen_B + pairs.rows.keep(chosen_kls_B))
    rejected_rewards_B = beta * (pairs.rejected_B + pairs.rows.keep(rejected_kls_B))
    loss_B = -log_sigmoid(chosen_rewards_B - rejected_rewards_B)
    return pairs.output(loss_B, chosen_rewards_B, rejected_rewards_B)


def tdpo2_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    chosen_kls_B: Array,
    rejected_kls_B: Array,
    *,
    beta: float,
    alpha: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Token-level DPO, second form: -log s(beta (h - alpha (K_l - sg(K_w)))), sg = no gradient.

    arXiv:2404.11999 (TDPO2; alpha = 0.5 there). Arguments and reward as in `tdpo1_loss`.
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    chosen_kls_B = pairs.rows.keep(chosen_kls_B)
    rejected_kls_B = pairs.rows.keep(rejected_kls_B)
    shift_B = alpha * (rejected_kls_B - jax.lax.stop_gradient(chosen_kls_B))
    return pairs.output(
        -log_sigmoid(beta * (pairs.difference_B - shift_B)),
        beta * (pairs.chosen_B + chosen_kls_B),
        beta * (pairs.rejected_B + rejected_kls_B),
    )


def exo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    *,
    beta: float,
    label_smoothing: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Exact optimization on preferences (EXO-pref): KL(q || p) with q = (s(beta h), s(-beta h)), p = (1 - e, e).

    arXiv:2402.00856, eq. 16. `label_smoothing` = e in (0, 0.5); at 0 the divergence is infinite (ValueError).
    """
    check_smoothing(label_smoothing, zero_allowed=False)
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    logits_B = beta * pairs.difference_B
    loss_B = sigmoid(logits_B) * (log_sigmoid(logits_B) - jnp.log1p(-label_smoothing))
    loss_B += sigmoid(-logits_B) * (log_sigmoid(-logits_B) - jnp.log(label_smoothing))
    return pairs.output_with_beta(loss_B, beta)


def rpo_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    chosen_ratings_B: Array,
    rejected_ratings_B: Array,
    *,
    beta: float,
    eta: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """Reward-aware preference optimization of Nemotron-4: D[beta h || eta (r_w - r_l)].

    arXiv:2406.11704, section 3.3, where D[a || b] = s(b) log(s(b) / s(a)) + (1 - s(b)) log((1 - s(b)) / (1 - s(a))):
    the KL divergence of two coins, 0 where the policy's margin equals the ratings'. `chosen_ratings_B` = r_w and
    `rejected_ratings_B` = r_l are a reward model's (no gradient); eta scales them. The report adds 1e-5 times the SFT
    loss, which is left to the caller. The "RPO" of arXiv:2405.16436 is another
    loss, DPO with an NLL term (see `dpo_nll_loss`).
    """
    pairs = log_ratio_pairs(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        weights_B,
    )
    rated_B = pairs.rows.keep(chosen_ratings_B) - pairs.rows.keep(rejected_ratings_B)
    target_B = eta * jax.lax.stop_gradient(rated_B)
    logits_B = beta * pairs.difference_B
    loss_B = sigmoid(target_B) * (log_sigmoid(target_B) - log_sigmoid(logits_B))
    loss_B += sigmoid(-target_B) * (log_sigmoid(-target_B) - log_sigmoid(-logits_B))
    return pairs.output_with_beta(loss_B, beta)


def dpo_nll_loss(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    chosen_nlls_B: Array,
    chosen_nll_tokens_B: Array,
    *,
    beta: float,
    alpha: float,
    weights_B: Array | None = None,
) -> LossOutput:
    """DPO with the negative log-likelihood of the chosen completion: -log s(beta h) + alpha NLL(y_w) / |y_w|.

    Iterative reasoning preference optimization, arXiv:2404.19733, eq. 1 and 2 (alpha = 1), and Llama 3,
    arXiv:2407.21783, section 4.1.4 (alpha = 0.2). `chosen_nlls_B` is the sum of -log pi_theta over the
    `chosen_nll_tokens_B` tokens that are imitated; they are arguments of their own because Llama 3 leaves header and
    termination tokens out of the DPO term only. Normalized per completion: each pair's NLL is divided by its own number
    of tokens, as in the first paper (the second does not say), not by the batch's as TRL's `sft` term is.
    Additional metric: `nll_loss`, the mean over pairs of NLL / |y_w|.
    """
    dpo = dpo_loss(
        policy_chosen_logps_B,
        policy_rejected_logps_B,
        reference_chosen_logps_B,
        reference_rejected_logps_B,
        beta=beta,
        weights_B=weights_B,
    )
    rows = rows_like(policy_chosen_logps_B, weights_B)
    nll_B = per_token(rows.keep(chosen_nlls_B), rows.keep(chosen_nll_tokens_B))
    loss_B = dpo.loss + rows.weights_B * alpha * nll_B
    metrics = {"loss": Metric(jnp.sum(loss_B), dpo.count), "nll_loss": rows.metric(nll_B)}
    return LossOutput(loss=loss_B, count=dpo.count, metrics={**dpo.metrics, **metrics})
