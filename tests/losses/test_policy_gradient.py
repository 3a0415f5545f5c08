"""REINFORCE: by hand, and its expected gradient against that of the expected reward, by enumerating every answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import ppo
from posttrain_jax.losses.advantages import discounted_returns, leave_one_out
from posttrain_jax.losses.policy_gradient import sequence_loss, token_loss

LOGITS = jnp.array([0.3, -0.7, 1.1])
REWARDS = jnp.array([1.0, -2.0, 0.5])


def right_gradient():
    """Of minus the expected reward of one of three answers."""
    return jax.grad(lambda logits: -jnp.sum(jax.nn.softmax(logits) * REWARDS))(LOGITS)


def test_sequence_loss_by_hand():
    """-(3 - 1) * -2 = 4; -(0 - 1) * -4 = -4; weight 0: 0; weight 2: 2 * -(2 - 1) * -0.5 = 1."""
    loss = sequence_loss(
        jnp.array([-2.0, -4.0, jnp.nan, -0.5]),
        jnp.array([3.0, 0.0, jnp.nan, 2.0]),
        jnp.array([1.0, 1.0, jnp.nan, 1.0]),
        weights_B=jnp.array([1.0, 1.0, 0.0, 2.0]),
    )
    np.testing.assert_array_equal(loss.loss_B, [4.0, -4.0, 0.0, 1.0])
    assert loss.count == 4
    # (2 - 1 + 2 * 1) / 4 and (-2 - 4 + 2 * -0.5) / 4.
    assert loss.metrics["advantages"].sum / loss.metrics["advantages"].count == 0.75
    assert loss.metrics["logps"].sum / loss.metrics["logps"].count == -1.75


def test_token_loss_by_hand():
    """-2 * -1 = 2; -(-1) * -3 = -3; masked: 0."""
    loss = token_loss(
        jnp.array([[-1.0, -3.0, jnp.nan]]), jnp.array([[2.0, -1.0, jnp.nan]]), jnp.array([[1, 1, 0]])
    )
    np.testing.assert_array_equal(loss.loss, [[2.0, -3.0, 0.0]])
    assert loss.count == 2
    assert loss.metrics["loss"].sum == -1.0


@pytest.mark.parametrize("baseline", [0.0, 0.4, -10.0])
def test_a_baseline_leaves_the_expected_gradient_as_it_is(baseline):
    probabilities = jax.nn.softmax(LOGITS)

    def loss(logits):
        logps = jax.nn.log_softmax(logits)
        return sequence_loss(logps, REWARDS, jnp.full(3, baseline), weights_B=probabilities).loss.sum()

    np.testing.assert_allclose(jax.grad(loss)(LOGITS), right_gradient(), atol=2e-6)


@pytest.mark.parametrize("answers", [2, 3])
def test_leave_one_out_is_unbiased(answers):
    """Every group of K answers with its probability: the mean over the group has the gradient of the reward."""
    groups = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * answers, indexing="ij"), axis=-1).reshape(-1, answers)
    probability_of_group = jnp.prod(jax.nn.softmax(LOGITS)[groups], axis=1)
    weights = jnp.tile(probability_of_group[:, None], (1, answers))
    rewards = REWARDS[groups]

    def loss(logits):
        output = sequence_loss(
            jax.nn.log_softmax(logits)[groups], rewards, leave_one_out(rewards), weights_B=weights
        )
        np.testing.assert_allclose(output.count, answers, rtol=1e-6)
        return output.loss.sum() / output.count

    np.testing.assert_allclose(jax.grad(loss)(LOGITS), right_gradient(), atol=2e-6)
    # The baseline that keeps the answer itself in the mean shrinks the gradient by (K - 1) / K.
    own = jnp.broadcast_to(rewards.mean(axis=1, keepdims=True), rewards.shape)
    shrunk = jax.grad(
        lambda logits: sequence_loss(
            jax.nn.log_softmax(logits)[groups], rewards, own, weights_B=weights
        ).loss.sum()
    )(LOGITS)
    np.testing.assert_allclose(shrunk / answers, right_gradient() * (answers - 1) / answers, atol=2e-6)


# Two tokens out of two, the second drawn given the first: four answers, with a reward for each token.
FIRST, SECOND = jnp.array([0.2, -0.5]), jnp.array([[0.6, -0.1], [-1.0, 0.3]])
TOKENS = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])
TOKEN_REWARDS = jnp.array([[1.0, -1.0], [1.0, 2.0], [-0.5, 0.0], [-0.5, 3.0]])


def logps_of_answers(first, second):
    """log-probability of each token of the four answers, `[4, 2]`."""
    of_first = jax.nn.log_softmax(first)[TOKENS[:, 0]]
    of_second = jax.nn.log_softmax(second)[TOKENS[:, 0], TOKENS[:, 1]]
    return jnp.stack([of_first, of_second], axis=1)


def expected_gradients(advantages, loss):
    probabilities = jnp.exp(logps_of_answers(FIRST, SECOND).sum(axis=1))

    def total(first, second):
        per_token = loss(logps_of_answers(first, second), advantages)
        return jnp.sum(probabilities * per_token.sum(axis=1))

    return jax.grad(total, argnums=(0, 1))(FIRST, SECOND)


@pytest.mark.parametrize("kind", ["whole", "to_go", "baseline"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda logps, advantages: token_loss(logps, advantages, jnp.ones((4, 2))).loss,
        lambda logps, advantages: (
            ppo.clipped_policy_loss(
                logps, logps_of_answers(FIRST, SECOND), advantages, jnp.ones((4, 2)), clip=0.2
            ).loss
        ),
    ],
    ids=["reinforce", "ppo"],
)
def test_the_expected_gradient_of_tokens_is_that_of_the_reward(kind, loss):
    """With the whole reward at every token, the reward to go, or that less what the text before it tells.

    At the policy that drew the answers PPO's gradient is the same.
    """
    ones = jnp.ones((4, 2))
    advantages = {
        "whole": jnp.tile(TOKEN_REWARDS.sum(axis=1)[:, None], (1, 2)),
        "to_go": discounted_returns(TOKEN_REWARDS, ones, gamma=1.0),
        # A baseline of the second token may depend on the first.
        "baseline": discounted_returns(TOKEN_REWARDS, ones, gamma=1.0)
        - jnp.stack([jnp.full(4, 0.7), jnp.array([2.0, 2.0, -1.0, -1.0])], axis=1),
    }[kind]

    def minus_expected_reward(first, second):
        probabilities = jnp.exp(logps_of_answers(first, second).sum(axis=1))
        return -jnp.sum(probabilities * TOKEN_REWARDS.sum(axis=1))

    want = jax.grad(minus_expected_reward, argnums=(0, 1))(FIRST, SECOND)
    for got, right in zip(expected_gradients(advantages, loss), want, strict=True):
        np.testing.assert_allclose(got, right, atol=2e-6)


def test_an_answer_with_one_advantage_is_the_sum_of_its_tokens():
    logps = jnp.array([[-1.0, -0.5, -2.0], [-0.25, -3.0, jnp.nan]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0]])
    rewards, baselines = jnp.array([2.0, -1.0]), jnp.array([0.5, 0.25])
    advantages = jnp.tile((rewards - baselines)[:, None], (1, 3))
    sums = jnp.sum(jnp.where(mask != 0, logps, 0.0), axis=1)
    np.testing.assert_allclose(
        token_loss(logps, advantages, mask).loss.sum(axis=1), sequence_loss(sums, rewards, baselines).loss_B
    )


def test_rewards_and_baselines_have_no_gradient_and_masked_tokens_none():
    gradients = jax.grad(
        lambda r, b: sequence_loss(jnp.array([-1.0, -2.0]), r, b).loss.sum(), argnums=(0, 1)
    )(jnp.ones(2), jnp.zeros(2))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(2))
    logps = jnp.array([[-1.0, jnp.nan, jnp.inf]])
    mask = jnp.array([[1, 0, 0]])
    of_tokens = jax.grad(lambda x: token_loss(x, jnp.full((1, 3), 2.0), mask).loss.sum())(logps)
    np.testing.assert_array_equal(of_tokens, [[-2.0, 0.0, 0.0]])
    assert token_loss(logps, logps, 0 * mask).count == 0


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        sequence_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="one shape"):
        token_loss(jnp.zeros((2, 3)), jnp.zeros(2), jnp.ones((2, 3)))
