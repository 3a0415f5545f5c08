"""The updates of an iteration: a second loss beside the answers' (PPO-ptx), maxima over micro-batches, and the value
network's own learning rate. Two parameters, losses that are linear in them, plain SGD: all by hand. And repetition."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.ppo.letters import get_config
from posttrain_jax.algorithms import ppo, rloo
from posttrain_jax.algorithms.collect import repetition
from posttrain_jax.algorithms.online import Mixed, init_state, minibatch_updates
from posttrain_jax.core.optim import divide_and_clip, scale_and_delay
from posttrain_jax.core.types import Array, Maximum, Metric, Metrics, TrainState
from posttrain_jax.core.updates import new_state
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.transformer import make_model
from posttrain_jax.rollouts.draw import RolloutBatch
from posttrain_jax.rollouts.experience import Experience, Networks, experience_of

LR = 0.1


def test_targets_by_hand():
    """Rewards 0, 4 whitened about their mean of 2 (standard deviation 2): 1, 3. Values 0.5, 1 and lambda 0.5: errors
    1 + 1 - 0.5 = 1.5 and 3 - 1 = 2, advantages 1.5 + 0.5 x 2 = 2.5 and 2, returns 3 and 3; whitened 1 and -1. The third
    place is no token of the answer."""
    options = ppo.options_from_config(get_config("tiny"))
    options = dataclasses.replace(options, gamma=1.0, lam=0.5, whiten_rewards=True, whiten_advantages=True)
    row = {"rewards": [0.0, 4.0, 9.0], "values": [0.5, 1.0, 9.0], "response_mask": [1, 1, 0]}
    rest = {name: jnp.zeros((1, 3)) for name in ("tokens", "segment_ids", "logps")}
    found = ppo.targets_of(
        Experience(**{name: jnp.asarray([values]) for name, values in row.items()}, **rest), options=options
    )
    np.testing.assert_allclose(found.advantages[0, :2], [1, -1], rtol=1e-5)
    np.testing.assert_allclose(found.returns[0, :2], [3, 3], rtol=1e-5)
    plain = dataclasses.replace(options, whiten_rewards=False, whiten_advantages=False)
    found = ppo.targets_of(found.rows, options=plain)
    # Errors 0 + 1 - 0.5 and 4 - 1.
    np.testing.assert_allclose(found.advantages[0, :2], [2, 3], rtol=1e-6)


def experience(rewards: list, response_mask: list, values: list | None = None) -> Experience:
    """`[M, B, T]` or `[B, T]` of answers whose other numbers do not matter."""
    rows = {"rewards": jnp.asarray(rewards, jnp.float32), "response_mask": jnp.asarray(response_mask)}
    zeros = jnp.zeros(rows["rewards"].shape)
    rest = dict.fromkeys(("tokens", "segment_ids", "logps"), zeros)
    return Experience(values=zeros if values is None else jnp.asarray(values, jnp.float32), **rows, **rest)


def test_an_answer_without_a_score_is_in_no_deviation():
    """The rewards of `test_targets_by_hand`, and an answer of reward 100 that a function failed at: equal targets."""
    options = ppo.options_from_config(get_config("tiny"))
    options = dataclasses.replace(options, gamma=1.0, lam=0.5, whiten_rewards=True, whiten_advantages=True)
    two = experience([[0, 4], [100, 100]], [[1, 1], [0, 0]], [[0.5, 1], [50, 50]])
    found = ppo.targets_of(two, options=options)
    np.testing.assert_allclose(found.advantages, [[1, -1], [0, 0]], rtol=1e-5)
    np.testing.assert_allclose(found.returns[0], [3, 3], rtol=1e-5)


def test_an_answer_without_a_score_is_in_no_baseline():
    """Rewards 1, -, 6, 2 of two tokens each to one prompt, and to another a single one that has a score: 1 - 4, 0,
    6 - 1.5, 2 - 3.5; 0. With the failure's number, 0, in the baseline, the first would be 1 - 8/3."""
    rewards = [[[0, 1], [0, 0], [0, 6], [0, 2]], [[0, 5], [0, 0], [0, 0], [0, 0]]]
    response_mask = [[[1, 1], [0, 0], [1, 1], [1, 1]], [[1, 1], [0, 0], [0, 0], [0, 0]]]
    found = rloo.compared(experience(rewards, response_mask), samples=4)
    np.testing.assert_allclose(found.advantages, [[-3, 0, 4.5, -1.5], [0, 0, 0, 0]], rtol=1e-6)


def test_a_failed_answer_is_worth_nothing_to_learn_from():
    """Two answers of two tokens at places 1 and 2; the second has no score. Score 3 and no KL: its reward is the last
    place's, and the mean score is the first answer's alone. Its tokens are still in the KL and the entropy."""
    model = make_model(ModelConfig("llama", 8, 8, 1, 1, 1, 8, 16, query_scale=8**-0.5))
    params = model.init(jax.random.key(0))
    ones = jnp.ones((1, 2, 4), jnp.int32)
    batch = RolloutBatch(
        tokens=ones,
        segment_ids=ones,
        response_mask=jnp.asarray([[[0, 1, 1, 0], [0, 1, 1, 0]]]),
        sampler_logps=jnp.zeros((1, 2, 4)),
        last_token_index=jnp.full((1, 2, 1), 3),
        scores=jnp.asarray([[[3.0], [99.0]]]),
        has_score=jnp.asarray([[[1], [0]]]),
    )
    made, metrics = experience_of(
        params, jnp.float32(0), batch, params, networks=Networks(model, model, None, 1.0)
    )
    assert made.response_mask.tolist() == [[[0, 1, 1, 0], [0, 0, 0, 0]]]
    np.testing.assert_allclose(made.rewards[0, 0], [0, 0, 3, 0], atol=1e-6)
    for name, sum_, count in (
        ("score", 3, 1),
        ("reward_per_sequence", 3, 1),
        ("completion_tokens", 4, 2),
        ("kl_per_sequence", 0, 2),
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


def linear(params: dict, part: Array) -> tuple[Array, Metrics]:
    """Sum of x (w + v) over the numbers x of a micro-batch `[B, 1]`: the gradient of its mean is the mean of x."""
    total = jnp.sum(part) * (params["w"] + params["value"]["v"])
    count = jnp.float32(part.size)
    return total, {"loss": Metric(total, count), "most": Maximum(jnp.max(part))}


def text_loss(params: dict, part: Array) -> tuple[Array, Metrics]:
    total = jnp.sum(part) * params["w"]
    return total, {"text": Metric(total, jnp.float32(part.size))}


def updated(
    optimizer,
    *,
    minibatches: int,
    epochs: int = 1,
    mixed: Mixed | None = None,
    last: float = 4.0,
    state: TrainState | None = None,
    schedule=lambda step: jnp.float32(LR),
):
    """Answers 1, 2, 3, 4 in two micro-batches."""
    answers = jnp.asarray([[[1.0], [2.0]], [[3.0], [last]]])
    return minibatch_updates(
        state or state_of(optimizer),
        answers,
        epochs=epochs,
        minibatches=minibatches,
        targets=lambda rows: rows,
        losses=linear,
        optimizer=optimizer,
        schedule=schedule,
        ema_decay=0.0,
        mixed=mixed,
    )


def sgd(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.chain(divide_and_clip(0.0), optax.sgd(LR), *links)


def test_a_second_loss_is_added_to_the_first():
    """w falls by 0.1 (mean of 1, 2, 3, 4 + 27.8 x mean of 10, 20, 60) = 0.1 (2.5 + 27.8 x 30) = 83.65, v by 0.25."""
    mixed = Mixed(jnp.asarray([[[10.0], [20.0], [60.0]]]), text_loss, "text", 27.8)
    state, metrics = updated(sgd(), minibatches=1, mixed=mixed)
    np.testing.assert_allclose(state.params["w"], -83.65, rtol=1e-6)
    np.testing.assert_allclose(state.params["value"]["v"], -0.25, rtol=1e-6)
    assert metrics["train/text"].count == 3 and metrics["train/loss"].count == 4


def test_the_loss_that_is_told_is_the_one_that_is_minimized():
    """The second update starts at w = -0.1 (2.5 + 2 x 30) = -6.25 and v = -0.25, the first at 0: its loss is
    2.5 x -6.5 + 2 x 30 x -6.25 = -391.25, and the mean of both is half of that."""
    mixed = Mixed(jnp.asarray([[[10.0], [20.0], [60.0]]]), text_loss, "text", 2.0)
    _, metrics = updated(sgd(), minibatches=1, epochs=2, mixed=mixed)
    loss = metrics["train/loss"]
    np.testing.assert_allclose(loss.sum / loss.count, -391.25 / 2, rtol=1e-6)


def test_the_learning_rate_that_is_told_is_the_optimizers():
    """Of two updates of the first iteration one is skipped; the second iteration begins with the rate of update 1."""

    def schedule(step: Array) -> Array:
        return jnp.float32(LR) * (step + 1)

    optimizer = optax.chain(divide_and_clip(0.0), optax.sgd(schedule))
    state, metrics = updated(optimizer, minibatches=2, last=np.nan, schedule=schedule)
    assert metrics["train/lr"].sum == pytest.approx(LR)
    _, metrics = updated(optimizer, minibatches=2, state=state, schedule=schedule)
    assert metrics["train/lr"].sum == pytest.approx(2 * LR)


def test_each_minibatch_has_its_own_share():
    """Two minibatches, two epochs: the answers move w by 0.1 x (5 + 5), whatever their order, and the shares' means, 15
    and 60, come once in each epoch: 0.1 x 2 x (15 + 60) = 15. One update that had all rows would add 2 x 0.1 x 37.5."""
    mixed = Mixed(jnp.asarray([[[10.0], [20.0]], [[50.0], [70.0]]]), text_loss, "text", 1.0)
    state, metrics = updated(sgd(), minibatches=2, epochs=2, mixed=mixed)
    np.testing.assert_allclose(state.params["w"], -1.0 - 15.0, rtol=1e-6)
    np.testing.assert_allclose(state.params["value"]["v"], -1.0, rtol=1e-6)
    assert int(state.opt_state["updates"]) == 4 and metrics["train/text"].count == 8


def test_a_skipped_update_is_in_no_mean():
    """The last answer is NaN: of two minibatches one is skipped, and the metrics are of the other's two answers."""
    state, metrics = updated(sgd(), minibatches=2, last=np.nan)
    assert int(state.skipped) == 1 and metrics["train/loss"].count == 2
    assert np.isfinite(float(state.params["w"])) and float(state.params["w"]) != 0
    assert all(np.isfinite(float(metric.sum)) for metric in metrics.values())
    assert metrics["train/grad_norm"].count == 1


def test_a_maximum_is_one_over_all_micro_batches_and_updates():
    _, metrics = updated(sgd(), minibatches=2, epochs=2)
    assert metrics["train/most"].sum == 4 and metrics["train/most"].count == 1


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
