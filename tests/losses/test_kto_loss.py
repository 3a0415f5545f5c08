"""KTO and unpaired BCO: by hand, and TRL's values. s is the logistic function."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.losses import anchored, kto

TRL = json.loads((pathlib.Path(__file__).parent / "trl_values.json").read_text(encoding="utf-8"))

# r = 1 (good), r = -1 (bad).
POLICY, REFERENCE, DESIRABLE = jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]), jnp.array([1, 0])


def test_kto_by_hand():
    """beta = 1, z0 = 1/2. Good: 2 (1 - s(0.5)) = 2 * 0.37754067. Bad: 3 (1 - s(1.5)) = 3 * 0.18242552."""
    loss = kto.kto_loss(
        POLICY,
        REFERENCE,
        DESIRABLE,
        beta=1.0,
        kl_baseline=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    np.testing.assert_allclose(loss.loss_B, [0.75508134, 0.54727657], rtol=1e-6)
    assert loss.count == 2
    assert loss.metrics["rewards/chosen"].sum == 1.0
    assert loss.metrics["rewards/chosen"].count == 1
    assert loss.metrics["rewards/rejected"].sum == -1.0
    assert loss.metrics["logps/rejected"].sum == -3.0
    assert loss.metrics["kl"].sum == 0.5


def test_kto_at_the_baseline_is_one_half():
    """r = z0: 1 - s(0) = 1/2 for good and bad."""
    loss = kto.kto_loss(POLICY, POLICY - 0.75, DESIRABLE, beta=0.3, kl_baseline=0.75)
    np.testing.assert_allclose(loss.loss_B, [0.5, 0.5], rtol=1e-6)


def test_kl_baseline_by_hand():
    """Log-ratios 2, -1, 5 with weights 1, 1, 0: mean 0.5. Log-ratios -2, 1: mean -0.5, so 0. No answers: 0."""
    reference = jnp.zeros(3)
    weights = jnp.array([1.0, 1.0, 0.0])
    assert kto.kto_kl_baseline(jnp.array([2.0, -1.0, jnp.nan]), reference, weights) == 0.5
    assert kto.kto_kl_baseline(jnp.array([-2.0, 1.0]), jnp.zeros(2)) == 0.0
    assert kto.kto_kl_baseline(jnp.array([2.0, 1.0, 5.0]), reference, jnp.zeros(3)) == 0.0


def test_the_baseline_has_no_gradient():
    def total(policy):
        baseline = kto.kto_kl_baseline(policy, REFERENCE) + policy.sum()
        return kto.kto_loss(policy, REFERENCE, DESIRABLE, beta=1.0, kl_baseline=baseline).loss.sum()

    def total_with_a_number(policy):
        return kto.kto_loss(policy, REFERENCE, DESIRABLE, beta=1.0, kl_baseline=-4.0).loss.sum()

    # At POLICY the log-ratios' mean is 0 and the sum -4: both functions have the same value and slope.
    np.testing.assert_array_equal(jax.grad(total)(POLICY), jax.grad(total_with_a_number)(POLICY))
    assert not np.any(jax.grad(lambda p: kto.kto_kl_baseline(p + 3.0, REFERENCE))(POLICY))


def test_kto_equals_trl():
    want = TRL["kto"]
    policy, reference = (
        jnp.array(TRL["pairs"][f"{model}_chosen_logps"] + TRL["pairs"][f"{model}_rejected_logps"])
        for model in ("policy", "reference")
    )
    mismatched = jnp.array(want["mismatched"])
    baseline = kto.kto_kl_baseline(policy[mismatched], reference[mismatched])
    np.testing.assert_allclose(baseline, want["kl_baseline"], rtol=1e-6)
    loss = kto.kto_loss(
        policy,
        reference,
        jnp.arange(12) < 6,
        beta=want["beta"],
        kl_baseline=baseline,
        desirable_weight=want["desirable_weight"],
        undesirable_weight=want["undesirable_weight"],
    )
    np.testing.assert_allclose(loss.loss_B, want["loss"], rtol=2e-6)


def test_unpaired_bco_by_hand():
    """beta = 1/2, delta = 1/4: -log s(0.5 - 0.25) = log(1 + e^-0.25) and -log s(0.25 + 0.5) = log(1 + e^-0.75)."""
    loss = kto.bco_unpaired_loss(POLICY, REFERENCE, DESIRABLE, beta=0.5, delta=0.25)
    np.testing.assert_allclose(
        loss.loss_B, [math.log1p(math.exp(-0.25)), math.log1p(math.exp(-0.75))], rtol=1e-6
    )


def test_two_answers_of_unpaired_bco_are_a_pair_of_bco():
    pair = anchored.bco_loss(POLICY[:1], POLICY[1:], REFERENCE[:1], REFERENCE[1:], beta=0.5, delta=0.25)
    single = kto.bco_unpaired_loss(POLICY, REFERENCE, DESIRABLE, beta=0.5, delta=0.25)
    np.testing.assert_allclose(single.loss.sum(), pair.loss.sum(), rtol=1e-6)
