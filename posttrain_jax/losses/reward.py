"""Losses of reward models, the scale of their scores, and the scores of ensembles.

Scores are a reward model's, one per completion, in its own unit (log-odds under Bradley-Terry): `chosen_B` = r(x, y_w),
`rejected_B` = r(x, y_l). Letters of this file: K completions to one prompt, E members of an ensemble. Pair losses take
any shape, the same for all arrays of a call (else ValueError); losses over K completions take [..., K] and weights
[...]. s is the logistic function.

`weights_B` (None = 1 everywhere) weighs the rows; 0 = no row, whose loss and gradient are exactly 0 whatever stands
there. Losses are the weight times the row's loss, float32; `count` = the sum of the weights of the rows that have a
loss. Metrics: `loss`, `accuracy` (chosen strictly above rejected, so a tie counts as wrong, as in RewardBench),
`scores/chosen`, `scores/rejected`, `margins`, all means over comparisons.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from posttrain_jax.core.types import Array, LossOutput, Metrics
from posttrain_jax.losses.pairs import check_smoothing, soft_label_nll
from posttrain_jax.losses.weighted_rows import Rows, rows_like

# The score of a completion that is not there: no share in any softmax, and no NaN in its gradient.
ABSENT = -1e30


def _score_metrics(rows: Rows, chosen_B: Array, rejected_B: Array) -> Metrics:
    return {
        "accuracy": rows.metric((chosen_B > rejected_B).astype(jnp.float32)),
        "scores/chosen": rows.metric(chosen_B),
        "scores/rejected": rows.metric(rejected_B),
        "margins": rows.metric(chosen_B - rejected_B),
    }


def bradley_terry_loss(chosen_B: Array, rejected_B: Array, *, weights_B: Array | None = None) -> LossOutput:
    """Bradley-Terry: -log s(r_w - r_l), the negative log-likelihood that y_w is preferred.

    Stiennon et al., arXiv:2009.01325, section 3.4; InstructGPT, arXiv:2203.02155, eq. 1 for K = 2.
    """
    rows = rows_like(chosen_B, weights_B)
    chosen_B, rejected_B = rows.keep(chosen_B), rows.keep(rejected_B)
    return rows.output(-log_sigmoid(chosen_B - rejected_B), _score_metrics(rows, chosen_B, rejected_B))


def margin_loss(
    chosen_B: Array, rejected_B: Array, margins_B: Array, *, weights_B: Array | None = None
) -> LossOutput:
    """Bradley-Terry with a margin: -log s(r_w - r_l - m).

    Llama 2, arXiv:2307.09288, eq. 2: m = 1, 2/3, 1/3, 0 (small) or 3, 2, 1, 0 (large) for significantly, moderately,
    slightly and negligibly better. The metric `margins` is r_w - r_l, without m.
    """
    rows = rows_like(chosen_B, weights_B)
    chosen_B, rejected_B = rows.keep(chosen_B), rows.keep(rejected_B)
    loss_B = -log_sigmoid(chosen_B - rejected_B - rows.keep(margins_B))
    return rows.output(loss_B, _score_metrics(rows, chosen_B, rejected_B))


def soft_label_loss(
    first_B: Array, second_B: Array, probabilities_B: Array, *, weights_B: Array | None = None
) -> LossOutput:
    """Bradley-Terry on soft labels: -p log s(r_1 - r_2) - (1 - p) log s(r_2 - r_1).

    Christiano et al., arXiv:1706.03741, section 2.2.3 (p = 1/2 for "equally good"); Constitutional AI,
    arXiv:2212.08073, section 4.1 (a model's probabilities). `probabilities_B` = p in [0, 1], that the first is better;
    no gradient. In the metrics the chosen completion is the one with p > 1/2; pairs with p = 1/2 are not in them.
    """
    rows = rows_like(first_B, weights_B)
    first_B, second_B = rows.keep(first_B), rows.keep(second_B)
    first_share_B = jax.lax.stop_gradient(rows.keep(probabilities_B))
    margin_B = first_B - second_B
    loss_B = soft_label_nll(margin_B, first_share_B)
    decided = Rows(jnp.where(first_share_B != 0.5, rows.weights_B, 0.0))
    chosen_B = jnp.where(first_share_B > 0.5, first_B, second_B)
    rejected_B = jnp.where(first_share_B > 0.5, second_B, first_B)
    return rows.output(loss_B, _score_metrics(decided, chosen_B, rejected_B))


def smoothed_label_loss(
    chosen_B: Array, rejected_B: Array, *, label_smoothing: float, weights_B: Array | None = None
) -> LossOutput:
    """Bradley-Terry with smoothed labels: -(1 - e) log s(r_w - r_l) - e log s(r_l - r_w).

    `soft_label_loss` with p = 1 - e everywhere; least at r_w - r_l = log((1 - e) / e). `label_smoothing` = e in
    [0, 0.5), the share of labels thought to be wrong (ValueError otherwise). Christiano et al. (arXiv:1706.03741)
    mix the coin into the prediction, 0.9 s(r_w - r_l) + 0.05, which bounds the loss; this mixes it into the label.
    """
    check_smoothing(label_smoothing)
    probabilities_B = jnp.full(jnp.shape(chosen_B), 1.0 - label_smoothing, jnp.float32)
    return soft_label_loss(chosen_B, rejected_B, probabilities_B, weights_B=weights_B)


@dataclasses.dataclass(frozen=True)
class _Completions:
    """K scored completions per prompt; what is absent scores 0 and is False in `present_BK`."""

    rows: Rows
    scores_BK: Array
    present_BK: Array

    def only_where(self, has_loss_B: Array) -> Rows:
        return Rows(jnp.where(has_loss_B, self.rows.weights_B, 0.0))


def _completions(scores_BK: Array, mask_BK: Array | None, weights_B: Array | None) -> _Completions:
    scores_BK = jnp.asarray(scores_BK)
    rows = rows_like(scores_BK[..., 0], weights_B)
    present_BK = jnp.ones(scores_BK.shape, bool) if mask_BK is None else jnp.asarray(mask_BK) != 0
    if present_BK.shape != scores_BK.shape or rows.weights_B.shape != scores_BK.shape[:-1]:
        raise ValueError(
            f"scores of shape {scores_BK.shape} need a mask of that shape and weights of {scores_BK.shape[:-1]}; "
            f"these are {present_BK.shape} and {rows.weights_B.shape}."
        )
    present_BK = present_BK & (rows.weights_B != 0)[..., None]
    return _Completions(rows, jnp.where(present_BK, scores_BK.astype(jnp.float32), 0.0), present_BK)


def _ranks(ranks_BK: Array, scores_BK: Array) -> Array:
    ranks_BK = jnp.asarray(ranks_BK)
    if ranks_BK.shape != scores_BK.shape:
        raise ValueError(f"ranks of shape {ranks_BK.shape} do not fit scores of shape {scores_BK.shape}.")
    return ranks_BK


def kwise_loss(
    scores_BK: Array, ranks_BK: Array, mask_BK: Array | None = None, *, weights_B: Array | None = None
) -> LossOutput:
    """All comparisons among K ranked completions: -1 / C(K, 2) sum over pairs with y_w above y_l of log s(r_w - r_l).

    InstructGPT, arXiv:2203.02155, eq. 1 (K = 4 to 9, one prompt = one element of the batch). K counts the completions
    that are there (`mask_BK`, None = all). Pairs of equal rank are dropped and leave the weight of the others,
    1 / C(K, 2), as it is.

    Args:
      scores_BK: r(x, y_k).
      ranks_BK: integers, lower is better.
      mask_BK: 0 = no such completion.
      weights_B: weights of the prompts.

    Returns:
      One loss per prompt. A prompt without any comparison has loss 0 and does not count. Metrics are means over
      comparisons, under the weight of their prompt.
    """
    completions = _completions(scores_BK, mask_BK, weights_B)
    ranks_BK = _ranks(ranks_BK, scores_BK)
    compared_BKK = completions.present_BK[..., :, None] & completions.present_BK[..., None, :]
    compared_BKK = compared_BKK & (ranks_BK[..., :, None] < ranks_BK[..., None, :])
    margin_BKK = completions.scores_BK[..., :, None] - completions.scores_BK[..., None, :]
    total_B = jnp.sum(jnp.where(compared_BKK, -log_sigmoid(margin_BKK), 0.0), axis=(-2, -1))
    completions_B = jnp.sum(completions.present_BK, axis=-1, dtype=jnp.float32)
    rows = completions.only_where(jnp.any(compared_BKK, axis=(-2, -1)))
    loss_B = total_B / jnp.maximum(completions_B * (completions_B - 1.0) / 2.0, 1.0)
    comparisons = Rows(jnp.where(compared_BKK, rows.weights_B[..., None, None], 0.0))
    chosen_BKK = jnp.broadcast_to(completions.scores_BK[..., :, None], compared_BKK.shape)
    rejected_BKK = jnp.broadcast_to(completions.scores_BK[..., None, :], compared_BKK.shape)
    return rows.output(loss_B, _score_metrics(comparisons, chosen_BKK, rejected_BKK))


def plackett_luce_loss(
    scores_BK: Array, ranks_BK: Array, mask_BK: Array | None = None, *, weights_B: Array | None = None
) -> LossOutput:
    """Plackett-Luce: -sum_k [r_(k) - log sum_{j >= k} exp r_(j)], completions in order of rank, best first.

    Plackett 1975 (Applied Statistics 24(2)); as the ranking form of DPO in arXiv:2305.18290, appendix A.3. It is the
    negative log-likelihood of the whole ranking, not divided by K; for K = 2 it is `bradley_terry_loss`. Of equal
    ranks each is held against all completions of its rank and below (Breslow 1974), which pulls their scores together.
    Arguments as in `kwise_loss`; a prompt with fewer than two completions has loss 0 and does not count. Metric:
    `accuracy`, how often the best-ranked completions' scores are strictly above all of a lower rank (prompts without
    any left out).
    """
    completions = _completions(scores_BK, mask_BK, weights_B)
    ranks_BK = _ranks(ranks_BK, scores_BK)
    # [..., k, j]: completion j is not ranked above k, so it still competes for k's rank; k itself always does.
    competes_BKK = completions.present_BK[..., None, :] & (ranks_BK[..., None, :] >= ranks_BK[..., :, None])
    competes_BKK = competes_BKK | jnp.broadcast_to(
        jnp.eye(scores_BK.shape[-1], dtype=bool), competes_BKK.shape
    )
    others_BKK = jnp.where(competes_BKK, completions.scores_BK[..., None, :], ABSENT)
    each_BK = jax.nn.logsumexp(others_BKK, axis=-1) - completions.scores_BK
    loss_B = jnp.sum(jnp.where(completions.present_BK, each_BK, 0.0), axis=-1)
    rows = completions.only_where(jnp.sum(completions.present_BK, axis=-1) >= 2)
    best_B = jnp.min(jnp.where(completions.present_BK, ranks_BK, jnp.iinfo(jnp.int32).max), axis=-1)
    is_best_BK = completions.present_BK & (ranks_BK == best_B[..., None])
    is_below_BK = completions.present_BK & ~is_best_BK
    lowest_best_B = jnp.min(jnp.where(is_best_BK, completions.scores_BK, -ABSENT), axis=-1)
    highest_below_B = jnp.max(jnp.where(is_below_BK, completions.scores_BK, ABSENT), axis=-1)
    decided = completions.only_where(jnp.any(is_below_BK, axis=-1))
    accuracy = decided.metric((lowest_best_B > highest_below_B).astype(jnp.float32))
    return rows.output(loss_B, {"accuracy": accuracy})


def pick_best_loss(
    scores_BK: Array, best_B: Array, mask_BK: Array | None = None, *, weights_B: Array | None = None
) -> LossOutput:
    """The best of K: -log [exp r_b / sum_k exp r_k].

    Ziegler et al., arXiv:1909.08593, eq. 1 (K = 4). `best_B` = b, the index of the completion that was picked; it must
    be one that is there (`mask_BK`, None = all). Metrics: `accuracy`, how often the picked completion's score is
    strictly above all others; `scores/chosen`; `scores/rejected` is the mean score of a prompt's other completions.
    """
    completions = _completions(scores_BK, mask_BK, weights_B)
    best_B = jnp.asarray(best_B)
    if best_B.shape != completions.rows.weights_B.shape:
        raise ValueError(f"best_B of shape {best_B.shape} does not fit scores of shape {scores_BK.shape}.")
    indices_BK = jax.lax.broadcasted_iota(jnp.int32, scores_BK.shape, len(scores_BK.shape) - 1)
    is_best_BK = indices_BK == best_B[..., None]
    chosen_B = jnp.sum(jnp.where(is_best_BK, completions.scores_BK, 0.0), axis=-1)
    competing_BK = jnp.where(completions.present_BK, completions.scores_BK, ABSENT)
    is_other_BK = completions.present_BK & ~is_best_BK
    others_B = jnp.sum(is_other_BK, axis=-1, dtype=jnp.float32)
    rejected_B = jnp.sum(jnp.where(is_other_BK, completions.scores_BK, 0.0), axis=-1) / jnp.maximum(
        others_B, 1.0
    )
    highest_other_B = jnp.max(jnp.where(is_other_BK, completions.scores_BK, ABSENT), axis=-1)
    rows = completions.rows
    metrics = {
        "accuracy": rows.metric((chosen_B > highest_other_B).astype(jnp.float32)),
        "scores/chosen": rows.metric(chosen_B),
        "scores/rejected": rows.metric(rejected_B),
        "margins": rows.metric(chosen_B - rejected_B),
    }
    # In a prompt of weight 0 nothing competes; its normalizer is ABSENT, finite, and weighed away.
    return rows.output(jax.nn.logsumexp(competing_BK, axis=-1) - chosen_B, metrics)


def regression_loss(scores_B: Array, ratings_B: Array, *, weights_B: Array | None = None) -> LossOutput:
    """Squared error of a rating: (r(x, y) - rating)^2, without a factor 1/2; ratings in the scores' unit.

    The regression reward models of HelpSteer2, arXiv:2406.08673. Metrics: `loss`, `scores/mean`.
    """
    rows = rows_like(scores_B, weights_B)
    scores_B = rows.keep(scores_B)
    return rows.output(jnp.square(scores_B - rows.keep(ratings_B)), {"scores/mean": rows.metric(scores_B)})


def center_penalty(
    chosen_B: Array, rejected_B: Array, *, coefficient: float, weights_B: Array | None = None
) -> LossOutput:
    """What keeps scores near 0, to be added to a pair loss: coefficient (r_w + r_l)^2.

    Eisenstein et al., arXiv:2312.09244, eq. 2, and TRL's `center_rewards_coefficient` (0.01 there). Bradley-Terry
    leaves a constant free; this fixes it.
    """
    rows = rows_like(chosen_B, weights_B)
    return rows.output(coefficient * jnp.square(rows.keep(chosen_B) + rows.keep(rejected_B)), {})


def demonstration_bias(scores_B: Array, *, weights_B: Array | None = None) -> Array:
    """The bias (scalar) that makes the demonstrations' scores average 0 once it is added: -mean.

    InstructGPT, arXiv:2203.02155, section 3.5. `scores_B`: the reward model's scores of demonstrations.
    """
    rows = rows_like(scores_B, weights_B)
    mean = rows.metric(rows.keep(scores_B))
    return -mean.sum / mean.count


@dataclasses.dataclass(frozen=True)
class Scale:
    """A linear change of a reward model's scores.

    Attributes:
      gain: scalar float32.
      bias: scalar float32.
    """

    gain: Array
    bias: Array

    def __call__(self, scores: Array) -> Array:
        """gain * scores + bias."""
        return self.gain * scores + self.bias


def gain_and_bias(
    scores_B: Array, *, target_mean: float = 0.0, target_std: float = 1.0, weights_B: Array | None = None
) -> Scale:
    """The scale that gives `scores_B` the target's mean and standard deviation.

    Ziegler et al., arXiv:1909.08593, section 2: gain = std_target / std, bias = mean_target - gain mean, over scores of
    samples of the policy; both deviations are divided by n, as in the authors' code. Scores that are all equal have
    no scale: their gain is 1.
    """
    rows = rows_like(scores_B, weights_B)
    scores_B = rows.keep(scores_B)
    count = jnp.sum(rows.weights_B)
    mean = jnp.sum(rows.weights_B * scores_B) / count
    std = jnp.sqrt(jnp.sum(rows.weights_B * jnp.square(scores_B - mean)) / count)
    # Rounding gives equal scores a deviation of about 1e-7 of their size.
    spread = std > 1e-6 * jnp.max(jnp.abs(scores_B))
    gain = jnp.where(spread, target_std / jnp.where(spread, std, 1.0), 1.0)
    return Scale(gain=gain, bias=target_mean - gain * mean)


def combine_scores_mean(scores_EB: Array) -> Array:
    """The mean of the members' scores, `[B]` (Coste et al., arXiv:2310.02743, mean optimization)."""
    return jnp.mean(scores_EB.astype(jnp.float32), axis=0)


def combine_scores_min(scores_EB: Array) -> Array:
    """The lowest member's score, `[B]` (Coste et al., arXiv:2310.02743, worst-case optimization)."""
    return jnp.min(scores_EB.astype(jnp.float32), axis=0)


def combine_scores_uncertainty(scores_EB: Array, *, coefficient: float) -> Array:
    """mean - coefficient * variance over members, `[B]` (arXiv:2310.02743, uncertainty-weighted optimization).

    The variance is that of the members themselves, divided by E and not by E - 1, so a single member has none.
    """
    scores_EB = scores_EB.astype(jnp.float32)
    return jnp.mean(scores_EB, axis=0) - coefficient * jnp.var(scores_EB, axis=0)


def disagreement(scores_EB: Array) -> Array:
    """The standard deviation of the members' scores (divided by E), `[B]`: which prompts to have labeled.

    Christiano et al., arXiv:1706.03741, section 2.2.4, choose queries by the variance over an ensemble.
    """
    return jnp.std(scores_EB.astype(jnp.float32), axis=0)
