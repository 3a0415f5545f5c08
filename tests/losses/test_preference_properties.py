"""What every preference loss promises: padding, weights, shapes, gradients, extreme inputs, beta -> 0."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from posttrain_jax.losses import anchored, dpo, kto, reference_free

CHOSEN = jnp.array([-4.0, -7.5, -3.0, -9.0])
REJECTED = jnp.array([-6.25, -6.0, -3.25, -12.0])
REFERENCE_CHOSEN = jnp.array([-4.5, -6.75, -3.5, -8.0])
REFERENCE_REJECTED = jnp.array([-5.0, -7.0, -2.5, -11.25])
LOGPS = (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)


def filled(like, value):
    """A further argument of the loss: `value`, and NaN in rows whose log-probabilities are garbage."""
    return jnp.where(jnp.isfinite(like), jnp.full(like.shape, value, jnp.float32), jnp.nan)


# (chosen, rejected, reference chosen, reference rejected, weights, beta) -> LossOutput
LOSSES = {
    "dpo": lambda c, r, rc, rr, w, b: dpo.dpo_loss(c, r, rc, rr, beta=b, weights_B=w),
    "cdpo": lambda c, r, rc, rr, w, b: dpo.cdpo_loss(
        c, r, rc, rr, beta=b, label_smoothing=0.125, weights_B=w
    ),
    "robust": lambda c, r, rc, rr, w, b: dpo.robust_dpo_loss(
        c, r, rc, rr, beta=b, label_smoothing=0.125, weights_B=w
    ),
    "ipo": lambda c, r, rc, rr, w, b: dpo.ipo_loss(c, r, rc, rr, beta=b, weights_B=w),
    "ipo_mean": lambda c, r, rc, rr, w, b: dpo.ipo_mean_loss(
        c, r, rc, rr, filled(c, 3.0), filled(c, 5.0), beta=b, weights_B=w
    ),
    "hinge": lambda c, r, rc, rr, w, b: dpo.hinge_loss(c, r, rc, rr, beta=b, weights_B=w),
    "normalized": lambda c, r, rc, rr, w, b: dpo.normalized_dpo_loss(
        c, r, rc, rr, filled(c, 3.0), filled(c, 5.0), beta=b, weights_B=w
    ),
    "rdpo": lambda c, r, rc, rr, w, b: dpo.rdpo_loss(
        c, r, rc, rr, filled(c, 3.0), filled(c, 5.0), beta=b, alpha=0.125, weights_B=w
    ),
    "dpop": lambda c, r, rc, rr, w, b: dpo.dpop_loss(c, r, rc, rr, beta=b, lambda_=5.0, weights_B=w),
    "tdpo1": lambda c, r, rc, rr, w, b: dpo.tdpo1_loss(
        c, r, rc, rr, filled(c, 0.5), filled(c, 1.5), beta=b, weights_B=w
    ),
    "tdpo2": lambda c, r, rc, rr, w, b: dpo.tdpo2_loss(
        c, r, rc, rr, filled(c, 0.5), filled(c, 1.5), beta=b, alpha=0.5, weights_B=w
    ),
    "exo": lambda c, r, rc, rr, w, b: dpo.exo_loss(c, r, rc, rr, beta=b, label_smoothing=0.125, weights_B=w),
    "rpo": lambda c, r, rc, rr, w, b: dpo.rpo_loss(
        c, r, rc, rr, filled(c, 2.0), filled(c, 1.5), beta=b, eta=1.0, weights_B=w
    ),
    "dpo_nll": lambda c, r, rc, rr, w, b: dpo.dpo_nll_loss(
        c, r, rc, rr, -c, filled(c, 3.0), beta=b, alpha=0.5, weights_B=w
    ),
    "apo_zero": lambda c, r, rc, rr, w, b: anchored.apo_zero_loss(c, r, rc, rr, beta=b, weights_B=w),
    "apo_down": lambda c, r, rc, rr, w, b: anchored.apo_down_loss(c, r, rc, rr, beta=b, weights_B=w),
    "nca": lambda c, r, rc, rr, w, b: anchored.nca_loss(c, r, rc, rr, beta=b, weights_B=w),
    "bco": lambda c, r, rc, rr, w, b: anchored.bco_loss(c, r, rc, rr, beta=b, delta=0.25, weights_B=w),
    "bco_pair": lambda c, r, rc, rr, w, b: anchored.bco_pair_loss(c, r, rc, rr, beta=b, weights_B=w),
    "sppo": lambda c, r, rc, rr, w, b: anchored.sppo_loss(
        c, r, rc, rr, filled(c, 0.75), filled(c, 0.25), beta=b, weights_B=w
    ),
    "sppo_hard": lambda c, r, rc, rr, w, b: anchored.sppo_hard_loss(c, r, rc, rr, beta=b, weights_B=w),
    "slic": lambda c, r, rc, rr, w, b: reference_free.slic_loss(
        c, r, rc, delta=1.0, lambda_=0.5, weights_B=w
    ),
    "simpo": lambda c, r, rc, rr, w, b: reference_free.simpo_loss(
        c, r, filled(c, 3.0), filled(c, 5.0), beta=b, gamma=0.5, weights_B=w
    ),
    "orpo": lambda c, r, rc, rr, w, b: reference_free.orpo_loss(
        c, r, filled(c, 3.0), filled(c, 5.0), lambda_=0.25, weights_B=w
    ),
    "cpo": lambda c, r, rc, rr, w, b: reference_free.cpo_loss(
        c, r, filled(c, 3.0), beta=b, alpha=1.0, weights_B=w
    ),
    "kto_good": lambda c, r, rc, rr, w, b: kto.kto_loss(
        c, rc, filled(c, 1), beta=b, kl_baseline=0.5, desirable_weight=1.25, weights_B=w
    ),
    "kto_bad": lambda c, r, rc, rr, w, b: kto.kto_loss(
        c, rc, filled(c, 0), beta=b, kl_baseline=0.5, undesirable_weight=0.75, weights_B=w
    ),
    "bco_unpaired": lambda c, r, rc, rr, w, b: kto.bco_unpaired_loss(
        c, rc, filled(c, 1), beta=b, delta=0.25, weights_B=w
    ),
}
every_loss = pytest.mark.parametrize("name", sorted(LOSSES))


def total(name, weights, beta=0.5):
    return lambda *logps: LOSSES[name](*logps, weights, beta).loss.sum()


@every_loss
def test_a_row_of_weight_0_has_no_loss_no_gradient_and_no_metric(name):
    """With rows of garbage under weight 0 every number is that of the batch without them (padding invariance)."""
    garbage = jnp.array([math.nan, math.inf, -math.inf])
    padded = tuple(jnp.concatenate([logps, garbage]) for logps in LOGPS)
    weights = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    loss, bare = LOSSES[name](*padded, weights, 0.5), LOSSES[name](*LOGPS, None, 0.5)
    np.testing.assert_array_equal(loss.loss, np.append(bare.loss, np.zeros(3)))
    assert loss.count == bare.count == 4
    for metric, value in bare.metrics.items():
        np.testing.assert_allclose(loss.metrics[metric].sum, value.sum, rtol=1e-6)
        assert loss.metrics[metric].count == value.count
    gradients = jax.grad(total(name, weights), argnums=(0, 1, 2, 3))(*padded)
    wanted = jax.grad(total(name, None), argnums=(0, 1, 2, 3))(*LOGPS)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_array_equal(gradient, np.append(want, np.zeros(3)))


@every_loss
def test_weights_multiply_the_loss_and_add_up_to_the_count(name):
    weights = jnp.array([2.0, 0.5, 1.0, 3.0])
    loss, bare = LOSSES[name](*LOGPS, weights, 0.5), LOSSES[name](*LOGPS, None, 0.5)
    np.testing.assert_allclose(loss.loss, weights * bare.loss, rtol=1e-6)
    assert loss.count == 6.5
    np.testing.assert_allclose(loss.metrics["loss"].sum, loss.loss.sum(), rtol=1e-6)
    assert loss.loss_B is loss.loss


@every_loss
def test_any_shape_and_any_split_into_micro_batches(name):
    bare = LOSSES[name](*LOGPS, None, 0.5)
    square = LOSSES[name](*(logps.reshape(2, 2) for logps in LOGPS), jnp.ones((2, 2)), 0.5)
    np.testing.assert_allclose(square.loss, bare.loss.reshape(2, 2), rtol=1e-6)
    halves = [LOSSES[name](*(logps[part] for logps in LOGPS), None, 0.5) for part in (slice(2), slice(2, 4))]
    assert halves[0].count + halves[1].count == bare.count
    np.testing.assert_allclose(halves[0].loss.sum() + halves[1].loss.sum(), bare.loss.sum(), rtol=1e-6)
    scalar = LOSSES[name](*(logps[1] for logps in LOGPS), None, 0.5)
    np.testing.assert_allclose(scalar.loss, bare.loss[1], rtol=1e-6)


@every_loss
def test_gradients_are_those_of_finite_differences(name):
    check_grads(total(name, None), LOGPS, order=1, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2, eps=1e-2)


@every_loss
@pytest.mark.parametrize("far", [3e4, -3e4])
def test_extreme_inputs_have_finite_losses_and_gradients(name, far):
    """Log-ratios of 30,000 nats, where e^x is far out of range, in either answer and either model."""
    for place in range(4):
        logps = [jnp.full((1,), -5.0)] * 4
        logps[place] = logps[place] + far
        value, gradients = jax.value_and_grad(total(name, None), argnums=(0, 1, 2, 3))(*logps)
        assert np.isfinite(value)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


@every_loss
def test_runs_under_jit_in_bfloat16_and_returns_float32(name):
    loss = jax.jit(lambda *logps: LOSSES[name](*logps, None, 0.5))(
        *(logps.astype(jnp.bfloat16) for logps in LOGPS)
    )
    # These numbers are exact in bfloat16, so nothing is lost before the float32 arithmetic.
    np.testing.assert_allclose(loss.loss, LOSSES[name](*LOGPS, None, 0.5).loss, rtol=1e-5, atol=1e-6)
    assert loss.loss.dtype == jnp.float32
    assert loss.count.dtype == jnp.float32


@every_loss
def test_arrays_of_different_shapes_are_refused(name):
    """[B] beside [B, 1] would broadcast to [B, B]: every row against every other."""
    column = tuple(logps[:, None] for logps in LOGPS)
    with pytest.raises(ValueError, match="one shape"):
        LOSSES[name](LOGPS[0], *column[1:], None, 0.5)
    with pytest.raises(ValueError, match="one shape"):
        LOSSES[name](*LOGPS, jnp.ones((4, 1)), 0.5)


LOG_2 = math.log(2)
# At beta = 0 nothing depends on the log-probabilities any more, and each term is at s(0) = 1/2.
LIMITS = {
    "dpo": LOG_2,
    "cdpo": LOG_2,
    "robust": LOG_2,  # (1 - e - e) log 2 / (1 - 2e)
    "hinge": 1.0,
    "normalized": LOG_2,
    "rdpo": math.log1p(math.exp(0.25)),  # alpha (3 - 5) = -0.25 is left
    "dpop": LOG_2,
    "tdpo1": LOG_2,
    "tdpo2": LOG_2,
    "exo": 0.5 * math.log(0.5 / 0.875) + 0.5 * math.log(0.5 / 0.125),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "nca": 2 * LOG_2,
    "bco": math.log1p(math.exp(0.25)) + math.log1p(math.exp(-0.25)),
    "bco_pair": 2 * LOG_2,
    "simpo": math.log1p(math.exp(0.5)),
    "kto_good": 1.25 / 2,
    "kto_bad": 0.75 / 2,
}


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_beta_towards_0(name):
    loss = LOSSES[name](*LOGPS, None, 1e-7)
    np.testing.assert_allclose(loss.loss, np.full(4, LIMITS[name]), rtol=1e-5)
    gradients = jax.grad(total(name, None, beta=1e-7), argnums=(0, 1))(*LOGPS)
    np.testing.assert_allclose(gradients, np.zeros((2, 4)), atol=1e-6)
