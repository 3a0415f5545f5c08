"""Intervals and paired tests against SciPy, and against numbers done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.statistics import compare, permutation_test, ratio_estimates, share, sign_test


def rows_of(values):
    return [{"right": (float(value), 1.0)} for value in values]


def test_what_is_always_right_has_wilsons_interval_in_a_comparison_too():
    """54 of 54: z = 1.95996, 1 / (1 + z^2 / 54) = 0.93359."""
    ones, zeros = np.ones((54, 2)), np.column_stack([np.zeros(54), np.ones(54)])
    found = compare(ones, zeros, resamples=100)
    assert (found.a.low, found.a.high) == (pytest.approx(0.93359, abs=1e-5), 1.0)
    assert (found.b.low, found.b.high) == (0.0, pytest.approx(1 - 0.93359, abs=1e-5))


def test_sign_test_by_hand():
    """1 win, 5 losses: P(at most 1 of 6) = (1 + 6) / 64, two-sided 14 / 64."""
    assert sign_test(1, 5) == sign_test(5, 1) == 14 / 64
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0
    assert sign_test(0, 4) == 2 / 16


def test_permutation_test_by_hand():
    """|sum| of three equal differences is as large in 2 of the 8 signings; of 1, 2, 4 too; zeros do not count."""
    assert permutation_test(np.asarray([1.0, 1.0, 1.0]), resamples=8, seed=0) == 2 / 8
    assert permutation_test(np.asarray([1.0, 0.0, 2.0, 4.0]), resamples=8, seed=0) == 2 / 8
    assert permutation_test(np.zeros(5), resamples=8, seed=0) == 1.0


@pytest.mark.parametrize("resamples", [1 << 10, 1000])  # all signings, and fewer than there are
def test_permutation_test_is_scipys(resamples):
    differences = np.asarray([0.3, -0.1, 0.8, 0.2, 0.5, -0.4, 0.9, 0.1, 0.6, -0.2])
    expected = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
    ).pvalue
    found = permutation_test(differences, resamples=resamples, seed=3)
    # 1,000 draws of a p near 0.06 have a standard error of 0.0075.
    assert found == pytest.approx(expected, abs=1e-12 if resamples == 1 << 10 else 0.025)


def test_the_interval_of_a_share_is_as_wide_as_theory_says():
    """400 of 1,000 right: standard error sqrt(0.4 * 0.6 / 1000) = 0.0155, so 0.4 +- 1.96 * 0.0155 = 0.4 +- 0.030."""
    found = ratio_estimates(rows_of([1, 0, 0, 1, 0] * 200), resamples=4000, seed=0)["right"]
    assert found.value == 0.4
    assert found.low == pytest.approx(0.370, abs=0.004)
    assert found.high == pytest.approx(0.430, abs=0.004)
    exact = ratio_estimates(rows_of([1, 0]), resamples=0, seed=0)["right"]
    assert exact.low == exact.value == exact.high == 0.5


def test_all_right_is_not_certainty():
    """54 of 54: Wilson's interval begins at 1 / (1 + 1.96^2 / 54) = 0.9336; where resamples
    agree, as of that many rows; a loss of 0 everywhere is no share."""
    found = ratio_estimates(rows_of([1] * 54), resamples=10, seed=0, shares=True)["right"]
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.9336, abs=1e-4)
    found = ratio_estimates(rows_of([0] * 54), resamples=10, seed=0, shares=True)["right"]
    assert (found.value, found.low, found.high) == (0.0, 0.0, pytest.approx(1 - 0.9336, abs=1e-4))
    weighted = share(np.ones(11), np.asarray([1.0, 1.0, 0.5]))
    assert (weighted.value, weighted.high) == (1.0, 1.0)
    assert weighted.low == pytest.approx(1 / (1 + 1.95996**2 / 3), abs=1e-4)
    half = ratio_estimates([{"x": (1.0, 2.0)}] * 9, resamples=10, seed=0, shares=True)["x"]
    assert (half.low, half.high) == (0.5, 0.5)  # rows that are all half right do not differ
    none = ratio_estimates(rows_of([0] * 5), resamples=10, seed=0)["right"]
    assert (none.low, none.high) == (0.0, 0.0)


def test_what_belongs_to_one_row_is_resampled_together():
    """Ten rows of 100 checks, all right or all wrong: the interval is that of ten numbers, 0.5 +- 0.31, and not that of
    a thousand, 0.5 +- 0.03."""
    rows = [{"checks": (100.0 * (n % 2), 100.0)} for n in range(10)]
    found = ratio_estimates(rows, resamples=2000, seed=0)["checks"]
    assert found.value == 0.5
    assert found.low <= 0.25 and found.high >= 0.75


def test_a_ratio_weighs_rows_by_their_counts():
    """(1 + 9) / (2 + 18) and not the mean of 1/2 and 9/18 with equal weights; here both are 0.5, so 3 / 18 instead:
    (1 + 3) / (2 + 18) = 0.2."""
    found = ratio_estimates([{"x": (1.0, 2.0)}, {"x": (3.0, 18.0)}], resamples=10, seed=0)["x"]
    assert found.value == 0.2
    with pytest.raises(InputError, match="no row is left"):
        ratio_estimates([], resamples=10, seed=0)


def test_two_models_on_the_same_rows():
    """20 rows: both right on 10, b alone on 7, a alone on 1, none on 2. a = 11/20, b = 17/20, b - a = 6/20; McNemar's
    exact p = 2 * (1 + 8) / 2^8; with differences of +1 and -1 the permutation test is the same test."""
    a = np.asarray([1] * 10 + [0] * 7 + [1] + [0] * 2, float)
    b = np.asarray([1] * 10 + [1] * 7 + [0] + [0] * 2, float)
    ones = np.ones(20)
    found = compare(np.column_stack([a, ones]), np.column_stack([b, ones]))
    assert (found.a.value, found.b.value, found.difference.value) == (0.55, 0.85, pytest.approx(0.3))
    assert (found.rows, found.better, found.worse) == (20, 7, 1)
    assert found.sign_p == 18 / 256
    assert found.permutation_p == pytest.approx(18 / 256)
    # The standard error of the mean of 7 (+1), 1 (-1) and 12 (0) is sqrt((8/20 - 0.3^2) / 20) = 0.1245.
    assert found.difference.low == pytest.approx(0.3 - 1.96 * 0.1245, abs=0.06)
    assert found.difference.high == pytest.approx(0.3 + 1.96 * 0.1245, abs=0.06)
    # Paired: each model's own interval is much wider than that of the difference to itself.
    same = compare(np.column_stack([a, ones]), np.column_stack([a, ones]))
    assert (same.difference.low, same.difference.high, same.sign_p, same.permutation_p) == (
        0.0,
        0.0,
        1.0,
        1.0,
    )
    assert same.a.high - same.a.low > 0.3


def test_rows_that_do_not_belong_together_are_refused():
    one = np.asarray([[1.0, 2.0]])
    with pytest.raises(InputError, match="cannot be paired"):
        compare(one, np.asarray([[1.0, 3.0]]))
    with pytest.raises(InputError, match="nothing to compare"):
        compare(np.zeros((0, 2)), np.zeros((0, 2)))
