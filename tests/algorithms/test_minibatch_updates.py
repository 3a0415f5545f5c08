"""The updates of an iteration: a second loss beside the answers' (PPO-ptx), maxima over micro-batches, and the value
network's own learning rate. Two parameters, losses that are linear in them, plain SGD: all by hand. And repetition."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain_jax.algorithms import ppo, rloo
from posttrain_jax.core.optim import divide_and_clip, scale_and_delay
from posttrain_jax.core.types import Array, Maximum, Metric, Metrics, PartMetrics, TrainState
from posttrain_jax.core.updates import new_state
from posttrain_jax.forward.packed_rows import PackedRows
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.transformer import make_model
from posttrain_jax.rollouts.experience import Experience, Networks, experience_of
from posttrain_jax.rollouts.statistics import repetition
from posttrain_jax.rollouts.trajectory import TrajectoryBatch
from posttrain_jax.rollouts.updates import AuxiliaryLoss, minibatch_updates
from posttrain_jax.wiring.online import init_state

LR = 0.1


def experience(rewards: list, mask: list, values: list | None = None) -> Experience:
    """`[N, S]` of completions whose log-probabilities do not matter."""
    zeros = jnp.zeros((len(rewards), len(rewards[0])))
    return Experience(
        mask=jnp.asarray(mask),
        logps=zeros,
        values=zeros if values is None else jnp.asarray(values, jnp.float32),
        rewards=jnp.asarray(rewards, jnp.float32),
    )


ALL = ppo.Options(gamma=1.0, lam=0.5, whiten_rewards=True, whiten_advantages=True)


def test_targets_by_hand():
    """Rewards 0, 4 whitened about their mean of 2 (standard deviation 2): 1, 3. Values 0.5, 1 and lambda 0.5: errors
    1 + 1 - 0.5 = 1.5 and 3 - 1 = 2, advantages 1.5 + 0.5 x 2 = 2.5 and 2, returns 3 and 3; whitened 1 and -1. The third
    token is none of the completion, and the second completion is in another minibatch."""
    two = experience([[0, 4, 9], [5, 7, 8]], [[1, 1, 0], [1, 1, 1]], [[0.5, 1, 9], [1, 2, 3]])
    first = jnp.asarray([True, False])
    targets = ppo.targets_of(first, two, options=ALL)
    np.testing.assert_allclose(targets.advantages[0, :2], [1, -1], rtol=1e-5)
    np.testing.assert_allclose(targets.returns[0, :2], [3, 3], rtol=1e-5)
    assert not targets.advantages[1].any()
    plain = dataclasses.replace(ALL, whiten_rewards=False, whiten_advantages=False)
    # Errors 0 + 1 - 0.5 and 4 - 1.
    advantages = ppo.targets_of(first, two, options=plain).advantages
    np.testing.assert_allclose(advantages[0, :2], [2, 3], rtol=1e-6)


def test_a_completion_without_a_score_is_in_no_deviation():
    """The rewards of `test_targets_by_hand`, and a completion of reward 100 that a function failed at: the same."""
    two = experience([[0, 4], [100, 100]], [[1, 1], [0, 0]], [[0.5, 1], [50, 50]])
    targets = ppo.targets_of(jnp.asarray([True, True]), two, options=ALL)
    np.testing.assert_allclose(targets.advantages, [[1, -1], [0, 0]], rtol=1e-5)
    np.testing.assert_allclose(targets.returns[0], [3, 3], rtol=1e-5)


def test_a_completion_without_a_score_is_in_no_baseline():
    """Rewards 1, -, 6, 2 of two tokens each to one prompt, and to another a single one that has a score: 1 - 4, 0,
    6 - 1.5, 2 - 3.5; 0. With the failure's number, 0, in the baseline, the first would be 1 - 8/3."""
    rewards = [[0, 1], [0, 0], [0, 6], [0, 2], [0, 5], [0, 0], [0, 0], [0, 0]]
    mask = [[1, 1], [0, 0], [1, 1], [1, 1], [1, 1], [0, 0], [0, 0], [0, 0]]
    targets = rloo.with_advantages(experience(rewards, mask), samples=4)
    np.testing.assert_allclose(targets.advantages, [-3, 0, 4.5, -1.5, 0, 0, 0, 0], rtol=1e-6)


def test_nothing_is_learned_from_a_completion_without_a_score():
    """Two completions of two tokens after a prompt of two, in one row; the second has no score. Score 3 and no KL: the
    first's reward is its last token's, and the mean score is its alone. The tokens of both are in KL and entropy."""
    model = make_model(ModelConfig("llama", 8, 8, 1, 1, 1, 8, 16, query_scale=8**-0.5))
    params = model.init(jax.random.key(0))
    mask = jnp.asarray([[0, 0, 1, 1], [0, 0, 1, 1]])
    networks = Networks(model, None, 1.0)
    batch = TrajectoryBatch(
        tokens=jnp.ones((2, 4), jnp.int32),
        response_mask=mask,
        sampler_logps=jnp.zeros((2, 4)),
        reference_logps=None,
        scores=jnp.asarray([3.0, 99.0]),
        has_score=jnp.asarray([1, 0]),
        groups=jnp.zeros(2, jnp.int32),
        policy_steps=jnp.zeros(2, jnp.int32),
        indices=jnp.arange(8)[None, None, None, None],
        auxiliary={},
    )
    made, metrics = experience_of(params, jnp.float32(0.5), batch, networks=networks)
    assert made.mask.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    np.testing.assert_allclose(made.rewards[0], [0, 0, 0, 3], atol=1e-6)
    logits = model.apply(params, batch.tokens).logits_BTV
    logps = jax.nn.log_softmax(logits)[:, :, 1]
    np.testing.assert_allclose(made.logps[:, 2:], logps[:, 1:3], atol=1e-5)
    assert not made.logps[:, :2].any() and "kl_per_sequence" not in metrics
    batch = dataclasses.replace(batch, reference_logps=made.logps - mask)  # a KL of 1 nat at every token
    made, metrics = experience_of(params, jnp.float32(0.5), batch, networks=networks)
    np.testing.assert_allclose(made.rewards[0], [0, 0, -0.5, 2.5], atol=1e-5)
    for name, sum_, count in (
        ("score", 3, 1),
        ("reward_per_sequence", 2, 1),
        ("completion_tokens", 4, 2),
        ("kl_per_sequence", 4, 2),
        ("kl_per_token", 4, 4),
        ("tokens", 8, 1),
    ):
        np.testing.assert_allclose((metrics[name].sum, metrics[name].count), (sum_, count), atol=1e-5)


def test_of_the_value_head_the_kernel_and_the_bias_are_learnt():
    """Its gain is a statistic and stays 1. With LoRA on the policy the value network is trained whole."""
    model = make_model(ModelConfig("llama", 8, 8, 1, 1, 1, 8, 16, query_scale=8**-0.5), lora=LoraConfig(2))
    head = {"kernel": jnp.zeros((8, 1)), "gain": jnp.ones(()), "bias": jnp.zeros(())}
    state = init_state(
        {"final_norm": jnp.ones(8), "value": {"final_norm": jnp.ones(8), "score_head": head}},
        jax.random.key(0),
        model=model,
        kl_coefficient=0.1,
        optimizer=sgd(),
        ema_decay=0.0,
    )
    learnt = state.params["value"]
    assert set(state.params) == {"value"} and set(learnt) == {"final_norm", "score_head"}
    assert set(learnt["score_head"]) == {"kernel", "bias"}
    assert state.frozen["value"]["score_head"] == {"gain": 1.0}


def state_of(optimizer: optax.GradientTransformationExtraArgs) -> TrainState:
    """Two parameters of 0, one of the policy and one of the value network."""
    params = {"w": jnp.zeros(()), "value": {"v": jnp.zeros(())}}
    state = new_state(params, {}, jax.random.key(0), optimizer, ema=False)
    wrapped = {
        "optimizer": state.opt_state,
        "kl_coefficient": jnp.float32(0),
        "updates": jnp.int32(0),
    }
    return dataclasses.replace(state, opt_state=wrapped)


NUMBERS = (1.0, 2.0, 3.0, 4.0)


def linear(params: dict, rows: PackedRows, numbers: Array) -> tuple[Array, PartMetrics]:
    """Sum of x (w + v) over the numbers x of the rows' trajectories: the gradient of its mean is the mean of x."""
    present = rows.present()
    total = jnp.sum(jnp.where(present, numbers, 0.0)) * (params["w"] + params["value"]["v"])
    count = jnp.sum(present, dtype=jnp.float32)
    most = jnp.max(jnp.where(present, numbers, -jnp.inf))
    return total, {"loss": Metric(total, count), "most": Maximum(most)}


def text_loss(params: dict, part: Array) -> tuple[Array, Metrics]:
    total = jnp.sum(part) * params["w"]
    return total, {"text": Metric(total, jnp.float32(part.size))}


def updated(
    optimizer,
    *,
    minibatches: int,
    epochs: int = 1,
    auxiliary: AuxiliaryLoss | None = None,
    numbers: tuple[float, ...] = NUMBERS,
    state: TrainState | None = None,
    schedule=lambda step: jnp.float32(LR),
):
    """Four trajectories of two tokens each with a number, two of them in a micro-batch."""
    shape = (4, 2)
    rows = np.arange(8).reshape(4, 1, 2)
    indices = np.stack([rows.reshape(minibatches, -1, 2, 2)] * epochs)  # E, K, M, 2 rows of 2 tokens
    one = jnp.ones(shape, jnp.int32)
    batch = TrajectoryBatch(
        tokens=one,
        response_mask=one,
        sampler_logps=jnp.zeros(shape),
        reference_logps=None,
        scores=jnp.zeros(4),
        has_score=jnp.ones(4, jnp.int32),
        groups=jnp.zeros(4, jnp.int32),
        policy_steps=jnp.zeros(4, jnp.int32),
        indices=jnp.asarray(indices, jnp.int32),
        auxiliary={},
    )
    return minibatch_updates(
        state or state_of(optimizer),
        batch,
        jnp.asarray([[0, 1]] * 4),
        targets=lambda members: jnp.where(members, jnp.asarray(numbers), 0.0),
        losses=linear,
        optimizer=optimizer,
        schedule=schedule,
        ema_decay=0.0,
        auxiliary=auxiliary,
    )


def sgd(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.chain(divide_and_clip(0.0), optax.sgd(LR), *links)


def test_a_second_loss_is_added_to_the_first():
    """w falls by 0.1 (mean of 1, 2, 3, 4 + 27.8 x mean of 10, 20, 60) = 0.1 (2.5 + 27.8 x 30) = 83.65, v by 0.25."""
    auxiliary = AuxiliaryLoss(jnp.asarray([[[10.0], [20.0], [60.0]]]), text_loss, "text", 27.8)
    state, metrics = updated(sgd(), minibatches=1, auxiliary=auxiliary)
    np.testing.assert_allclose(state.params["w"], -83.65, rtol=1e-6)
    np.testing.assert_allclose(state.params["value"]["v"], -0.25, rtol=1e-6)
    assert metrics["train/text"].count == 3 and metrics["train/loss"].count == 4


def test_the_loss_that_is_told_is_the_one_that_is_minimized():
    """The second update starts at w = -0.1 (2.5 + 2 x 30) = -6.25 and v = -0.25, the first at 0: its loss is
    2.5 x -6.5 + 2 x 30 x -6.25 = -391.25, and the mean of both is half of that."""
    auxiliary = AuxiliaryLoss(jnp.asarray([[[10.0], [20.0], [60.0]]]), text_loss, "text", 2.0)
    _, metrics = updated(sgd(), minibatches=1, epochs=2, auxiliary=auxiliary)
    loss = metrics["train/loss"]
    np.testing.assert_allclose(loss.sum / loss.count, -391.25 / 2, rtol=1e-6)


def test_the_learning_rate_that_is_told_is_the_optimizers():
    """Of two updates of the first iteration one is skipped; the second iteration begins with the rate of update 1."""

    def schedule(step: Array) -> Array:
        return jnp.float32(LR) * (step + 1)

    optimizer = optax.chain(divide_and_clip(0.0), optax.sgd(schedule))
    state, metrics = updated(optimizer, minibatches=2, numbers=(1.0, 2.0, 3.0, np.nan), schedule=schedule)
    assert metrics["train/lr"].sum == pytest.approx(LR)
    _, metrics = updated(optimizer, minibatches=2, state=state, schedule=schedule)
    assert metrics["train/lr"].sum == pytest.approx(2 * LR)


def test_each_minibatch_has_its_own_share():
    """Two minibatches, two epochs: the answers move w by 0.1 x (5 + 5), whatever their order, and the shares' means, 15
    and 60, come once in each epoch: 0.1 x 2 x (15 + 60) = 15. One update that had all rows would add 2 x 0.1 x 37.5."""
    auxiliary = AuxiliaryLoss(jnp.asarray([[[10.0], [20.0]], [[50.0], [70.0]]]), text_loss, "text", 1.0)
    state, metrics = updated(sgd(), minibatches=2, epochs=2, auxiliary=auxiliary)
    np.testing.assert_allclose(state.params["w"], -1.0 - 15.0, rtol=1e-6)
    np.testing.assert_allclose(state.params["value"]["v"], -1.0, rtol=1e-6)
    assert int(state.opt_state["updates"]) == 4 and metrics["train/text"].count == 8


def test_a_skipped_update_is_in_no_mean():
    """The last answer is NaN: of two minibatches one is skipped, and the metrics are of the other's two answers."""
    state, metrics = updated(sgd(), minibatches=2, numbers=(1.0, 2.0, 3.0, np.nan))
    assert int(state.skipped) == 1 and metrics["train/loss"].count == 2
    assert np.isfinite(float(state.params["w"])) and float(state.params["w"]) != 0
    assert all(np.isfinite(float(metric.sum)) for metric in metrics.values())
    assert metrics["train/grad_norm"].count == 1


def test_a_maximum_is_one_over_all_micro_batches_and_updates():
    _, metrics = updated(sgd(), minibatches=2, epochs=2)
    assert metrics["train/most"].sum == 4 and metrics["train/most"].count == 1


def test_a_maximum_that_is_no_number_is_logged_and_one_of_nothing_is_not():
    """So that rollout.max_logp_difference stops a run whose engine gives NaN."""
    unknown, nothing = (Maximum(jnp.float32(value)).as_metric() for value in (np.nan, -np.inf))
    assert np.isnan(unknown.sum) and unknown.count == 1 and nothing.count == 0


@pytest.mark.parametrize(("delay", "policy"), [(0, -0.5), (1, -0.25), (2, 0.0)])
def test_the_value_network_has_its_own_rate_and_starts_alone(delay, policy):
    """Two updates of 0.25 each, on all four answers; the value network's are times 3."""
    own = scale_and_delay(lambda path: path.startswith("value/"), scale=3.0, delay=delay)
    state, _ = updated(sgd(own), minibatches=1, epochs=2)
    np.testing.assert_allclose(state.params["w"], policy, rtol=1e-6)
    np.testing.assert_allclose(state.params["value"]["v"], -1.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        ([1, 2, 3, 4, 5], 0.0),
        ([7] * 8, 4 / 5),  # five runs of four, one of them new
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 stands there twice
    ],
)
def test_repetition(tokens, share):
    assert repetition(np.asarray(tokens, np.int32)) == pytest.approx(share)
