"""SLiC-HF, SimPO, ORPO and CPO: by hand, and the values of TRL and of the papers' equations."""

from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import reference_free

HERE = pathlib.Path(__file__).parent
TRL = json.loads((HERE / "trl_values.json").read_text(encoding="utf-8"))
PAPER = json.loads((HERE / "paper_values.json").read_text(encoding="utf-8"))

CHOSEN, REJECTED = (jnp.array(TRL["pairs"][f"policy_{side}_logps"]) for side in ("chosen", "rejected"))
LENGTHS = [jnp.array(TRL["pairs"][f"{side}_lengths"]) for side in ("chosen", "rejected")]


def test_slic_by_hand():
    """delta = 1, lambda = 1/2, log pi = -1, -1.5, -2: max(0, 1 + 1 - 1.5) + 0.5 * 2 = 1.5; with y_l at -3 the hinge
    is max(0, 1 + 1 - 3) = 0 and the loss 1."""
    loss = reference_free.slic_loss(
        jnp.array([-1.0, -1.0]), jnp.array([-1.5, -3.0]), jnp.array([-2.0, -2.0]), delta=1.0, lambda_=0.5
    )
    np.testing.assert_allclose(loss.loss_B, [1.5, 1.0], rtol=1e-6)
    assert loss.metrics["rewards/margins"].sum == 2.5


def test_slic_equals_the_papers_equation_in_float64():
    want = PAPER["pairs"]["slic_loss"]
    target = jnp.array(PAPER["extra"]["target_logps"])
    loss = reference_free.slic_loss(CHOSEN, REJECTED, target, delta=want["delta"], lambda_=want["lambda"])
    np.testing.assert_allclose(loss.loss_B, want["loss"], rtol=1e-6)


def test_simpo_by_hand():
    """beta = 2, gamma = 1/2: 2 (-1/2 + 3/3) - 0.5 = 0.5, log(1 + e^-0.5) = 0.47407698; rewards -1 and -2."""
    loss = reference_free.simpo_loss(
        jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([2]), jnp.array([3]), beta=2.0, gamma=0.5
    )
    np.testing.assert_allclose(loss.loss_B, [0.47407698], rtol=1e-6)
    assert loss.metrics["rewards/chosen"].sum == -1.0
    assert loss.metrics["rewards/rejected"].sum == -2.0


def test_simpo_equals_trl():
    want = TRL["reference_free"]["simpo_loss"]
    loss = reference_free.simpo_loss(CHOSEN, REJECTED, *LENGTHS, beta=want["beta"], gamma=want["gamma"])
    np.testing.assert_allclose(loss.loss_B, want["loss"], rtol=2e-6)
    np.testing.assert_allclose(loss.metrics["rewards/chosen"].sum, sum(want["chosen_rewards"]), rtol=1e-6)


def test_orpo_by_hand():
    """P_w = 1/2 (odds 1) over 3 tokens, P_l = 1/5 (odds 1/4) over 2: log 2 - lambda log s(log 4) with s(log 4) = 4/5,
    lambda = 1/4: 0.69314718 + 0.25 * 0.22314355 = 0.74893307."""
    loss = reference_free.orpo_loss(
        jnp.array([3 * math.log(0.5)]),
        jnp.array([2 * math.log(0.2)]),
        jnp.array([3]),
        jnp.array([2]),
        lambda_=0.25,
    )
    np.testing.assert_allclose(loss.loss_B, [0.74893307], rtol=1e-6)
    np.testing.assert_allclose(loss.metrics["log_odds_ratio"].sum, math.log(4), rtol=1e-6)
    np.testing.assert_allclose(loss.metrics["nll_loss"].sum, math.log(2), rtol=1e-6)


def test_orpo_equals_trl():
    """TRL's odds term is stored; the NLL per token is log pi(y_w) / |y_w|: 21.5 / 12, 40.25 / 20, 12.015625 / 5,
    96.5 / 31, 5.75 / 3, 63.140625 / 16."""
    want = TRL["reference_free"]["orpo_loss"]
    loss = reference_free.orpo_loss(CHOSEN, REJECTED, *LENGTHS, lambda_=want["lambda"])
    nll = [21.5 / 12, 40.25 / 20, 12.015625 / 5, 96.5 / 31, 5.75 / 3, 63.140625 / 16]
    np.testing.assert_allclose(loss.loss_B, np.add(nll, want["odds_loss"]), rtol=2e-6)
    log_odds_ratio = loss.metrics["log_odds_ratio"]
    np.testing.assert_allclose(
        log_odds_ratio.sum / log_odds_ratio.count, want["mean_log_odds_ratio"], rtol=2e-6
    )
    np.testing.assert_allclose(loss.metrics["rewards/chosen"].sum, sum(want["chosen_rewards"]), rtol=1e-6)


def test_orpo_of_answers_that_are_certain_is_finite():
    """log P = 0 has infinite odds; -1e-6 stands for it, whose log odds are about log(1e6) = 13.8."""
    certain = jnp.zeros(1)

    def total(chosen, rejected):
        return reference_free.orpo_loss(
            chosen, rejected, jnp.array([4]), jnp.array([4]), lambda_=1.0
        ).loss.sum()

    for chosen, rejected in ((certain, certain - 8.0), (certain - 8.0, certain), (certain, certain)):
        value, gradients = jax.value_and_grad(total, argnums=(0, 1))(chosen, rejected)
        assert np.isfinite(value) and np.isfinite(gradients).all()
    log_odds = reference_free.orpo_loss(
        certain, jnp.array([4 * math.log(0.5)]), jnp.array([4]), jnp.array([4]), lambda_=1.0
    ).metrics["log_odds_ratio"]
    np.testing.assert_allclose(log_odds.sum, 6 * math.log(10), rtol=1e-3)


@pytest.mark.parametrize("x", [-1e-6, -1e-3, -0.5, -0.7, -5.0])
def test_log1mexp(x):
    """Against float64, where log(-expm1(x)) loses nothing for these x."""
    got = reference_free.log1mexp(jnp.float32(x))
    np.testing.assert_allclose(got, math.log(-math.expm1(float(np.float32(x)))), rtol=1e-6)
    slope = jax.grad(reference_free.log1mexp)(jnp.float32(x))
    np.testing.assert_allclose(slope, -1.0 / math.expm1(-float(np.float32(x))), rtol=1e-5)


def test_log1mexp_far_below_0():
    """log(1 - q) = -q - q^2 / 2 - ..., of which only the first term is left at q = e^-30."""
    np.testing.assert_allclose(reference_free.log1mexp(jnp.float32(-30.0)), -math.exp(-30.0), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(reference_free.log1mexp)(-30.0), -math.exp(-30.0), rtol=1e-6)


def test_cpo_by_hand():
    """beta = 1/2, alpha = 1: -log s(0.5 * 2) + 1 / 2 = 0.31326169 + 0.5 with two tokens in y_w."""
    loss = reference_free.cpo_loss(jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([2]), beta=0.5, alpha=1.0)
    np.testing.assert_allclose(loss.loss_B, [0.81326169], rtol=1e-6)
    assert loss.metrics["nll_loss"].sum == 0.5
    assert loss.metrics["rewards/margins"].sum == 1.0


def test_cpo_equals_trl():
    """TRL's method gives the preference term; its NLL is added elsewhere, so alpha = 0."""
    want = TRL["reference_free"]["cpo_loss"]
    loss = reference_free.cpo_loss(CHOSEN, REJECTED, LENGTHS[0], beta=want["beta"], alpha=0.0)
    np.testing.assert_allclose(loss.loss_B, want["loss"], rtol=2e-6)
    np.testing.assert_allclose(loss.metrics["rewards/chosen"].sum, sum(want["chosen_rewards"]), rtol=1e-6)
