"""Schedules by hand, decay mask, the guarded update, EMA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.optim import OPTIMIZERS, OptimOptions, decay_mask, make_optimizer, make_schedule
from posttrain_jax.core.updates import apply_gradients, new_state


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_decay_that_is_1_in_float32_is_refused(name):
    """The correction of the first update's bias would divide by 1 - 1 = 0."""
    with pytest.raises(InputError, match=rf"optim.{name} is 0.99999999; it must be .* at most 0.9999999\."):
        OptimOptions(**{name: 0.99999999})
    assert np.float32(getattr(OptimOptions(**{name: 0.9999999}), name)) < 1


def values(name, steps, **options):
    schedule = make_schedule(OptimOptions(schedule=name, lr=1.0, **options), steps=steps)
    return np.asarray([schedule(jnp.asarray(step)) for step in range(steps + 1)])


def test_warmup_ends_at_the_peak_and_never_starts_at_zero():
    """4 steps of warm-up: 1/4, 2/4, 3/4, 4/4, then the peak."""
    np.testing.assert_allclose(values("constant", 8, warmup=4)[:6], [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(values("constant", 8, warmup=0.5)[:6], [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    # From a fifth: 0.2 + 0.8 (t + 1) / 4.
    np.testing.assert_allclose(
        values("constant", 8, warmup=4, warmup_start=0.2)[:5], [0.4, 0.6, 0.8, 1.0, 1.0]
    )


def test_linear_by_hand():
    """From 1 to 0.2 over 4 steps: 1, 0.8, 0.6, 0.4, 0.2."""
    np.testing.assert_allclose(values("linear", 4, min_lr_ratio=0.2), [1.0, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_cosine_by_hand():
    """0.1 + 0.9 * (1 + cos(pi u)) / 2 at u = 0, 1/2, 1: 1, 0.55, 0.1."""
    np.testing.assert_allclose(values("cosine", 4, min_lr_ratio=0.1)[[0, 2, 4]], [1.0, 0.55, 0.1], rtol=1e-6)


def test_wsd_by_hand():
    """Constant for 8 of 10 steps, then linear to 0 over the last 2."""
    got = values("wsd", 10, decay_share=0.2)
    np.testing.assert_allclose(got[[0, 8, 9, 10]], [1.0, 1.0, 0.5, 0.0], atol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"optim\.schedule is 'cosin'"):
        make_schedule(OptimOptions(schedule="cosin", lr=1.0), steps=1)
    with pytest.raises(InputError, match=r"optim\.name is 'adam'"):
        make_optimizer(OptimOptions(name="adam"), lambda step: 1.0)


def test_decay_leaves_norms_and_biases_alone():
    params = {"layers": {"attn_norm": {"scale": 0}, "attn": {"q": {"kernel": 0, "bias": 0}}}}
    assert decay_mask(params) == {
        "layers": {"attn_norm": {"scale": False}, "attn": {"q": {"kernel": True, "bias": False}}}
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_by_hand(name):
    """With zero gradients a kernel moves by -lr * decay * w = -0.1 * 0.5 * 2 = -0.1, and a bias not at all."""
    optimizer = make_optimizer(OptimOptions(name=name, weight_decay=0.5), lambda step: 0.1)
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [-0.1], rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], [0.0])


def test_weights_below_one_still_give_the_mean():
    """A gradient sum of 1 over weights of 0.25: the mean is 4, and SGD at rate 0.1 subtracts 0.4."""
    optimizer = make_optimizer(OptimOptions(name="sgd", clip_norm=0.0), lambda step: 0.1)
    state = new_state({"kernel": jnp.zeros(1)}, {}, jax.random.key(0), optimizer, ema=False)
    state, metrics = apply_gradients(
        state, {"kernel": jnp.ones(1)}, jnp.float32(1), optimizer=optimizer, count=jnp.float32(0.25)
    )
    np.testing.assert_allclose(state.params["kernel"], [-0.4], rtol=1e-6)
    np.testing.assert_allclose(metrics["train/grad_norm"].sum, 4.0, rtol=1e-6)


def test_what_counts_nothing_is_no_update():
    """No momentum, no weight decay and no average moves; and it is no fault, so nothing is skipped."""
    optimizer = make_optimizer(OptimOptions(name="adamw", weight_decay=0.5), lambda step: 0.1)
    state = new_state({"kernel": jnp.ones(1)}, {}, jax.random.key(0), optimizer, ema=True)
    first, _ = apply_gradients(
        state, {"kernel": jnp.ones(1)}, jnp.float32(1), optimizer=optimizer, ema_decay=0.5
    )
    then, _ = apply_gradients(
        first, {"kernel": jnp.zeros(1)}, jnp.float32(0), optimizer=optimizer, count=0.0, ema_decay=0.5
    )
    for before, after in (
        (first.params, then.params),
        (first.ema, then.ema),
        (first.opt_state, then.opt_state),
    ):
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert then.step == 2 and then.skipped == 0


def test_adafactor_clips_each_matrix_by_itself():
    """Second step, equal entries g: beta2 = 1 - 2^-0.8 = 0.42565, v = 0.42565 g1^2 + 0.57435 g2^2.

    Three layers stay at g = 1: 1 / 1 = 1. One goes from 1 to 30: 30 / sqrt(0.42565 + 0.57435 * 900) = 1.318, clipped
    to 1. The RMS of all four, 1.088, would make the three 0.919 and the fourth 1.212. So for members too.
    """
    for path in ("layers", "members"):
        optimizer = make_optimizer(OptimOptions(name="adafactor", clip_norm=0.0), lambda step: 1.0)
        params = {
            path: {"kernel": jnp.zeros((4, 2, 3)), "scale": jnp.zeros((4, 3))},
            "embed": jnp.zeros((4, 3)),
        }
        first = jax.tree.map(jnp.ones_like, params)
        second = jax.tree.map(jnp.copy, first)
        for name in ("kernel", "scale"):
            second[path][name] = second[path][name].at[2].set(30.0)
        second["embed"] = second["embed"].at[2].set(30.0)
        _, state = optimizer.update(first, optimizer.init(params), params)
        updates, _ = optimizer.update(second, state, params)
        np.testing.assert_allclose(updates[path]["kernel"], -np.ones((4, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(updates[path]["scale"], -np.ones((4, 3)), rtol=1e-5)
        rms = np.sqrt((3 + 900 / (0.42565 + 0.57435 * 900)) / 4)
        np.testing.assert_allclose(updates["embed"][0], -np.ones(3) / rms, rtol=1e-4)  # one matrix


def test_a_stack_of_layers_is_updated_as_the_layers_alone_are():
    """Also where there are more layers than rows, which optax would factor over: 130 layers of 130 x 129."""
    key = jax.random.key(0)
    stack = jax.random.normal(key, (130, 130, 129)) * jnp.arange(1, 131.0)[:, None, None]
    optimizer = make_optimizer(OptimOptions(name="adafactor", clip_norm=0.0), lambda step: 1.0)
    whole, alone = {"layers": {"kernel": stack}}, {"kernel": stack[7]}
    state, own = optimizer.init(whole), optimizer.init(alone)
    assert (
        max(leaf.size for leaf in jax.tree.leaves(state)) == 130 * 130
    )  # factored: no moment of a whole matrix
    for scale in (1.0, 3.0):
        updates, state = optimizer.update(jax.tree.map(lambda leaf, s=scale: s * leaf, whole), state, whole)
        expected, own = optimizer.update(jax.tree.map(lambda leaf, s=scale: s * leaf, alone), own, alone)
        np.testing.assert_allclose(updates["layers"]["kernel"][7], expected["kernel"], rtol=1e-5)


def test_members_of_an_ensemble_are_clipped_each_by_its_own_norm():
    """(3, 4) has norm 5 and becomes (0.6, 0.8); (0.3, 0.4) has norm 0.5 and stays, at a count of 1."""
    optimizer = make_optimizer(OptimOptions(name="sgd", clip_norm=1.0), lambda step: 1.0)
    params = {"members": {"kernel": jnp.zeros((2, 2))}}
    gradients = {"members": {"kernel": jnp.array([[6.0, 8.0], [0.6, 0.8]])}}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, count=2.0)
    np.testing.assert_allclose(updates["members"]["kernel"], [[-0.6, -0.8], [-0.3, -0.4]], rtol=1e-6)


def test_clipping_by_hand():
    """Gradient (3, 4) has norm 5; clipped to 1 it is (0.6, 0.8), and SGD at rate 1 subtracts it."""
    optimizer = make_optimizer(OptimOptions(name="sgd", clip_norm=1.0), lambda step: 1.0)
    params = {"kernel": jnp.zeros(2)}
    updates, _ = optimizer.update({"kernel": jnp.array([3.0, 4.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [-0.6, -0.8], rtol=1e-6)


def test_rmsprop_by_hand():
    """PyTorch's rule, alpha 0.99: v = 0.01 * 0.5^2, update 0.5 / (0.05 + 1e-8) = 10; 1 - 0.1 * 10 = 0."""
    optimizer = make_optimizer(
        OptimOptions(name="rmsprop", beta2=0.99, eps=1e-8, clip_norm=0.0), lambda step: 0.1
    )
    params = {"w": jnp.asarray([1.0])}
    updates, _ = optimizer.update({"w": jnp.asarray([0.5])}, optimizer.init(params), params)
    np.testing.assert_allclose(params["w"] + updates["w"], [0.0], atol=1e-5)


ADAM_GRADIENTS = np.array([[1e-3, -2.0], [3e-5, 0.5], [-2e-4, 0.0], [1e-6, -1.0], [5e-4, 0.25]])


def test_adam_tf_by_hand():
    """beta 0.9 and 0.75, eps 0.5, gradient 2 at rate 0.1: m = 0.2, v = 1; 0.1 * sqrt(0.25) / 0.1 * 0.2 / 1.5 = 1/15.

    The usual Adam: m^ = 2, v^ = 4; 0.1 * 2 / 2.5 = 0.08.
    """
    params = {"kernel": jnp.zeros(1)}
    for name, want in (("adam_tf", -1 / 15), ("adamw", -0.08)):
        optimizer = make_optimizer(
            OptimOptions(name=name, beta2=0.75, eps=0.5, clip_norm=0.0), lambda step: 0.1
        )
        updates, _ = optimizer.update({"kernel": jnp.array([2.0])}, optimizer.init(params), params)
        np.testing.assert_allclose(updates["kernel"], [want], rtol=1e-6)


def test_adam_tf_against_a_loop():
    """TensorFlow's rule in float64, with a rate that changes: 0.1, 0.09, ... and the mean of sums over 4."""
    with jax.enable_x64(True):
        params = {"kernel": jnp.array([1.0, -1.0])}
        optimizer = make_optimizer(
            OptimOptions(name="adam_tf", eps=1e-5, clip_norm=0.0), lambda step: 0.1 - 0.01 * step
        )
        state = optimizer.init(params)
        theta, m, v = np.array([1.0, -1.0]), np.zeros(2), np.zeros(2)
        for t, gradient in enumerate(ADAM_GRADIENTS, start=1):
            sums = {"kernel": jnp.asarray(4.0 * gradient)}
            updates, state = optimizer.update(sums, state, params, count=4.0)
            params = {"kernel": params["kernel"] + updates["kernel"]}
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient**2
            rate = (0.1 - 0.01 * (t - 1)) * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            theta = theta - rate * m / (np.sqrt(v) + 1e-5)
            np.testing.assert_allclose(params["kernel"], theta, rtol=1e-12)


def test_adam_tf_is_adam_with_another_eps():
    """At step t they are equal where eps_tf = eps sqrt(1 - beta2^t); their states do not depend on eps."""
    with jax.enable_x64(True):
        params = {"kernel": jnp.zeros(2)}
        adam = optax.adam(0.1, eps=1e-5)
        adam_state = adam.init(params)
        state = make_optimizer(OptimOptions(name="adam_tf", clip_norm=0.0), lambda step: 0.1).init(params)
        for t, gradient in enumerate(ADAM_GRADIENTS, start=1):
            eps = 1e-5 * float(np.sqrt(1 - 0.999**t))
            matching = make_optimizer(OptimOptions(name="adam_tf", eps=eps, clip_norm=0.0), lambda step: 0.1)
            same = make_optimizer(OptimOptions(name="adam_tf", eps=1e-5, clip_norm=0.0), lambda step: 0.1)
            gradients = {"kernel": jnp.asarray(gradient)}
            want, adam_state = adam.update(gradients, adam_state)
            other, _ = same.update(gradients, state, params)
            got, state = matching.update(gradients, state, params)
            np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-12)
            # With one eps for both, the small gradients move less under TensorFlow's rule.
            assert abs(other["kernel"][0]) < 0.8 * abs(want["kernel"][0])


def test_adam_tf_decays_as_adamw_does():
    """No gradient: a kernel moves by -lr * decay * w = -0.1 * 0.5 * 2, a bias not at all."""
    optimizer = make_optimizer(OptimOptions(name="adam_tf", weight_decay=0.5), lambda step: 0.1)
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [-0.1], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], [0.0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    optimizer = make_optimizer(OptimOptions(name=name, clip_norm=0.0), lambda step: 0.05)
    state = new_state({"kernel": jnp.array([1.0, -2.0])}, {}, jax.random.key(0), optimizer, ema=False)
    loss = lambda params: jnp.sum(params["kernel"] ** 2)  # noqa: E731
    first = loss(state.params)
    step = jax.jit(
        lambda state: apply_gradients(
            state, jax.grad(loss)(state.params), jnp.float32(0), optimizer=optimizer
        )[0]
    )
    for _ in range(60):
        state = step(state)
    assert loss(state.params) < 0.2 * first


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_non_finite_update_is_skipped_and_counted(bad):
    optimizer = make_optimizer(OptimOptions(name="adamw"), lambda step: 0.1)
    state = new_state({"kernel": jnp.array([1.0])}, {}, jax.random.key(0), optimizer, ema=True)
    fine, _ = apply_gradients(
        state, {"kernel": jnp.array([1.0])}, jnp.float32(0), optimizer=optimizer, ema_decay=0.9
    )
    gradient = jnp.array([jnp.inf if bad == "gradient" else 1.0])
    loss = jnp.float32(jnp.nan if bad == "loss" else 0.0)
    after, metrics = apply_gradients(fine, {"kernel": gradient}, loss, optimizer=optimizer, ema_decay=0.9)
    for name in ("params", "opt_state", "ema"):
        for a, b in zip(
            jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(fine, name)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    assert (after.step, after.skipped, after.skipped_in_row) == (2, 1, 1)
    again, _ = apply_gradients(
        after, {"kernel": jnp.array([1.0])}, jnp.float32(0), optimizer=optimizer, ema_decay=0.9
    )
    assert (again.skipped, again.skipped_in_row) == (1, 0)
    assert metrics["train/skipped_in_row"].sum == 1


def test_ema_by_hand():
    """SGD at rate 1 from 1 with gradient 1 gives 0; the average at decay 0.9 is 0.9 * 1 + 0.1 * 0 = 0.9."""
    optimizer = make_optimizer(OptimOptions(name="sgd", clip_norm=0.0), lambda step: 1.0)
    state = new_state({"kernel": jnp.array([1.0])}, {}, jax.random.key(0), optimizer, ema=True)
    state, _ = apply_gradients(
        state, {"kernel": jnp.array([1.0])}, jnp.float32(0), optimizer=optimizer, ema_decay=0.9
    )
    np.testing.assert_allclose(state.params["kernel"], [0.0])
    np.testing.assert_allclose(state.ema["kernel"], [0.9], rtol=1e-6)
