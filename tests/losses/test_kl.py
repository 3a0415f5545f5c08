"""KL estimators against the exact KL, by enumerating every token: which are right as a value, which as a gradient."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from posttrain_jax.losses.kl import adapted_kl_coefficient, categorical_kl, k1, k2, k3

POLICY = jnp.array([0.5, -1.0, 1.5, 0.0])
REFERENCE = jnp.array([1.0, 0.3, -0.7, 0.2])
REFERENCE_LOGPS = jax.nn.log_softmax(REFERENCE)


def expected(estimator, policy_logits=POLICY):
    """The exact expectation of an estimator over the policy's tokens."""
    logps = jax.nn.log_softmax(policy_logits)
    return jnp.sum(jnp.exp(logps) * estimator(logps, REFERENCE_LOGPS))


def expected_gradient(estimator):
    """The exact expectation of the estimator's gradient: tokens (their probabilities) held, log-probabilities not."""
    probabilities = jax.nn.softmax(POLICY)

    def loss(logits):
        return jnp.sum(probabilities * estimator(jax.nn.log_softmax(logits), REFERENCE_LOGPS))

    return jax.grad(loss)(POLICY)


def test_by_hand():
    """p = 1/2, q = 1/8: r = 1/4, -log r = ln 4; k2 = (ln 4)^2 / 2; k3 = 1/4 - 1 + ln 4. And p = q: all 0."""
    policy, reference = jnp.log(jnp.array([[0.5, 0.3]])), jnp.log(jnp.array([[0.125, 0.3]]))
    ln4 = math.log(4)
    np.testing.assert_allclose(k1(policy, reference), [[ln4, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(k2(policy, reference), [[ln4**2 / 2, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(k3(policy, reference), [[ln4 - 0.75, 0.0]], rtol=1e-6)


def test_the_exact_kl_by_hand():
    """(1/2, 1/2) against (1/4, 3/4): (ln 2 + ln(2/3)) / 2 = ln(4/3) / 2; logits may carry any constant."""
    policy, reference = jnp.array([[3.0, 3.0]]), jnp.log(jnp.array([[1.0, 3.0]]))
    np.testing.assert_allclose(categorical_kl(policy, reference), [math.log(4 / 3) / 2], rtol=1e-6)
    np.testing.assert_allclose(categorical_kl(policy, policy + 7.0), [0.0], atol=1e-7)


def test_as_a_value_k1_and_k3_are_unbiased_and_k2_is_not():
    exact = float(categorical_kl(POLICY, REFERENCE))
    assert exact == pytest.approx(0.8553, abs=1e-4)
    assert float(expected(k1)) == pytest.approx(exact, rel=1e-6)
    assert float(expected(k3)) == pytest.approx(exact, rel=1e-6)
    assert abs(float(expected(k2)) - exact) > 0.1


def test_as_a_loss_k2_has_the_gradient_of_the_kl_and_k1_and_k3_do_not():
    right = jax.grad(categorical_kl)(POLICY, REFERENCE)
    np.testing.assert_allclose(expected_gradient(k2), right, atol=1e-6)
    np.testing.assert_allclose(expected_gradient(k1), np.zeros(4), atol=1e-6)
    of_k3 = expected_gradient(k3)
    assert float(jnp.abs(of_k3 - right).max()) > 0.1
    # What k3 does follow: the other KL, of the reference from the policy.
    other = jax.grad(lambda logits: categorical_kl(REFERENCE, logits))(POLICY)
    np.testing.assert_allclose(of_k3, other, atol=1e-6)


def test_k1_as_a_reward_has_the_gradient_of_the_kl():
    held = jax.lax.stop_gradient

    def score_function(logps, reference_logps):
        return held(k1(logps, reference_logps)) * logps

    right = jax.grad(categorical_kl)(POLICY, REFERENCE)
    np.testing.assert_allclose(expected_gradient(score_function), right, atol=1e-6)


def test_k3_is_never_negative_and_keeps_its_digits_near_zero():
    """For log r = -e, k3 = e^2 / 2 - e^3 / 6: at e = 1e-3 that is 5.0e-7, which r - 1 - log r in float32 would lose."""
    difference = jnp.array([1e-3, -1e-3, 0.0, 3.0, -3.0])
    values = k3(difference, jnp.zeros(5))
    assert (values >= 0).all()
    assert float(values[0]) == pytest.approx(1e-6 / 2 - 1e-9 / 6, rel=0.01)


def test_what_the_policy_cannot_draw_adds_nothing():
    """-inf for the policy: as if the token were not there. -inf for the reference alone: infinite."""
    never = jnp.array([-jnp.inf, 0.5, 1.0])
    reference = jnp.array([0.0, 2.0, 1.0])
    # The excluded token takes reference probability away from the others: log q is lower by the same constant.
    without = categorical_kl(never[1:], reference[1:]) - math.log(
        (math.exp(2) + math.exp(1)) / (1 + math.exp(2) + math.exp(1))
    )
    assert float(categorical_kl(never, reference)) == pytest.approx(float(without), rel=1e-6)
    assert np.isfinite(jax.grad(categorical_kl)(never, reference)[1:]).all()
    assert categorical_kl(reference, never) == jnp.inf
    both = jnp.array([-jnp.inf, 2.0, 1.0])
    assert np.isfinite(categorical_kl(never, both))


def test_gradients_of_the_exact_kl():
    check_grads(categorical_kl, (POLICY, REFERENCE), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("kl", "want"),
    [
        (6.6, 0.15 * (1 + 0.1 * 0.05)),  # 10 % above the target
        (5.4, 0.15 * (1 - 0.1 * 0.05)),
        (6.0, 0.15),
        (60.0, 0.15 * (1 + 0.2 * 0.05)),  # far off: 0.2 at most
        (-1.0, 0.15 * (1 - 0.2 * 0.05)),  # an estimate may be negative
        (math.inf, 0.15 * (1 + 0.2 * 0.05)),
        (math.nan, 0.15),
    ],
)
def test_adapted_coefficient_by_hand(kl, want):
    """Ziegler et al.'s numbers: beta 0.15, target 6 nats, horizon 10,000; 500 episodes are 0.05 of it."""
    got = adapted_kl_coefficient(0.15, kl, target=6.0, horizon=10_000, episodes=500)
    assert got.dtype == jnp.float32 and got.shape == ()
    assert float(got) == pytest.approx(want, rel=1e-6)
    traced = jax.jit(lambda b, k: adapted_kl_coefficient(b, k, target=6.0, horizon=10_000, episodes=500))
    assert float(traced(jnp.float32(0.15), jnp.float32(kl))) == pytest.approx(want, rel=1e-6)


def test_the_coefficient_finds_the_kl_that_it_is_for():
    """A world where KL = 1 / beta: from 0.15 (6.7 nats) to the 0.5 that has 2 nats."""
    coefficient = jnp.float32(0.15)
    for _ in range(600):
        coefficient = adapted_kl_coefficient(
            coefficient, 1.0 / coefficient, target=2.0, horizon=10_000, episodes=512
        )
    assert float(coefficient) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0, "horizon": 100, "episodes": 1}, "above 0"),
        ({"target": 6.0, "horizon": 0, "episodes": 1}, "above 0"),
        ({"target": 6.0, "horizon": 100, "episodes": 500}, "negative"),
    ],
)
def test_adaptation_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adapted_kl_coefficient(0.1, 1.0, **options)
