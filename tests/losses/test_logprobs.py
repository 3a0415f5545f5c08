"""Log-probabilities in chunks: values by hand, gradients against the plain form, masks, and memory."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from posttrain_jax.losses.logprobs import Projection, chunk_rows, sum_logps, token_logps

VARIANTS = (
    Projection(),
    Projection(chunk=4),
    Projection(chunk=5, softcap=3.0),
    Projection(chunk=4, temperature=0.7),
    Projection(chunk=3, softcap=2.0, temperature=1.5),
)


def plain(hidden, head, targets, mask, projection):
    """log_softmax over whole logits: what the chunked form must equal."""
    logits = hidden @ head.T
    if projection.softcap:
        logits = projection.softcap * jnp.tanh(logits / projection.softcap)
    logps = jax.nn.log_softmax(logits / projection.temperature, axis=-1)
    picked = jnp.take_along_axis(logps, targets[:, None], axis=1)[:, 0]
    return jnp.where(mask != 0, picked, 0.0)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(13, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(29, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 29, 13), jnp.int32)
    mask = jnp.asarray(rng.random(13) < 0.6, jnp.int32)
    return hidden, head, targets, mask


def test_by_hand():
    """hidden (1, 0), head rows (0, 0), (ln 3, 0): logits 0 and ln 3, so p = 1/4 and 3/4."""
    hidden = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    head = jnp.array([[0.0, 0.0], [math.log(3.0), 0.0]])
    logps = token_logps(hidden, head, jnp.array([0, 1]), jnp.array([1, 1]), Projection())
    np.testing.assert_allclose(logps, [math.log(0.25), math.log(0.75)], rtol=1e-6)
    total, _, is_argmax = sum_logps(hidden, head, jnp.array([0, 1]), jnp.array([1, 1]), Projection())
    np.testing.assert_allclose(total, math.log(0.25 * 0.75), rtol=1e-6)
    np.testing.assert_array_equal(is_argmax, [0.0, 1.0])


def test_temperature_by_hand():
    """Logits 0 and ln 9 at temperature 2 are 0 and ln 3: p = 1/4 and 3/4."""
    head = jnp.array([[0.0], [math.log(9.0)]])
    logps = token_logps(jnp.ones((1, 1)), head, jnp.array([1]), jnp.array([1]), Projection(temperature=2.0))
    np.testing.assert_allclose(logps, [math.log(0.75)], rtol=1e-6)


@pytest.mark.parametrize("projection", VARIANTS, ids=str)
def test_equals_plain_form(arrays, projection):
    hidden, head, targets, mask = arrays
    weights = jnp.arange(1.0, 14.0)

    def loss(function, hidden, head):
        return jnp.sum(weights * function(hidden, head, targets, mask, projection))

    got = jax.value_and_grad(functools.partial(loss, token_logps), (0, 1))(hidden, head)
    want = jax.value_and_grad(functools.partial(loss, plain), (0, 1))(hidden, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("projection", VARIANTS, ids=str)
def test_sum_has_the_same_gradient(arrays, projection):
    hidden, head, targets, mask = arrays

    def through_sum(hidden, head):
        return 2.5 * sum_logps(hidden, head, targets, mask, projection)[0]

    def through_tokens(hidden, head):
        return 2.5 * jnp.sum(token_logps(hidden, head, targets, mask, projection))

    got = jax.value_and_grad(through_sum, (0, 1))(hidden, head)
    want = jax.value_and_grad(through_tokens, (0, 1))(hidden, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_check_grads(arrays):
    hidden, head, targets, mask = arrays
    function = lambda h, w: token_logps(h, w, targets, mask, Projection(chunk=4, softcap=5.0))  # noqa: E731
    check_grads(function, (hidden, head), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)


def test_mask_equals_slice(arrays):
    """Masking positions out is the same as not having them, for values and for gradients."""
    hidden, head, targets, mask = arrays
    keep = np.flatnonzero(np.asarray(mask))
    masked = sum_logps(hidden, head, targets, mask, Projection(chunk=4))[0]
    sliced = sum_logps(
        hidden[keep], head, targets[keep], jnp.ones(len(keep), jnp.int32), Projection(chunk=4)
    )[0]
    np.testing.assert_allclose(masked, sliced, rtol=1e-6)


def test_values_under_the_mask_do_not_matter(arrays):
    hidden, head, targets, mask = arrays
    poisoned = jnp.where(mask[:, None] != 0, hidden, 1e4)
    other_targets = jnp.where(mask != 0, targets, 0)
    gradient = jax.grad(lambda h, t: sum_logps(h, head, t, mask, Projection(chunk=4))[0])
    np.testing.assert_array_equal(gradient(hidden, targets), gradient(poisoned, other_targets))


def test_fully_masked(arrays):
    hidden, head, targets, mask = arrays
    nothing = jnp.zeros_like(mask)
    value, gradients = jax.value_and_grad(
        lambda h, w: sum_logps(h, w, targets, nothing, Projection())[0], (0, 1)
    )(hidden, head)
    assert value == 0
    assert all(jnp.all(leaf == 0) for leaf in gradients)


def test_bfloat16_hidden_states_give_float32_log_probabilities(arrays):
    hidden, head, targets, mask = arrays
    logps = token_logps(hidden.astype(jnp.bfloat16), head, targets, mask, Projection(chunk=4))
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, plain(hidden, head, targets, mask, Projection()), atol=0.1)


def test_chunk_rows_stay_within_the_budget():
    assert chunk_rows(10**6, 49_152) * 49_152 <= 1 << 26
    assert chunk_rows(10**6, 262_144) == 256
    assert chunk_rows(7, 49_152) == 7


@pytest.mark.parametrize("function", ["tokens", "sum"])
def test_memory_does_not_grow_with_positions_times_vocabulary(function):
    """4 times the positions: the temporary memory grows by less than one more chunk of logits, while whole logits
    (N * V * 4 bytes = 134 MB more) would show."""
    vocab, width, chunk = 16_384, 32, 128

    def loss(hidden, head, targets, mask):
        projection = Projection(chunk=chunk)
        if function == "sum":
            return sum_logps(hidden, head, targets, mask, projection)[0]
        return jnp.sum(token_logps(hidden, head, targets, mask, projection))

    def temporary_bytes(positions):
        shapes = (
            jax.ShapeDtypeStruct((positions, width), jnp.float32),
            jax.ShapeDtypeStruct((vocab, width), jnp.float32),
            jax.ShapeDtypeStruct((positions,), jnp.int32),
            jax.ShapeDtypeStruct((positions,), jnp.int32),
        )
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(512), temporary_bytes(2048)
    assert large - small < chunk * vocab * 4 / 4
    assert large < 4 * chunk * vocab * 4
