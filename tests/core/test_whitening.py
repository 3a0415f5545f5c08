"""Masked variance and whitening: Huang et al.'s printed example, a loop in float64, masks, extremes."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core.masking import biased_variance, unbiased_variance, whiten_biased, whiten_unbiased

# "The N Implementation Details of RLHF with PPO" (Huang, Liu, von Werra 2023), the example of detail 9.
EXAMPLE = jnp.array([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
BIASED = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
UNBIASED_FIRST_ROW = [0.1394, 0.5046, 0.8697]


def test_the_printed_example():
    """Four decimals are printed, so half a unit of the last is the tolerance."""
    ones = jnp.ones((3, 3))
    np.testing.assert_allclose(whiten_biased(EXAMPLE, ones, shift_mean=False), BIASED, rtol=0, atol=5e-5)
    unbiased = whiten_unbiased(EXAMPLE, ones, shift_mean=False)
    np.testing.assert_allclose(unbiased[0], UNBIASED_FIRST_ROW, rtol=0, atol=5e-5)
    np.testing.assert_allclose(
        whiten_biased(EXAMPLE, ones, shift_mean=True), np.array(BIASED) - 1.6, rtol=0, atol=5e-5
    )


def test_variances_by_hand():
    """1, 2, 6 (and NaN that is masked): mean 3, squares 4 + 1 + 9 = 14; over 3, and over 2."""
    values, mask = jnp.array([1.0, 2.0, jnp.nan, 6.0]), jnp.array([1, 1, 0, 1])
    assert float(biased_variance(values, mask)) == pytest.approx(14 / 3)
    assert float(unbiased_variance(values, mask)) == pytest.approx(7.0)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize(("whiten", "less"), [(whiten_biased, 0), (whiten_unbiased, 1)])
def test_against_a_loop(whiten, less, shift_mean):
    rng = np.random.default_rng(0)
    values, mask = 3.0 + 0.5 * rng.normal(size=(4, 7)), rng.random((4, 7)) < 0.6
    kept = [values[place] for place in zip(*np.nonzero(mask), strict=True)]
    mean = math.fsum(kept) / len(kept)
    variance = math.fsum((x - mean) ** 2 for x in kept) / (len(kept) - less)
    want = np.zeros((4, 7))
    for place in zip(*np.nonzero(mask), strict=True):
        want[place] = (values[place] - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    garbage = jnp.asarray(np.where(mask, values, np.nan))
    got = whiten(garbage, jnp.asarray(mask), shift_mean=shift_mean)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert got.dtype == jnp.float32


def test_the_small_number_is_inside_the_root():
    """Values +-1e-4: variance 1e-8, so 1e-4 / sqrt(2e-8) = 1 / sqrt(2); outside the root it would be 0.9999."""
    got = whiten_biased(jnp.array([1e-4, -1e-4]), jnp.ones(2), shift_mean=True)
    np.testing.assert_allclose(got, [math.sqrt(0.5), -math.sqrt(0.5)], rtol=1e-6)


@pytest.mark.parametrize("whiten", [whiten_biased, whiten_unbiased])
def test_few_values(whiten):
    """None: zeros. One, or all equal: 0 about the mean, and themselves where the mean is kept."""
    values = jnp.array([jnp.nan, 5.0, jnp.nan])
    for shift_mean in (True, False):
        np.testing.assert_array_equal(whiten(values, jnp.zeros(3), shift_mean=shift_mean), np.zeros(3))
    one = jnp.array([0, 1, 0])
    np.testing.assert_array_equal(whiten(values, one, shift_mean=True), np.zeros(3))
    np.testing.assert_array_equal(whiten(values, one, shift_mean=False), [0.0, 5.0, 0.0])
    np.testing.assert_array_equal(whiten(jnp.full(4, 2.5), jnp.ones(4), shift_mean=False), np.full(4, 2.5))


def test_bfloat16_is_computed_in_float32():
    values = jnp.asarray(np.random.default_rng(1).normal(size=(8, 64)) + 4.0, jnp.bfloat16)
    ones = jnp.ones((8, 64), bool)
    got = whiten_biased(values, ones, shift_mean=True)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, whiten_biased(values.astype(jnp.float32), ones, shift_mean=True))
    assert abs(float(got.mean())) < 1e-5 and float(got.std()) == pytest.approx(1.0, abs=1e-5)
