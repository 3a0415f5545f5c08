"""Combining scores: every value by hand, float32 in and out, the same under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards import combine


def close(found, expected, tolerance=1e-6):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(found), np.array(expected, np.float32), rtol=tolerance, atol=tolerance
    )


def test_weighted_sum():
    """2 * 1 - 0.5 * 4 = 0; 2 * 3 - 0.5 * 8 = 2."""
    components = {"quality": np.array([1.0, 3.0], np.float64), "length": np.array([4, 8])}
    close(combine.weighted_sum(components, {"length": -0.5, "quality": 2.0}), [0.0, 2.0])
    close(
        jax.jit(lambda c: combine.weighted_sum(c, {"length": -0.5, "quality": 2.0}))(components), [0.0, 2.0]
    )


def test_a_weighted_sum_does_not_depend_on_the_order_of_a_dict():
    """In float32 1e8 + 1 - 1e8 is 0 or 1, as it is added; by name it is (1e8 + 1) - 1e8 = 0."""
    values = {"a": 1e8, "b": 1.0, "c": -1e8}
    for order in ("abc", "cab", "bca"):
        components = {name: np.array([values[name]], np.float32) for name in order}
        assert float(combine.weighted_sum(components, dict.fromkeys(order, 1.0))[0]) == 0.0


@pytest.mark.parametrize(
    ("components", "weights", "words"),
    [
        ({"a": np.zeros(2)}, {"a": 1.0, "b": 1.0}, "weights are for a, b, its components are a;"),
        ({"a": np.zeros(2), "c": np.zeros(2)}, {"a": 1.0}, "weights are for a, its components are a, c"),
        ({}, {}, "weights are for nothing, its components are nothing"),
    ],
)
def test_weights_that_fit_no_components(components, weights, words):
    with pytest.raises(InputError, match=words):
        combine.weighted_sum(components, weights)


def test_piecewise_safety():
    """logit(0.15) = log(0.15 / 0.85) = -1.7346.

    1: an ordinary prompt and a safe answer: helpfulness. 2: an unsafe prompt: safety. 3: -1.74 is below the threshold
    (R_s = 0.1493): safety. 4: -1.73 is above it (0.1506): helpfulness. 5 and 6: scores of 40 and -120, whose float32
    sigmoids are 1 and 0, keep their logits.
    """
    safety = np.array([2.0, 2.0, -1.74, -1.73, 40.0, -120.0], np.float32)
    helpfulness = np.array([5.0, 5.0, 5.0, 5.0, 40.5, 3.0], np.float32)
    is_safety = np.array([0, 1, 0, 0, 1, 0])
    expected = [5.0, 2.0, -1.74, 5.0, 40.0, -120.0]
    close(combine.piecewise_safety(safety, helpfulness, is_safety), expected)
    close(jax.jit(combine.piecewise_safety)(safety, helpfulness, is_safety != 0), expected)
    # At 0.5 the threshold is the logit 0: 2, -1.74 and so on are on their sides of it.
    found = combine.piecewise_safety(safety, helpfulness, np.zeros(6), threshold=0.5)
    close(found, [5.0, 5.0, -1.74, -1.73, 40.5, -120.0])
    for threshold in (0.0, 1.0, -1.0):
        with pytest.raises(InputError, match="write a probability between 0 and 1"):
            combine.piecewise_safety(safety, helpfulness, is_safety, threshold=threshold)


def test_clip():
    close(combine.clip(np.array([-9.0, 0.5, 9.0]), low=-1.0, high=2.0), [-1.0, 0.5, 2.0])
    with pytest.raises(InputError, match="lower limit first"):
        combine.clip(np.zeros(1), low=1.0, high=-1.0)


def test_length_penalty():
    """0.1 for each token above 10: 12 tokens cost 0.2."""
    close(combine.length_penalty(np.array([0, 10, 11, 12]), free=10, per_token=0.1), [0.0, 0.0, -0.1, -0.2])


def test_unfinished_answers():
    """Replaced, a good answer and a bad one are equal; penalized, their difference of 3 is kept."""
    scores, ended = np.array([4.0, 4.0, 1.0]), np.array([True, False, False])
    close(combine.replace_unfinished(scores, ended), [4.0, -1.0, -1.0])
    close(combine.replace_unfinished(scores, ended, value=-10.0), [4.0, -10.0, -10.0])
    close(combine.penalize_unfinished(scores, ended, penalty=2.5), [4.0, 1.5, -1.5])
    # A score that is no number is not looked at where it is replaced.
    close(combine.replace_unfinished(np.array([np.nan]), np.array([0])), [-1.0])


def test_shapes_that_differ():
    with pytest.raises(ValueError, match="one array is"):
        combine.replace_unfinished(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="one array is"):
        combine.weighted_sum({"a": np.zeros(3), "b": np.zeros((3, 1))}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="one array is"):
        combine.piecewise_safety(np.zeros(2), np.zeros(2), np.zeros(3))
