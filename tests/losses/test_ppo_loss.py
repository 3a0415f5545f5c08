"""PPO's losses and metrics: by hand, gradients, TRL's formulas in float64, extreme ratios, masks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from posttrain_jax.core.types import Metric
from posttrain_jax.losses import ppo

# Ratios 2, 2, 1/2, 1/2 with advantages 1, -1, 1, -1.
OLD = jnp.full((1, 4), -1.0)
NEW = OLD + jnp.log(jnp.array([[2.0, 2.0, 0.5, 0.5]]))
ADVANTAGES = jnp.array([[1.0, -1.0, 1.0, -1.0]])
ALL = jnp.ones((1, 4), jnp.int32)


def mean(metric: Metric) -> float:
    return float(metric.sum / metric.count)


def policy_gradient(logps, old, advantages, mask, **options):
    return jax.grad(lambda x: ppo.clipped_policy_loss(x, old, advantages, mask, **options).loss.sum())(logps)


def random_tokens(seed=0, shape=(4, 6)):
    """New and old log-probabilities, advantages, values, old values, returns, mask, in float64."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=shape)
    new = old + 0.4 * rng.normal(size=shape)
    advantages, values, returns = rng.normal(size=(3, *shape))
    old_values = values + 0.4 * rng.normal(size=shape)
    return new, old, advantages, values, old_values, returns, rng.random(shape) < 0.7


def test_policy_loss_by_hand():
    """clip 1/4: max(-2, -1.25), max(2, 1.25), max(-0.5, -0.75), max(0.5, 0.75): the first and last are clipped."""
    loss = ppo.clipped_policy_loss(NEW, OLD, ADVANTAGES, ALL, clip=0.25)
    np.testing.assert_allclose(loss.loss, [[-1.25, 2.0, -0.5, 0.75]], rtol=1e-6)
    assert loss.count == 4
    assert mean(loss.metrics["loss"]) == pytest.approx(0.25)
    assert mean(loss.metrics["clip_fraction"]) == 0.5
    assert mean(loss.metrics["ratio"]) == pytest.approx(1.25)


def test_approx_kl_by_hand():
    """-log r = -ln 2 twice and ln 2 twice: mean 0. k2 = (ln 2)^2 / 2. k3 = 1 - ln 2 twice, -1/2 + ln 2 twice: 1/4."""
    metrics = ppo.clipped_policy_loss(NEW, OLD, ADVANTAGES, ALL, clip=0.25).metrics
    assert mean(metrics["approx_kl_k1"]) == pytest.approx(0.0, abs=1e-6)
    assert mean(metrics["approx_kl_k2"]) == pytest.approx(math.log(2) ** 2 / 2, rel=1e-6)
    assert mean(metrics["approx_kl_k3"]) == pytest.approx(0.25, rel=1e-6)
    # The direction: a policy that has left its tokens, r = 1/e: k1 = 1, k3 = 1/e - 1 + 1.
    left = ppo.clipped_policy_loss(OLD - 1.0, OLD, ADVANTAGES, ALL, clip=0.25).metrics
    assert mean(left["approx_kl_k1"]) == pytest.approx(1.0)
    assert mean(left["approx_kl_k3"]) == pytest.approx(math.exp(-1))


def test_clip_high_by_hand():
    """clip 1/4 below, 1/2 above: max(-2, -1.5); 2; max(-0.5, -0.75); max(0.5, 0.75)."""
    loss = ppo.clipped_policy_loss(NEW, OLD, ADVANTAGES, ALL, clip=0.25, clip_high=0.5)
    np.testing.assert_allclose(loss.loss, [[-1.5, 2.0, -0.5, 0.75]], rtol=1e-6)


def test_dual_clip_by_hand():
    """c = 3/2: where A = -1 the loss is at most 1.5, so 2 becomes 1.5; 0.75 and positive advantages stay."""
    loss = ppo.clipped_policy_loss(NEW, OLD, ADVANTAGES, ALL, clip=0.25, dual_clip=1.5)
    np.testing.assert_allclose(loss.loss, [[-1.25, 1.5, -0.5, 0.75]], rtol=1e-6)
    assert mean(loss.metrics["dual_clip_fraction"]) == 0.25
    assert mean(loss.metrics["clip_fraction"]) == 0.5


def test_policy_gradient_by_hand():
    """-A r where the free side is the larger, else 0: 0, 2, -0.5, 0; at the dual bound 0 too."""
    gradient = policy_gradient(NEW, OLD, ADVANTAGES, ALL, clip=0.25)
    np.testing.assert_allclose(gradient, [[0.0, 2.0, -0.5, 0.0]], rtol=1e-6)
    dual = policy_gradient(NEW, OLD, ADVANTAGES, ALL, clip=0.25, dual_clip=1.5)
    np.testing.assert_allclose(dual, [[0.0, 0.0, -0.5, 0.0]], rtol=1e-6)
    below = policy_gradient(NEW, OLD, ADVANTAGES, ALL, clip=0.25, dual_clip=2.5)
    np.testing.assert_allclose(below, gradient)


def test_at_ratio_one_the_gradient_is_reinforce():
    """New = old: both sides are equal, and the gradient is -A exactly, not half of it."""
    np.testing.assert_array_equal(policy_gradient(OLD, OLD, ADVANTAGES, ALL, clip=0.2), -ADVANTAGES)
    loss = ppo.clipped_policy_loss(OLD, OLD, ADVANTAGES, ALL, clip=0.2)
    assert mean(loss.metrics["clip_fraction"]) == 0.0
    assert mean(loss.metrics["ratio"]) == 1.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"clip_high": 0.28}, {"dual_clip": 1.1}])
def test_gradient_is_the_formula(seed, options):
    """-A r, but 0 where A > 0 and r > 1 + clip_high, where A < 0 and r < 1 - clip, and where A < 0 and r > c."""
    new, old, advantages, _, _, _, mask = random_tokens(seed)
    got = policy_gradient(
        *(jnp.asarray(x, jnp.float32) for x in (new, old, advantages, mask)), clip=0.2, **options
    )
    ratio = np.exp(new - old)
    stopped = (advantages > 0) & (ratio > 1 + options.get("clip_high", 0.2))
    stopped |= (advantages < 0) & ((ratio < 0.8) | (ratio > options.get("dual_clip", np.inf)))
    assert stopped[mask].any()
    np.testing.assert_allclose(got, np.where(mask & ~stopped, -advantages * ratio, 0.0), rtol=1e-5)


def test_only_the_first_argument_has_a_gradient():
    def policy(old, advantages):
        return ppo.clipped_policy_loss(NEW, old, advantages, ALL, clip=0.25).loss.sum()

    def value(old, returns):
        return ppo.clipped_value_loss(NEW, old, returns, ALL, clip=0.25).loss.sum()

    for function in (policy, value):
        for gradient in jax.grad(function, argnums=(0, 1))(OLD, ADVANTAGES):
            np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


@pytest.mark.parametrize("seed", range(4))
def test_against_trl_in_float64(seed):
    """TRL 1.12's PPO (mean over unmasked tokens), token by token in Python's floats."""
    new, old, advantages, values, old_values, returns, mask = random_tokens(seed)
    policy_losses, value_losses, clipped, value_clipped, approx_kl, ratios = [], [], [], [], [], []
    for place in zip(*np.nonzero(mask), strict=True):
        ratio = math.exp(new[place] - old[place])
        losses = (-advantages[place] * ratio, -advantages[place] * min(max(ratio, 0.8), 1.2))
        policy_losses.append(max(losses))
        clipped.append(losses[1] > losses[0])
        approx_kl.append(0.5 * (new[place] - old[place]) ** 2)
        ratios.append(ratio)
        near = min(max(values[place], old_values[place] - 0.3), old_values[place] + 0.3)
        errors = ((values[place] - returns[place]) ** 2, (near - returns[place]) ** 2)
        value_losses.append(0.5 * max(errors))
        value_clipped.append(errors[1] > errors[0])
    floats = (jnp.asarray(x, jnp.float32) for x in (new, old, advantages, values, old_values, returns))
    new, old, advantages, values, old_values, returns = floats
    policy = ppo.clipped_policy_loss(new, old, advantages, jnp.asarray(mask), clip=0.2)
    value = ppo.clipped_value_loss(values, old_values, returns, jnp.asarray(mask), clip=0.3)
    np.testing.assert_allclose(policy.loss[mask], policy_losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value.loss[mask], value_losses, rtol=1e-5, atol=1e-6)
    assert mean(policy.metrics["loss"]) == pytest.approx(np.mean(policy_losses), rel=1e-5, abs=1e-6)
    assert mean(policy.metrics["clip_fraction"]) == pytest.approx(np.mean(clipped))
    assert mean(policy.metrics["approx_kl_k2"]) == pytest.approx(np.mean(approx_kl), rel=1e-5)
    assert mean(value.metrics["loss"]) == pytest.approx(np.mean(value_losses), rel=1e-5)
    assert mean(value.metrics["value_clip_fraction"]) == pytest.approx(np.mean(value_clipped))
    assert float(ppo.ratio_max(new, old, jnp.asarray(mask))) == pytest.approx(max(ratios), rel=1e-5)
    assert any(clipped) and any(value_clipped)


@pytest.mark.parametrize("difference", [-jnp.inf, -200.0, -89.0, 89.0, 200.0])
def test_extreme_ratios_have_finite_losses_and_gradients(difference):
    """exp(89) is infinite in float32, and 0 * infinity is NaN in the gradient of a clipped token."""
    new = OLD + jnp.array([[difference, 0.0, difference, 0.0]])
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0]])
    for options in ({}, {"dual_clip": 3.0}):
        loss = ppo.clipped_policy_loss(new, OLD, advantages, ALL, clip=0.2, **options)
        assert np.isfinite(loss.loss).all()
        assert all(np.isfinite(mean(metric)) for metric in loss.metrics.values())
        gradient = policy_gradient(new, OLD, advantages, ALL, clip=0.2, **options)
        # The two tokens at ratio 1 keep theirs, whatever their neighbors do.
        np.testing.assert_array_equal(gradient, [[0.0, -1.0, 0.0, 1.0]])
    if difference > 0:
        bounded = ppo.clipped_policy_loss(new, OLD, advantages, ALL, clip=0.2, dual_clip=3.0)
        np.testing.assert_allclose(bounded.loss, [[-1.2, -1.0, 3.0, 1.0]], rtol=1e-6)


def test_what_is_masked_is_not_there():
    """Garbage under the mask changes nothing: values, metrics and gradients are those of the tokens alone."""
    new, old, advantages, values, old_values, returns, mask = random_tokens(7, (1, 12))
    policy_arrays = [x.astype(np.float32) for x in (new, old, advantages)]
    value_arrays = [x.astype(np.float32) for x in (values, old_values, returns)]
    garbage = np.resize(np.float32([np.nan, np.inf, 1e30, -np.inf]), mask.shape)
    assert (~mask).sum() >= 3
    for function, arrays in (
        (jax.jit(lambda *a: ppo.clipped_policy_loss(*a, clip=0.2, dual_clip=1.1)), policy_arrays),
        (jax.jit(lambda *a: ppo.clipped_value_loss(*a, clip=0.2)), value_arrays),
    ):
        dirty = [np.where(mask, x, garbage) for x in arrays]
        alone = [np.asarray(x)[mask] for x in arrays]
        whole, cut = function(*dirty, mask), function(*alone, np.ones(int(mask.sum())))
        np.testing.assert_allclose(np.asarray(whole.loss)[mask], cut.loss, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(whole.loss)[~mask], 0.0)
        assert whole.count == cut.count == mask.sum()
        for name, metric in whole.metrics.items():
            np.testing.assert_allclose(metric.sum, cut.metrics[name].sum, rtol=1e-5, atol=1e-6)
        gradient = jax.jit(jax.grad(lambda *a, f=function: f(*a, mask).loss.sum()))(*dirty)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0.0)
    assert ppo.ratio_max(np.where(mask, policy_arrays[0], np.inf), policy_arrays[1], mask) < 20


def test_an_empty_mask():
    nothing = jnp.zeros((1, 4))
    for loss in (
        ppo.clipped_policy_loss(NEW, OLD, ADVANTAGES, nothing, clip=0.2, dual_clip=3.0),
        ppo.clipped_value_loss(NEW, OLD, ADVANTAGES, nothing, clip=0.2),
    ):
        assert loss.count == 0
        np.testing.assert_array_equal(loss.loss, np.zeros((1, 4)))
        assert all(metric.sum == 0 and metric.count == 0 for metric in loss.metrics.values())
    np.testing.assert_array_equal(policy_gradient(NEW, OLD, ADVANTAGES, nothing, clip=0.2), np.zeros((1, 4)))
    assert ppo.ratio_max(NEW, OLD, nothing) == 0.0
    assert ppo.ratio_max(jnp.zeros((0, 4)), jnp.zeros((0, 4)), jnp.zeros((0, 4))) == 0.0


def test_bfloat16_is_computed_in_float32():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in random_tokens(3)[:3]]
    wide = [x.astype(jnp.float32) for x in arrays]
    mask = jnp.ones((4, 6), bool)
    for function in (
        lambda *a: ppo.clipped_policy_loss(*a, mask, clip=0.2).loss,
        lambda *a: ppo.clipped_value_loss(*a, mask, clip=0.2).loss,
        lambda *a: ppo.ratio_max(a[0], a[1], mask),
        lambda *a: ppo.entropy_of_logits(a[0]),
    ):
        low = function(*arrays)
        assert low.dtype == jnp.float32
        np.testing.assert_array_equal(low, function(*wide))


@pytest.mark.parametrize(
    "options",
    [{"clip": 0.0}, {"clip": -0.1}, {"clip": 0.2, "clip_high": 0.0}, {"clip": 0.2, "dual_clip": 1.0}],
)
def test_clips_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="above"):
        ppo.clipped_policy_loss(NEW, OLD, ADVANTAGES, ALL, **options)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        ppo.clipped_policy_loss(NEW, OLD, jnp.zeros((1,)), ALL, clip=0.2)
    with pytest.raises(ValueError, match="one shape"):
        ppo.clipped_value_loss(NEW, OLD[:, :3], OLD, ALL, clip=0.2)
    with pytest.raises(ValueError, match="clip is above 0"):
        ppo.clipped_value_loss(NEW, OLD, OLD, ALL, clip=-0.2)


def test_whole_answers_are_clipped_by_their_own_ratio():
    """Log-ratios 0.1 and 0.2 are inside the clip as tokens of ratio 1.11 and 1.22 at 0.25; as an answer of 1.35 not."""
    tokens = jnp.array([[0.1, 0.2]])
    ones = jnp.ones((1, 2))
    each = ppo.clipped_policy_loss(tokens, 0 * tokens, ones, ones, clip=0.25)
    assert mean(each.metrics["clip_fraction"]) == 0.0
    answer = ppo.clipped_policy_loss(tokens.sum(1), jnp.zeros(1), jnp.ones(1), jnp.ones(1), clip=0.25)
    np.testing.assert_allclose(answer.loss_B, [-1.25])
    assert mean(answer.metrics["clip_fraction"]) == 1.0


# R = 2, V_old = 0, clip 0.2: V = 1 moved towards R (0.2 is left of it), -1 away from it, 0.1 within the clip.
VALUES = jnp.array([[1.0, -1.0, 0.1]])
RETURNS = jnp.full((1, 3), 2.0)
ONES = jnp.ones((1, 3))


def test_value_loss_by_hand():
    """max(1, 1.8^2 = 3.24), max(9, 2.2^2 = 4.84), 1.9^2 = 3.61, each over 2."""
    loss = ppo.clipped_value_loss(VALUES, 0 * VALUES, RETURNS, ONES, clip=0.2)
    np.testing.assert_allclose(loss.loss, [[1.62, 4.5, 1.805]], rtol=1e-6)
    assert mean(loss.metrics["value_clip_fraction"]) == pytest.approx(1 / 3)
    assert mean(loss.metrics["values"]) == pytest.approx(0.1 / 3)
    assert mean(loss.metrics["returns"]) == 2.0


@pytest.mark.parametrize("clip", [None, 0, 0.0])
def test_value_loss_without_a_clip(clip):
    """1 / 2, 9 / 2, 3.61 / 2."""
    loss = ppo.clipped_value_loss(VALUES, 0 * VALUES, RETURNS, ONES, clip=clip)
    np.testing.assert_allclose(loss.loss, [[0.5, 4.5, 1.805]], rtol=1e-6)
    assert loss.metrics["value_clip_fraction"].sum == 0


def test_value_gradient_by_hand():
    """V - R, and 0 where the clipped side is the larger: 0, -3, -1.9."""
    gradient = jax.grad(
        lambda v: ppo.clipped_value_loss(v, jnp.zeros((1, 3)), RETURNS, ONES, clip=0.2).loss.sum()
    )(VALUES)
    np.testing.assert_allclose(gradient, [[0.0, -3.0, -1.9]], rtol=1e-6)


def test_explained_variance_by_hand():
    """R = 1, 3 and V = 1.5, 2.5: errors -0.5, 0.5 with variance 0.25, of 1: 0.75. A constant error explains all."""
    returns = jnp.array([[1.0, 3.0]])
    ones = jnp.ones((1, 2))

    def explained(values, returns=returns):
        loss = ppo.clipped_value_loss(values, values, returns, ones, clip=0.2)
        return float(ppo.explained_variance(loss.metrics))

    assert explained(jnp.array([[1.5, 2.5]])) == pytest.approx(0.75)
    assert explained(returns + 4.0) == pytest.approx(1.0)
    assert explained(jnp.zeros((1, 2))) == pytest.approx(0.0)
    assert explained(jnp.array([[3.0, 1.0]])) == pytest.approx(-3.0)
    assert math.isnan(explained(jnp.zeros((1, 2)), jnp.full((1, 2), 0.1)))


def test_explained_variance_of_micro_batches_is_that_of_the_whole():
    _, _, _, values, old_values, returns, mask = random_tokens(5)
    floats = [jnp.asarray(x, jnp.float32) for x in (values, old_values, returns)]

    def metrics(rows):
        return ppo.clipped_value_loss(*(x[rows] for x in floats), jnp.asarray(mask)[rows], clip=0.2).metrics

    parts = [metrics(slice(0, 1)), metrics(slice(1, 4))]
    added = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    want = 1 - np.var(returns[mask] - old_values[mask]) / np.var(returns[mask])
    assert float(ppo.explained_variance(added)) == pytest.approx(want, rel=1e-5)
    nothing = {name: Metric(metric.sum * 0, metric.count * 0) for name, metric in added.items()}
    assert math.isnan(float(ppo.explained_variance(nothing)))


def test_entropy_by_hand():
    """Four equal logits: ln 4. One of three impossible: ln 2. (1/4, 3/4): ln 4 - 3/4 ln 3. One alone: 0."""
    np.testing.assert_allclose(ppo.entropy_of_logits(jnp.full((2, 4), 7.0)), [math.log(4)] * 2, rtol=1e-6)
    logits = jnp.array([[5.0, 5.0, -jnp.inf], [0.0, math.log(3), -jnp.inf], [1.0, -jnp.inf, -jnp.inf]])
    want = [math.log(2), math.log(4) - 0.75 * math.log(3), 0.0]
    np.testing.assert_allclose(ppo.entropy_of_logits(logits), want, rtol=1e-6, atol=1e-7)


def test_entropy_gradient():
    """d/dlogit_v = -p_v (log p_v + H); 0 for what is impossible, never NaN."""
    logits = jnp.array([0.0, math.log(3), -jnp.inf, -200.0])
    gradient = jax.grad(ppo.entropy_of_logits)(logits)
    entropy = math.log(4) - 0.75 * math.log(3)
    want = [-0.25 * (math.log(0.25) + entropy), -0.75 * (math.log(0.75) + entropy), 0.0, 0.0]
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-7)
    check_grads(ppo.entropy_of_logits, (logits[:2],), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


def test_entropy_is_trls():
    """TRL: logsumexp(logits) - sum(softmax * logits), in float64."""
    logits = 3.0 * np.random.default_rng(0).normal(size=(3, 5, 11))
    normalizer = np.log(np.exp(logits).sum(-1))
    want = normalizer - (np.exp(logits - normalizer[..., None]) * logits).sum(-1)
    np.testing.assert_allclose(ppo.entropy_of_logits(jnp.asarray(logits)), want, rtol=1e-5)
