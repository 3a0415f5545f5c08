"""One iteration of PPO and RLOO on packed rows against one trajectory a row, and on a mesh against one device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from contracts.tiny import LLAMA, make_mesh, params_of, worst_difference
from jax.sharding import Mesh

from posttrain_jax.algorithms import ppo, rloo
from posttrain_jax.core.optim import OptimOptions, make_optimizer, make_schedule
from posttrain_jax.core.sharding import jit_step, replicated, tree_shardings
from posttrain_jax.core.types import Metrics, PyTree
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import make_model
from posttrain_jax.rollouts.batch import epoch_orders
from posttrain_jax.rollouts.experience import Networks
from posttrain_jax.rollouts.trajectory import BatchShape, HostTrajectories, Trajectory, put, stack
from posttrain_jax.wiring.online import init_state

S = 24
SHAPE = BatchShape(
    trajectories=16, length=S, epochs=2, minibatches=2, micro_batches=1, micro_rows=4, row_length=2 * S
)
STEPS = {
    "ppo": functools.partial(ppo.train_step, options=ppo.Options(minibatches=2, whiten_rewards=True)),
    "rloo": functools.partial(rloo.train_step, options=rloo.Options(epochs=2), samples=4),
}


def trajectories() -> list[Trajectory]:
    """Of 3 to 24 tokens, four to a prompt; the fourth has no score, and the sixth has a token in its middle that an
    environment wrote."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(SHAPE.trajectories):
        first = int(rng.integers(1, 6))
        count = S if n == 0 else first + int(rng.integers(2, S - 6))
        mask = np.arange(count) >= first
        if n == 5:
            mask[-2] = False
        made.append(
            Trajectory(
                prompt=Prompt(np.zeros(first, np.int32), {}, "p:1"),
                tokens=rng.integers(1, LLAMA.vocab_size, count).astype(np.int32),
                response_mask=mask.astype(np.int32),
                sampler_logps=np.where(mask, -rng.random(count), 0).astype(np.float32),
                ended=True,
                group=n // 4,
                policy_step=0,
                score=float(rng.normal()),
                has_score=n != 3,
                reference_logps=np.where(mask, -4 - rng.random(count), 0).astype(np.float32),
            )
        )
    return made


def packed() -> HostTrajectories:
    return stack(trajectories(), SHAPE, epoch_orders(0, 0, epochs=2, trajectories=SHAPE.trajectories))


def one_a_row(host: HostTrajectories) -> HostTrajectories:
    """The same minibatches, every trajectory in a row of its own: two micro-batches of four rows."""
    lengths = [one.tokens.size for one in trajectories()]
    indices = np.full((2, 2, 2, 4, 2 * S), SHAPE.trajectories * S, np.int32)
    for epoch in range(2):
        for minibatch in range(2):
            there = host.indices[epoch, minibatch]
            members = np.unique(there[there < SHAPE.trajectories * S] // S)
            assert len(members) == 8
            for at, number in enumerate(members.tolist()):
                row = indices[epoch, minibatch, at // 4, at % 4]
                row[: lengths[number]] = number * S + np.arange(lengths[number])
    return dataclasses.replace(host, indices=indices)


@functools.cache
def iteration(name: str, arranged: Callable[[], HostTrajectories], mesh: Mesh) -> tuple[PyTree, Metrics]:
    """Parameters and metrics after one iteration."""
    model = make_model(LLAMA, remat="none", attention="xla")
    params = dict(params_of(model, mesh))
    if name == "ppo":
        head = score_head_params(jax.random.key(1), LLAMA.d_model, init="normal")
        params["value"] = {**params_of(model, mesh, seed=1), "score_head": head}
        params["value"].pop("head", None)
    options = OptimOptions(
        name="sgd", lr=0.3, schedule="constant"
    )  # not Adam, which divides rounding by rounding
    rate = make_schedule(options, steps=9)
    optimizer = make_optimizer(options, rate)
    state = init_state(
        params, jax.random.key(0), model=model, kl_coefficient=0.1, optimizer=optimizer, ema_decay=0.0
    )
    step = jit_step(
        functools.partial(
            STEPS[name],
            networks=Networks(model, model if name == "ppo" else None, 0.7),
            optimizer=optimizer,
            schedule=rate,
            ema_decay=0.0,
        ),
        mesh,
        in_shardings=(tree_shardings(state, mesh), None),
        out_shardings=replicated(mesh),
    )
    batch = put(arranged(), mesh, has_reference=True, auxiliary={})
    after, metrics = step(jax.device_put(state, tree_shardings(state, mesh)), batch)
    return jax.device_get(after.params), jax.device_get(metrics)


def unpacked() -> HostTrajectories:
    return one_a_row(packed())


def assert_equal(got: tuple[PyTree, Metrics], want: tuple[PyTree, Metrics], but: set[str]) -> None:
    assert worst_difference(got[0], want[0]) < 2e-4
    assert got[1].keys() == want[1].keys()
    for name in want[1].keys() - but:
        for ours, theirs in zip(jax.tree.leaves(got[1][name]), jax.tree.leaves(want[1][name]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("name", STEPS)
def test_packed_rows_change_nothing_but_the_padding(name):
    one = make_mesh(1, 1, 1)
    got, want = iteration(name, packed, one), iteration(name, unpacked, one)
    assert_equal(got, want, {"train/padding_share"})
    padding = [float(metrics["train/padding_share"].sum) for _, metrics in (got, want)]
    assert padding[0] < 0.5 * padding[1]


@pytest.mark.parametrize("name", STEPS)
def test_a_mesh_changes_nothing(name):
    assert_equal(
        iteration(name, packed, make_mesh(2, 2, 2)), iteration(name, packed, make_mesh(1, 1, 1)), set()
    )


def test_minibatches_are_those_of_the_permutation():
    """The trajectories of each minibatch are the permutation's, which is jax.random's of the step's key."""
    orders = epoch_orders(7, 3, epochs=2, trajectories=16)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), 3), 2)
    np.testing.assert_array_equal(orders, [jax.random.permutation(key, 16) for key in keys])
    host = stack(trajectories(), SHAPE, orders)
    for epoch in range(2):
        for minibatch in range(2):
            indices = host.indices[epoch, minibatch]
            members = np.unique(indices[indices < 16 * S] // S)
            assert set(members) == set(orders[epoch].reshape(2, -1)[minibatch])
    lengths = [one.tokens.size for one in trajectories()]
    for epoch in host.indices:
        filled = np.sort(epoch[epoch < 16 * S])
        np.testing.assert_array_equal(
            filled, np.concatenate([n * S + np.arange(length) for n, length in enumerate(lengths)])
        )
