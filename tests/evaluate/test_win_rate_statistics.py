"""Win rates by hand: ties, orders, intervals, tests, position bias, and what is left when length is held equal."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import optimize

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.win_rate import (
    Judgment,
    fit_length,
    length_controlled,
    table,
    win_rate,
)


def judged(*pairs, a=10, b=10):
    """One prompt for each (a_first, b_first)."""
    return [Judgment(number, *pair, length_a=a, length_b=b) for number, pair in enumerate(pairs)]


def with_lengths(*rows):
    """One prompt for each (preference in both orders, longer by); A has 100 characters."""
    return [Judgment(number, p, p, 100, 100 + longer) for number, (p, longer) in enumerate(rows)]


def test_by_hand():
    """Preferences 1, 1, (1 + 0) / 2, (0.5 + 1) / 2 and 0: mean 3.25 / 5 = 0.65; 3 wins, 1 loss, 1 tie: sign test
    2 * (1 + 4) / 16 = 0.625. Differences from 0.5 are .5, .5, 0, .25, -.5 with sum .75; of the 16 signings of .5, .5,
    .25, .5 those with |sum| >= .75: sums of three halves are 1.5 (1), .5 (3), -.5 (3), -1.5 (1), with +-.25: 1.75,
    1.25, .75 (3) and their mirror images, so 2 * (1 + 1 + 3) / 16 = 0.625. The first answer is preferred by
    ((1 - a_first) + b_first) / 2: .5, .5, (0 + 0) / 2, (.5 + 1) / 2, .5, mean 2.25 / 5 = 0.45. One of five flips: the
    third goes from B to A; a tie in one order is no flip."""
    found = win_rate(judged((1.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.5, 1.0), (0.0, 0.0)), resamples=100)
    assert found.win_rate.value == pytest.approx(0.65)
    assert (found.wins, found.losses, found.ties) == (3, 1, 1)
    assert found.sign_p == 0.625
    assert found.permutation_p == 0.625
    assert found.first_preferred.value == pytest.approx(0.45)
    assert found.flipped.value == pytest.approx(0.2)
    assert (found.prompts, found.pairs, found.unparsed) == (5, 5, 0)


def test_a_judge_that_always_takes_the_first_says_nothing_about_the_models():
    found = win_rate(judged(*[(0.0, 1.0)] * 8), resamples=100)
    assert (found.win_rate.value, found.win_rate.low, found.win_rate.high) == (0.5, 0.5, 0.5)
    assert (found.first_preferred.value, found.flipped.value, found.ties) == (1.0, 1.0, 8)
    assert (found.sign_p, found.permutation_p) == (1.0, 1.0)


def test_the_interval_is_as_wide_as_theory_says():
    """60 of 100 won: standard error sqrt(0.6 * 0.4 / 100) = 0.049, so 0.6 +- 0.096."""
    found = win_rate(judged(*[(1.0, 1.0)] * 60, *[(0.0, 0.0)] * 40), resamples=4000).win_rate
    assert found.value == pytest.approx(0.6)
    assert found.low == pytest.approx(0.504, abs=0.015)
    assert found.high == pytest.approx(0.696, abs=0.015)


def test_samples_of_one_prompt_count_as_one():
    """Prompt x won by 3 samples of 4, prompt y lost by its only one: (3/4 + 0) / 2, not 3/5."""
    judgments = [
        Judgment("x", won, won, 10, 12, sample=sample) for sample, won in enumerate([1.0, 1.0, 0.0, 1.0])
    ]
    judgments.append(Judgment("y", 0.0, 0.0, 10, 12, unparsed=1))
    found = win_rate(judgments, resamples=50)
    assert found.win_rate.value == pytest.approx(0.375)
    assert (found.prompts, found.pairs, found.wins, found.losses, found.unparsed) == (2, 5, 1, 1, 1)
    assert (found.mean_length_a, found.mean_length_b) == (10.0, 12.0)


def test_the_length_model_by_hand():
    """Two lengths, +10 and -10 characters, 10 prompts each: std(d) with n - 1 = 19 below is sqrt(2000 / 19), so
    x = +-tanh(sqrt(19 / 20)). Of the longer answers 8 of 10 win, of the shorter 6 of 10: the model has two weights for
    two groups and fits both exactly, w_base = (logit .8 + logit .6) / 2, w_len = (logit .8 - logit .6) / (2 x)."""
    rows = [(1.0, 10)] * 8 + [(0.0, 10)] * 2 + [(1.0, -10)] * 6 + [(0.0, -10)] * 4
    found = length_controlled(with_lengths(*rows), resamples=10, ridge=1e-9)
    upper, lower = math.log(0.8 / 0.2), math.log(0.6 / 0.4)
    base = (upper + lower) / 2
    x = math.tanh(math.sqrt(19 / 20))
    assert found.base_weight == pytest.approx(base, rel=1e-6)
    assert found.length_weight == pytest.approx((upper - lower) / (2 * x), rel=1e-6)
    assert found.win_rate.value == pytest.approx(1 / (1 + math.exp(-base)), rel=1e-6)
    assert found.note == ""
    # The ridge that is shipped changes the result by less than its fourth digit.
    shipped = length_controlled(with_lengths(*rows), resamples=10)
    assert shipped.win_rate.value == pytest.approx(found.win_rate.value, abs=1e-4)


def test_soft_labels_weigh_like_the_verdicts_they_are_the_mean_of():
    """A preference of 0.8 on every longer pair and 0.6 on every shorter one is the same as the verdicts above."""
    hard = [(1.0, 10)] * 8 + [(0.0, 10)] * 2 + [(1.0, -10)] * 6 + [(0.0, -10)] * 4
    soft = [(0.8, 10)] * 10 + [(0.6, -10)] * 10
    one, other = (length_controlled(with_lengths(*rows), resamples=10) for rows in (hard, soft))
    assert one.base_weight == pytest.approx(other.base_weight, rel=1e-6)
    assert one.length_weight == pytest.approx(other.length_weight, rel=1e-6)


def test_a_judge_that_looks_at_length_alone_prefers_nobody_when_lengths_are_equal():
    """B is longer on 80 of 100 prompts, and wins with the probability sigma(2 tanh(d / std)), so w_base = 0: as soft
    labels, where the fit is exact, and as verdicts drawn with it, 100 times."""
    random = np.random.default_rng(0)
    longer = random.integers(1, 400, 100) * np.where(np.arange(100) < 80, 1, -1)
    chance = 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std(ddof=1))))
    soft = win_rate(with_lengths(*zip(chance.tolist(), longer.tolist(), strict=True)), resamples=500)
    assert soft.win_rate.low > 0.6
    assert soft.length_controlled.win_rate.value == pytest.approx(0.5, abs=1e-3)
    assert soft.length_controlled.length_weight == pytest.approx(2.0, rel=1e-2)
    estimates = []
    for _ in range(100):
        verdicts = (random.random(100) < chance).astype(float).tolist()
        judgments = with_lengths(*zip(verdicts, longer.tolist(), strict=True))
        estimates.append(length_controlled(judgments, resamples=200).win_rate)
    # 95 of 100 intervals should hold 0.5; fewer than 88 has a probability of 0.001.
    assert sum(found.low < 0.5 < found.high for found in estimates) >= 88
    assert np.mean([found.value for found in estimates]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("sign", "which"), [(1, "longer"), (-1, "shorter")])
def test_where_the_longer_one_always_wins_nothing_is_known_of_equal_lengths(sign, which):
    """4 of 5 prompts: a fit would say sigma(ln(4 / 1) / 2) = 2/3, which counts the longer answers and no more."""
    rows = [
        (1.0 if d * sign > 0 else 0.0, d) for d in (10 * sign, 40 * sign, 90 * sign, 15 * sign, -20 * sign)
    ]
    found = win_rate(with_lengths(*rows), resamples=50)
    assert found.win_rate.value == pytest.approx(0.8)
    controlled = found.length_controlled
    assert (controlled.win_rate.value, controlled.win_rate.low, controlled.win_rate.high) == (0.5, 0.0, 1.0)
    assert f"The {which} completion is preferred everywhere" in controlled.note


def test_a_judge_that_does_not_look_at_length_keeps_its_win_rate():
    """Every length twice, won 7 times in 10 at each: w_len = 0, so the win rate stays 0.7 whatever the lengths are."""
    rows = [(won, d) for d in (-30, 50, 90, 200) for won in [1.0] * 7 + [0.0] * 3]
    found = win_rate(with_lengths(*rows), resamples=100)
    assert found.win_rate.value == pytest.approx(0.7)
    assert found.length_controlled.win_rate.value == pytest.approx(0.7, abs=1e-9)
    assert found.length_controlled.length_weight == pytest.approx(0.0, abs=1e-9)


def test_the_fit_is_the_maximum_that_scipy_finds():
    random = np.random.default_rng(1)
    length, preference = np.tanh(random.normal(size=60)), random.random(60)
    weights = random.integers(0, 3, (3, 60)).astype(float)

    def negative(found, weight):
        m = 1 / (1 + np.exp(-(found[0] * length + found[1])))
        return (
            -(weight * (preference * np.log(m) + (1 - preference) * np.log(1 - m))).sum()
            + 0.05 * found[0] ** 2
        )

    found = fit_length(length, preference, weights, ridge=0.1)
    for row, weight in zip(found, weights, strict=True):
        best = optimize.minimize(negative, np.zeros(2), args=(weight,), tol=1e-12).x
        np.testing.assert_allclose(row, best, atol=1e-5)


@pytest.mark.parametrize("a_flat_likelihood", [1e-9, 1e-3, 10.0])
def test_the_fit_ends_where_length_explains_every_verdict(a_flat_likelihood):
    """At the maximum the gradient is 0: sum (p - m) = 0 for w_base, sum x (p - m) = ridge * w_len."""
    length = np.asarray([-0.9, -0.5, -0.1, 0.2, 0.6, 0.7])
    preference = (length > 0).astype(float)
    ((slope, base),) = fit_length(length, preference, np.ones((1, 6)), ridge=a_flat_likelihood)
    residual = preference - 1 / (1 + np.exp(-(slope * length + base)))
    assert slope > 0
    assert residual.sum() == pytest.approx(0.0, abs=1e-9)
    assert (length * residual).sum() == pytest.approx(a_flat_likelihood * slope, rel=1e-4)


@pytest.mark.parametrize(("won", "better"), [(1.0, "B"), (0.0, "A")])
def test_where_one_model_always_wins_length_explains_nothing(won, better):
    found = win_rate(with_lengths((won, 5), (won, -3), (won, 40)), resamples=50)
    controlled = found.length_controlled
    # Wilson's interval of 3 of 3: 1 / (1 + 1.96^2 / 3) = 0.4385 and above.
    least = 1 / (1 + 1.95996**2 / 3)
    low, high = (least, 1.0) if won else (0.0, 1 - least)
    for estimate in (found.win_rate, controlled.win_rate):
        assert (estimate.value, estimate.low, estimate.high) == (
            won,
            pytest.approx(low, abs=1e-5),
            pytest.approx(high, abs=1e-5),
        )
    assert (controlled.length_weight, controlled.base_weight) == (None, None)
    assert f"{better} is preferred everywhere" in controlled.note
    assert controlled.note in table(found)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_answers_of_equal_length_leave_the_win_rate_as_it_is():
    found = win_rate(with_lengths((1.0, 0), (1.0, 0), (0.0, 0), (0.5, 0)), resamples=50)
    assert found.length_controlled.win_rate == found.win_rate
    assert found.length_controlled.base_weight == pytest.approx(math.log(0.625 / 0.375))
    assert "as long as their rivals" in found.length_controlled.note


def test_one_difference_everywhere_cannot_be_told_from_quality():
    found = win_rate(with_lengths((1.0, 7), (0.0, 7), (1.0, 7)), resamples=50)
    assert found.length_controlled.win_rate is None
    assert "B's completions are longer by 7 characters everywhere" in found.length_controlled.note
    assert "none" in table(found)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_draws_with_one_verdict_only_are_win_rates_of_0_and_1():
    """Three prompts, one lost: 8 of 27 draws hold only won prompts, so the upper end of the interval is 1."""
    found = length_controlled(with_lengths((1.0, 20), (1.0, -10), (0.0, 5)), resamples=400)
    assert found.win_rate.high == 1.0
    assert 0.0 <= found.win_rate.low < found.win_rate.value < 1.0


def test_the_table_says_it_all():
    judgments = [dataclasses.replace(one, unparsed=1) for one in with_lengths((1.0, 7), (0.5, -7), (1.0, 40))]
    text = table(win_rate(judgments, resamples=50), a="base.jsonl", b="tuned.jsonl")
    assert text.startswith("B (tuned.jsonl) against A (base.jsonl)")
    for words in (
        "0.8333",
        "2 wins, 0 losses, 1 ties",
        "p = 0.5000",
        "3 of 6 verdicts could not be read",
        "100 (A) and 113 (B) characters",
    ):
        assert words in text


def test_judgments_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="there are no judgments"):
        win_rate([])
    with pytest.raises(InputError, match=r"prompt 0 holds a preference of 1\.5"):
        win_rate(judged((1.5, 0.0)))
    with pytest.raises(InputError, match="prompt 0 holds a preference of nan"):
        win_rate(judged((0.0, math.nan)))
    with pytest.raises(InputError, match="Prompt 0, sample 0 is judged twice"):
        win_rate(judged((1.0, 1.0)) * 2)
