"""Advantages, returns, baselines and rewards per token: by hand, by the sums of the papers in float64, any mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses.advantages import discounted_returns, gae, leave_one_out, per_token_rewards

NAN = jnp.nan

# Four answers in rows of 7: whole, padded on the right, on both sides, and with a gap; and no answer at all.
MASKS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
)


def random_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and values, NaN where `MASKS` is 0."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, *MASKS.shape))
    return np.where(MASKS, rewards, np.nan), np.where(MASKS, values, np.nan)


def test_gae_by_hand():
    """gamma = lam = 1/2, rewards 1, 0, 2, values 0.5, 1, -1.

    delta = 2 + 0 + 1 = 3;  0 - 0.5 - 1 = -1.5;  1 + 0.5 - 0.5 = 1, from the last to the first.
    A = 3;  -1.5 + 0.25 * 3 = -0.75;  1 - 0.25 * 0.75 = 0.8125. Returns: A + V = 1.3125, 0.25, 2.
    """
    got = gae(
        jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[0.5, 1.0, -1.0]]), jnp.ones((1, 3)), gamma=0.5, lam=0.5
    )
    np.testing.assert_array_equal(got.advantages_BT, [[0.8125, -0.75, 3.0]])
    np.testing.assert_array_equal(got.returns_BT, [[1.3125, 0.25, 2.0]])


def test_gae_passes_over_what_is_masked():
    """The answer of `test_gae_by_hand` at the end of a row, at its start, and with a gap: the same numbers."""
    rewards = jnp.array([[NAN, NAN, 1.0, 0.0, 2.0], [1.0, 0.0, 2.0, NAN, NAN], [1.0, NAN, 0.0, NAN, 2.0]])
    values = jnp.array([[NAN, NAN, 0.5, 1.0, -1.0], [0.5, 1.0, -1.0, NAN, NAN], [0.5, NAN, 1.0, NAN, -1.0]])
    mask = jnp.isfinite(rewards)
    got = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    for row in range(3):
        np.testing.assert_array_equal(got.advantages_BT[row][mask[row]], [0.8125, -0.75, 3.0])
        np.testing.assert_array_equal(got.returns_BT[row][mask[row]], [1.3125, 0.25, 2.0])
    np.testing.assert_array_equal(got.advantages_BT[~mask], np.zeros(6))
    np.testing.assert_array_equal(got.returns_BT[~mask], np.zeros(6))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0), (0.0, 0.5)])
def test_gae_is_the_sum_of_the_paper(gamma, lam):
    """Equation 16, sum_l (gamma lam)^l delta_{t+l}, in float64 over the list of a row's actions."""
    rewards, values = random_rows(0)
    got = jax.jit(gae, static_argnames=("gamma", "lam"))(
        jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(MASKS), gamma=gamma, lam=lam
    )
    want = np.zeros(MASKS.shape)
    for row, mask in enumerate(MASKS):
        places = np.flatnonzero(mask)
        for first in range(len(places)):
            for later in range(first, len(places)):
                here = places[later]
                following = values[row, places[later + 1]] if later + 1 < len(places) else 0.0
                delta = rewards[row, here] + gamma * following - values[row, here]
                want[row, places[first]] += (gamma * lam) ** (later - first) * delta
    np.testing.assert_allclose(got.advantages_BT, want, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(got.returns_BT, want + np.nan_to_num(values), rtol=2e-5, atol=2e-6)
    assert got.advantages_BT.dtype == got.returns_BT.dtype == jnp.float32


def test_at_one_and_one_gae_is_the_reward_to_go_minus_the_value():
    rewards, values = random_rows(1)
    got = gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(MASKS), gamma=1.0, lam=1.0)
    to_go = np.cumsum(np.nan_to_num(rewards)[:, ::-1], axis=1)[:, ::-1] * MASKS
    np.testing.assert_allclose(got.returns_BT, to_go, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(got.advantages_BT, to_go - np.nan_to_num(values), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(
        discounted_returns(jnp.asarray(rewards), jnp.asarray(MASKS), gamma=1.0), to_go, rtol=1e-5, atol=2e-6
    )


def test_discounted_returns_by_hand():
    """gamma 1/2, rewards 1, 2, 4 with a gap: 4; 2 + 2 = 4; 1 + 2 = 3."""
    rewards = jnp.array([[1.0, 2.0, NAN, 4.0, NAN]])
    got = discounted_returns(rewards, jnp.isfinite(rewards), gamma=0.5)
    np.testing.assert_array_equal(got, [[3.0, 4.0, 0.0, 4.0, 0.0]])


def test_gae_of_bfloat16_is_computed_in_float32():
    rewards, values = (jnp.asarray(array, jnp.bfloat16) for array in random_rows(2))
    low = gae(rewards, values, jnp.asarray(MASKS, bool), gamma=1.0, lam=0.95)
    high = gae(
        rewards.astype(jnp.float32), values.astype(jnp.float32), jnp.asarray(MASKS), gamma=1.0, lam=0.95
    )
    np.testing.assert_array_equal(low.advantages_BT, high.advantages_BT)
    assert low.advantages_BT.dtype == jnp.float32


def test_gae_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="one shape"):
        gae(jnp.zeros((2, 3)), jnp.zeros((2, 4)), jnp.ones((2, 3)), gamma=1.0, lam=1.0)


def test_leave_one_out_by_hand():
    """1, 2, 6: (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2."""
    np.testing.assert_array_equal(leave_one_out(jnp.array([[1.0, 2.0, 6.0]])), [[4.0, 3.5, 1.5]])


def test_leave_one_out_against_the_mean_of_all():
    """r - baseline = K / (K - 1) (r - mean), as RLOO is Dr. GRPO's advantage times that factor (arXiv:2503.20783)."""
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    got = rewards - leave_one_out(jnp.asarray(rewards))
    np.testing.assert_allclose(
        got, 4 / 3 * (rewards - rewards.mean(axis=1, keepdims=True)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7, 1e6 + 0.5])
def test_answers_of_equal_reward_have_an_advantage_of_exactly_zero(reward):
    rewards = jnp.full((2, 7), reward)
    np.testing.assert_array_equal(rewards - leave_one_out(rewards), np.zeros((2, 7)))


def test_leave_one_out_without_the_answers_that_have_no_reward():
    """1, -, 6, 2: (6 + 2) / 2, none, (1 + 2) / 2, (1 + 6) / 2, and not a bit of the NaN. Alone with its reward, an
    answer is its own baseline; where nobody has one, there is none."""
    rewards = jnp.array([[1.0, jnp.nan, 6.0, 2.0], [7.0, 5.0, 5.0, 5.0], [9.0, 9.0, 9.0, 9.0]])
    mask = jnp.array([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    want = [[4.0, 0.0, 1.5, 3.5], [7.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(leave_one_out(rewards, mask), want)


def test_leave_one_out_needs_others():
    with pytest.raises(ValueError, match="2 completions"):
        leave_one_out(jnp.ones((3, 1)))


def test_per_token_rewards_by_hand():
    """beta 1/2, k1 = 1, 0, -2: penalties -0.5, 0, +1; the score 4 at the last token: 5."""
    got = per_token_rewards(
        jnp.array([4.0]),
        jnp.array([[-1.0, -2.0, -3.0]]),
        jnp.array([[-2.0, -2.0, -1.0]]),
        jnp.ones((1, 3), jnp.int32),
        kl_coefficient=0.5,
    )
    np.testing.assert_array_equal(got, [[-0.5, 0.0, 5.0]])


def scored(scores=(1.0, 2.0, 3.0, 4.0, NAN)):
    """Rewards of `MASKS` without a penalty, so that only the scores are left; garbage where masked."""
    garbage = jnp.where(jnp.asarray(MASKS) != 0, -1.0, NAN)
    return np.asarray(
        per_token_rewards(jnp.array(scores), garbage, garbage, jnp.asarray(MASKS), kl_coefficient=0.5)
    )


def test_the_score_lands_on_the_last_token_and_nowhere_else():
    want = np.zeros((5, 7))
    want[0, 6], want[1, 2], want[2, 5], want[3, 5] = 1.0, 2.0, 3.0, 4.0
    np.testing.assert_array_equal(scored(), want)
    assert scored().dtype == np.float32


@pytest.mark.parametrize("seed", range(20))
def test_the_score_is_never_on_padding_and_never_lost(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((16, 9)) < rng.random((16, 1))
    scores = rng.normal(size=16).astype(np.float32)
    zeros = jnp.zeros((16, 9))
    got = np.asarray(
        per_token_rewards(jnp.asarray(scores), zeros, zeros, jnp.asarray(mask), kl_coefficient=0.1)
    )
    assert not got[~mask].any()
    np.testing.assert_array_equal(got.sum(axis=1), np.where(mask.any(axis=1), scores, 0.0))
    assert ((got != 0).sum(axis=1) == mask.any(axis=1)).all()


def test_the_penalty_of_an_answer_is_beta_times_its_log_ratio_in_float32():
    """bfloat16 holds 8 bits: -1.0 and -1.0078125 are neighbors, and their difference is kept."""
    policy = jnp.where(jnp.asarray(MASKS) != 0, -1.0, NAN).astype(jnp.bfloat16)
    reference = jnp.where(jnp.asarray(MASKS) != 0, -1.0078125, NAN).astype(jnp.bfloat16)
    got = per_token_rewards(jnp.zeros(5), policy, reference, jnp.asarray(MASKS), kl_coefficient=2.0)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got.sum(axis=1), -2.0 * 0.0078125 * MASKS.sum(axis=1))
    np.testing.assert_array_equal(got[jnp.asarray(MASKS) == 0], 0.0)


def test_per_token_rewards_refuses_a_score_per_token():
    with pytest.raises(ValueError, match="one score per row"):
        per_token_rewards(
            jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones((2, 3)), kl_coefficient=0.1
        )
