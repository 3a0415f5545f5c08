"""Reward-model losses: by hand, TRL's values, ties, absent answers, padding; scales and ensembles.

s is the logistic function, -log s(x) = log(1 + e^-x): 0.31326169 at 1, 1.31326169 at -1, 0.12692801 at 2,
2.12692801 at -2.
"""

from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from posttrain_jax.losses import reward

HERE = pathlib.Path(__file__).parent
TRL = json.loads((HERE / "trl_values.json").read_text(encoding="utf-8"))
PAPER = json.loads((HERE / "paper_values.json").read_text(encoding="utf-8"))


def mean(metric) -> float:
    return float(metric.sum / metric.count)


def test_bradley_terry_by_hand():
    """Margins 1, -2 and 0 (a tie is no win): 0.31326169, 2.12692801, log 2; accuracy 1/3, mean margin -1/3."""
    loss = reward.bradley_terry_loss(jnp.array([3.0, -1.0, 0.5]), jnp.array([2.0, 1.0, 0.5]))
    np.testing.assert_allclose(loss.loss_B, [0.31326169, 2.12692801, math.log(2)], rtol=1e-6)
    assert loss.count == 3
    assert mean(loss.metrics["accuracy"]) == pytest.approx(1 / 3)
    assert mean(loss.metrics["margins"]) == pytest.approx(-1 / 3)
    assert mean(loss.metrics["scores/chosen"]) == pytest.approx(2.5 / 3)
    assert mean(loss.metrics["scores/rejected"]) == pytest.approx(3.5 / 3)


def test_bradley_terry_gradient():
    """d/dr_w = -s(r_l - r_w): margins 1 and 0 give -0.26894142 and -0.5."""
    gradient = jax.grad(lambda c: reward.bradley_terry_loss(c, jnp.zeros(2)).loss.sum())(
        jnp.array([1.0, 0.0])
    )
    np.testing.assert_allclose(gradient, [-0.26894142, -0.5], rtol=1e-6)


def test_margin_by_hand():
    """Scores 3 and 1 with margin 1: -log s(1)."""
    loss = reward.margin_loss(jnp.array([3.0]), jnp.array([1.0]), jnp.array([1.0]))
    np.testing.assert_allclose(loss.loss_B, [0.31326169], rtol=1e-6)
    assert loss.metrics["margins"].sum == 2.0


def test_soft_labels_by_hand():
    """Margin 1: p = 0.75: 0.75 * 0.31326169 + 0.25 * 1.31326169 = 0.56326169; p = 0.5: 0.81326169; p = 0: 1.31326169.

    In the metrics the pair with p = 1/2 is left out, and in the third the second answer is the better one.
    """
    loss = reward.soft_label_loss(jnp.ones(3), jnp.zeros(3), jnp.array([0.75, 0.5, 0.0]))
    np.testing.assert_allclose(loss.loss_B, [0.56326169, 0.81326169, 1.31326169], rtol=1e-6)
    assert loss.count == 3
    assert mean(loss.metrics["accuracy"]) == 0.5
    assert loss.metrics["accuracy"].count == 2
    assert loss.metrics["scores/chosen"].sum == 1.0


def test_soft_label_is_least_at_its_log_odds():
    """p = 0.8: the gradient vanishes at a margin of log 4."""
    gradient = jax.grad(
        lambda first: reward.soft_label_loss(first, jnp.zeros(1), jnp.array([0.8])).loss.sum()
    )(jnp.array([math.log(4.0)]))
    np.testing.assert_allclose(gradient, [0.0], atol=1e-7)


def test_smoothed_labels_by_hand():
    """Margin 1, e = 0.1: 0.9 * 0.31326169 + 0.1 * 1.31326169 = 0.41326169."""
    loss = reward.smoothed_label_loss(jnp.array([1.0]), jnp.array([0.0]), label_smoothing=0.1)
    np.testing.assert_allclose(loss.loss_B, [0.41326169], rtol=1e-6)
    with pytest.raises(ValueError, match="share of wrong labels"):
        reward.smoothed_label_loss(jnp.array([1.0]), jnp.array([0.0]), label_smoothing=0.5)


def test_center_penalty_by_hand():
    """0.01 * (3 - 1)^2 = 0.04; twice that under weight 2."""
    loss = reward.center_penalty(
        jnp.array([3.0]), jnp.array([-1.0]), coefficient=0.01, weights_B=jnp.array([2.0])
    )
    np.testing.assert_allclose(loss.loss_B, [0.08], rtol=1e-6)
    assert loss.count == 2


def test_equals_trl():
    scores = {name: jnp.array(values) for name, values in TRL["scores"].items()}
    chosen, rejected = scores["chosen"], scores["rejected"]
    plain = reward.bradley_terry_loss(chosen, rejected)
    np.testing.assert_allclose(plain.loss_B, TRL["reward"]["bradley_terry_loss"]["loss"], rtol=1e-6)
    margin = reward.margin_loss(chosen, rejected, scores["margins"])
    np.testing.assert_allclose(margin.loss_B, TRL["reward"]["margin_loss"]["loss"], rtol=1e-6)
    want = TRL["reward"]["bradley_terry_with_center_penalty"]
    penalty = reward.center_penalty(chosen, rejected, coefficient=want["coefficient"])
    np.testing.assert_allclose(plain.loss_B + penalty.loss_B, want["loss"], rtol=1e-6)


def test_kwise_by_hand():
    """Scores 2, 1, 0 ranked 0, 2, 1 (the third is second best): comparisons 2 over 1, 2 over 0, 0 over 1 with margins
    1, 2, -1: (0.31326169 + 0.12692801 + 1.31326169) / 3 = 0.58448380; accuracy 2/3."""
    loss = reward.kwise_loss(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[0, 2, 1]]))
    np.testing.assert_allclose(loss.loss_B, [0.58448380], rtol=1e-6)
    assert loss.count == 1
    assert mean(loss.metrics["accuracy"]) == pytest.approx(2 / 3)
    assert loss.metrics["accuracy"].count == 3
    assert mean(loss.metrics["margins"]) == pytest.approx(2 / 3)


def test_kwise_ties_are_dropped_and_the_rest_keeps_its_weight():
    """Ranks 0, 1, 1: the comparison of the last two falls out, the others weigh 1 / C(3, 2): margins 1 and 2 give
    (0.31326169 + 0.12692801) / 3 = 0.14672990. All tied: no loss, and the prompt does not count."""
    loss = reward.kwise_loss(jnp.array([[2.0, 1.0, 0.0], [5.0, 1.0, 2.0]]), jnp.array([[0, 1, 1], [2, 2, 2]]))
    np.testing.assert_allclose(loss.loss_B, [0.14672990, 0.0], rtol=1e-6)
    assert loss.count == 1
    assert loss.metrics["accuracy"].count == 2


def test_kwise_of_two_is_bradley_terry():
    scores = jnp.array([[0.5, -1.0], [2.0, 2.5]])
    kwise = reward.kwise_loss(scores, jnp.array([[0, 1], [1, 0]]))
    pair = reward.bradley_terry_loss(jnp.array([0.5, 2.5]), jnp.array([-1.0, 2.0]))
    np.testing.assert_allclose(kwise.loss_B, pair.loss_B, rtol=1e-6)
    for name, metric in pair.metrics.items():
        np.testing.assert_allclose(kwise.metrics[name].sum, metric.sum, rtol=1e-6)


def test_plackett_luce_by_hand():
    """e^score = 1, 2, 3, best first in the order 3, 1, 2: P = 3/6 * 1/3 * 1 = 1/6, so log 6."""
    loss = reward.plackett_luce_loss(jnp.log(jnp.array([[1.0, 2.0, 3.0]])), jnp.array([[1, 2, 0]]))
    np.testing.assert_allclose(loss.loss_B, [math.log(6)], rtol=1e-6)
    assert mean(loss.metrics["accuracy"]) == 1.0


def test_plackett_luce_of_two_is_bradley_terry():
    scores = jnp.array([[0.5, -1.0], [2.0, 2.5]])
    ranking = reward.plackett_luce_loss(scores, jnp.array([[0, 1], [1, 0]]))
    pair = reward.bradley_terry_loss(jnp.array([0.5, 2.5]), jnp.array([-1.0, 2.0]))
    np.testing.assert_allclose(ranking.loss_B, pair.loss_B, rtol=1e-6)


def test_plackett_luce_ties_after_breslow():
    """e^score = 2, 3, 1 with ranks 0, 0, 1: each of the tied against all three, 2/6 * 3/6, and the last alone:
    -log(1/6) = log 6. The gradient of the tied pulls them together: 2 * 2/6 - 1 = -1/3 and 2 * 3/6 - 1 = 0."""
    scores, ranks = jnp.log(jnp.array([[2.0, 3.0, 1.0]])), jnp.array([[0, 0, 1]])
    np.testing.assert_allclose(reward.plackett_luce_loss(scores, ranks).loss_B, [math.log(6)], rtol=1e-6)
    gradient = jax.grad(lambda x: reward.plackett_luce_loss(x, ranks).loss.sum())(scores)
    np.testing.assert_allclose(gradient, [[-1 / 3, 0.0, 1 / 3]], atol=1e-6)


def test_ranked_losses_equal_the_equations_in_float64():
    scores, ranks, mask = (jnp.array(PAPER["kwise"][name]) for name in ("scores", "ranks", "mask"))
    kwise = reward.kwise_loss(scores, ranks, mask)
    np.testing.assert_allclose(kwise.loss_B, PAPER["ranked"]["kwise_loss"], rtol=2e-6)
    ranking = reward.plackett_luce_loss(scores, ranks, mask)
    np.testing.assert_allclose(ranking.loss_B, PAPER["ranked"]["plackett_luce_loss"], rtol=2e-6)


def test_pick_best_by_hand():
    """e^score = 1, 2, 3, 4: picking the 4 costs -log(4/10), picking the 1 -log(1/10). The others' mean scores are
    log(6) / 3 and log(24) / 3."""
    scores = jnp.log(jnp.array([[1.0, 2.0, 3.0, 4.0]] * 2))
    loss = reward.pick_best_loss(scores, jnp.array([3, 0]))
    np.testing.assert_allclose(loss.loss_B, [math.log(2.5), math.log(10)], rtol=1e-6)
    assert mean(loss.metrics["accuracy"]) == 0.5
    np.testing.assert_allclose(
        loss.metrics["scores/rejected"].sum, (math.log(6) + math.log(24)) / 3, rtol=1e-6
    )


def test_regression_by_hand():
    """(2 - 3.5)^2 = 2.25."""
    loss = reward.regression_loss(jnp.array([2.0]), jnp.array([3.5]))
    np.testing.assert_allclose(loss.loss_B, [2.25])
    assert loss.metrics["scores/mean"].sum == 2.0


# Losses over K answers: (scores, mask, weights) -> LossOutput; answer 1 is never the best or the picked one.
RANKS = jnp.array([[0, 2, 1, 3], [3, 2, 0, 1]])
OVER_K = {
    "kwise": lambda s, m, w: reward.kwise_loss(s, RANKS[: len(s)], m, weights_B=w),
    "plackett_luce": lambda s, m, w: reward.plackett_luce_loss(s, RANKS[: len(s)], m, weights_B=w),
    "pick_best": lambda s, m, w: reward.pick_best_loss(s, jnp.array([0, 2])[: len(s)], m, weights_B=w),
}
SCORES = jnp.array([[0.5, -1.0, 2.0, 0.25], [1.0, 1.5, -0.5, 0.0]])
over_k = pytest.mark.parametrize("name", sorted(OVER_K))


@over_k
def test_an_absent_answer_is_as_if_it_were_sliced_off(name):
    """With answer 1 masked (and NaN there) the loss is that of the other three, and its gradient is 0."""
    mask = jnp.array([[1, 0, 1, 1]] * 2)
    garbage = SCORES.at[:, 1].set(jnp.nan)
    loss = OVER_K[name](garbage, mask, None)
    kept = jnp.array([0, 2, 3])
    sliced = {
        "kwise": lambda: reward.kwise_loss(SCORES[:, kept], RANKS[:, kept]),
        "plackett_luce": lambda: reward.plackett_luce_loss(SCORES[:, kept], RANKS[:, kept]),
        "pick_best": lambda: reward.pick_best_loss(SCORES[:, kept], jnp.array([0, 1])),
    }[name]()
    np.testing.assert_allclose(loss.loss, sliced.loss, rtol=1e-6)
    for metric, value in sliced.metrics.items():
        np.testing.assert_allclose(loss.metrics[metric].sum, value.sum, rtol=1e-6)
    gradient = jax.grad(lambda s: OVER_K[name](s, mask, None).loss.sum())(garbage)
    assert np.isfinite(gradient).all()
    assert not gradient[:, 1].any()


@over_k
def test_a_prompt_of_weight_0_is_not_there_and_weights_multiply(name):
    garbage = SCORES.at[1].set(jnp.nan)
    weights = jnp.array([2.0, 0.0])
    loss, bare = OVER_K[name](garbage, None, weights), OVER_K[name](SCORES[:1], None, None)
    np.testing.assert_allclose(loss.loss, [2 * bare.loss[0], 0.0], rtol=1e-6)
    assert loss.count == 2
    for metric, value in bare.metrics.items():
        np.testing.assert_allclose(loss.metrics[metric].sum, 2 * value.sum, rtol=1e-6)
        np.testing.assert_allclose(loss.metrics[metric].count, 2 * value.count)
    gradient = jax.grad(lambda s: OVER_K[name](s, None, weights).loss.sum())(garbage)
    assert np.isfinite(gradient).all()
    assert not gradient[1].any()


@over_k
def test_losses_over_k_answers_do_not_see_a_shift_and_have_right_gradients(name):
    def total(scores):
        return OVER_K[name](scores, None, None).loss.sum()

    np.testing.assert_allclose(total(SCORES + 5.0), total(SCORES), rtol=1e-5)
    check_grads(total, (SCORES,), order=1, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2, eps=1e-2)
    for far in (3e4, -3e4):
        value, gradient = jax.value_and_grad(total)(SCORES.at[0, 0].add(far))
        assert np.isfinite(value) and np.isfinite(gradient).all()


@over_k
def test_one_prompt_without_a_batch_axis(name):
    """Leading axes are free: none, or two."""
    calls = {
        "kwise": lambda s, r, b: reward.kwise_loss(s, r),
        "plackett_luce": lambda s, r, b: reward.plackett_luce_loss(s, r),
        "pick_best": lambda s, r, b: reward.pick_best_loss(s, b),
    }
    best = jnp.array([0, 2])
    whole = calls[name](SCORES, RANKS, best)
    one = calls[name](SCORES[0], RANKS[0], best[0])
    np.testing.assert_allclose(one.loss, whole.loss[0], rtol=1e-6)
    deep = calls[name](SCORES[None], RANKS[None], best[None])
    np.testing.assert_allclose(deep.loss, whole.loss[None], rtol=1e-6)


@pytest.mark.parametrize("loss", [reward.kwise_loss, reward.plackett_luce_loss])
def test_a_prompt_with_one_answer_has_no_loss_and_does_not_count(loss):
    out = loss(SCORES, RANKS, jnp.array([[1, 1, 1, 1], [0, 1, 0, 0]]))
    assert out.loss[0] > 0
    assert out.loss[1] == 0
    assert out.count == 1


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mask"):
        reward.kwise_loss(SCORES, RANKS, jnp.ones(4))
    with pytest.raises(ValueError, match="weights"):
        reward.kwise_loss(SCORES, RANKS, weights_B=jnp.ones(4))
    with pytest.raises(ValueError, match="ranks"):
        reward.plackett_luce_loss(SCORES, RANKS[0])
    with pytest.raises(ValueError, match="best_B"):
        reward.pick_best_loss(SCORES, jnp.array(1))
    with pytest.raises(ValueError, match="one shape"):
        reward.bradley_terry_loss(jnp.ones(4), jnp.ones((4, 1)))


def filled(like, value):
    """A further argument of the loss: `value`, and NaN in rows whose scores are garbage."""
    return jnp.where(jnp.isfinite(like), value, jnp.nan)


# Pair losses: (first, second, weights) -> LossOutput.
PAIR_LOSSES = {
    "bradley_terry": lambda c, r, w: reward.bradley_terry_loss(c, r, weights_B=w),
    "margin": lambda c, r, w: reward.margin_loss(c, r, filled(c, 0.5), weights_B=w),
    "soft_label": lambda c, r, w: reward.soft_label_loss(c, r, filled(c, 0.75), weights_B=w),
    "smoothed": lambda c, r, w: reward.smoothed_label_loss(c, r, label_smoothing=0.1, weights_B=w),
    "regression": lambda c, r, w: reward.regression_loss(c, r, weights_B=w),
    "center": lambda c, r, w: reward.center_penalty(c, r, coefficient=0.1, weights_B=w),
}


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_pair_losses_weights_padding_gradients_and_extremes(name):
    chosen, rejected = jnp.array([1.5, -0.5]), jnp.array([0.25, 0.75])
    loss = PAIR_LOSSES[name]
    bare = loss(chosen, rejected, None)
    check_grads(
        lambda c, r: loss(c, r, None).loss.sum(),
        (chosen, rejected),
        order=1,
        modes=("fwd", "rev"),
        atol=2e-2,
        rtol=2e-2,
        eps=1e-2,
    )
    weights = jnp.array([2.0, 0.0])
    for garbage in (jnp.nan, jnp.inf):
        padded = (chosen.at[1].set(garbage), rejected.at[1].set(garbage))
        out = loss(*padded, weights)
        np.testing.assert_allclose(out.loss, [2 * bare.loss[0], 0.0], rtol=1e-6)
        assert out.count == 2
        assert all(np.isfinite(metric.sum) for metric in out.metrics.values())
        gradients = jax.grad(lambda c, r: loss(c, r, weights).loss.sum(), (0, 1))(*padded)
        assert gradients[0][1] == gradients[1][1] == 0
        assert np.isfinite(gradients).all()
    for far in (3e4, -3e4):
        gradients = jax.grad(lambda c, r: loss(c, r, None).loss.sum(), (0, 1))(chosen + far, rejected)
        assert np.isfinite(gradients).all()


def test_demonstration_bias_by_hand():
    """Scores 1, 3 and an ignored one: bias -2, after which they average 0."""
    scores = jnp.array([1.0, 3.0, jnp.nan])
    assert reward.demonstration_bias(scores, weights_B=jnp.array([1.0, 1.0, 0.0])) == -2.0
    assert reward.demonstration_bias(scores[:2]) == -2.0


def test_gain_and_bias_by_hand():
    """Scores 1, 3: mean 2, deviation 1 (divided by n). Target mean 0, deviation 1: gain 1, bias -2. Target mean 5,
    deviation 3: gain 3, bias 5 - 6 = -1, so the scores become 2 and 8."""
    scores = jnp.array([1.0, 3.0])
    scale = reward.gain_and_bias(scores)
    assert (scale.gain, scale.bias) == (1.0, -2.0)
    scale = reward.gain_and_bias(scores, target_mean=5.0, target_std=3.0)
    np.testing.assert_allclose(scale(scores), [2.0, 8.0])
    padded = reward.gain_and_bias(
        jnp.array([1.0, 3.0, jnp.nan]), target_mean=5.0, target_std=3.0, weights_B=jnp.array([1.0, 1.0, 0.0])
    )
    assert (padded.gain, padded.bias) == (3.0, -1.0)


def test_equal_scores_are_only_shifted():
    scale = reward.gain_and_bias(jnp.full(7, 0.1), target_mean=1.0)
    assert scale.gain == 1.0
    np.testing.assert_allclose(scale(jnp.full(7, 0.1)), np.ones(7), rtol=1e-6)


def test_ensembles_by_hand():
    """Members' scores 1, 3, 5 and 2, 2, 2: means 3 and 2, least 1 and 2, variances (4 + 0 + 4) / 3 = 8/3 and 0."""
    scores = jnp.array([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]])
    np.testing.assert_allclose(reward.combine_scores_mean(scores), [3.0, 2.0])
    np.testing.assert_allclose(reward.combine_scores_min(scores), [1.0, 2.0])
    np.testing.assert_allclose(
        reward.combine_scores_uncertainty(scores, coefficient=0.75), [3.0 - 0.75 * 8 / 3, 2.0], rtol=1e-6
    )
    np.testing.assert_allclose(reward.disagreement(scores), [math.sqrt(8 / 3), 0.0], rtol=1e-6)
