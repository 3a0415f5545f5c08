"""What every algorithm owes the loop, on the step that it ships: one compiled step each, two steps, one checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from tasks import task_of

from launch.config import load_file
from posttrain_jax.core.types import TrainState
from posttrain_jax.run.checkpoint import Checkpoints
from posttrain_jax.wiring.algorithms import ALGORITHMS

CONFIGS = {
    "sft": "configs/sft/smollm2_135m.py:tiny",
    "reward_model": "configs/reward_model/smollm2_135m.py:tiny",
    "dpo": "configs/dpo/smollm2_135m.py:tiny",
    "kto": "configs/dpo/smollm2_135m_kto.py:tiny",
    "ppo": "configs/ppo/letters.py:tiny",
    "rloo": "configs/ppo/letters.py:rloo",
}

pytestmark = [pytest.mark.slow, pytest.mark.every_python]


def test_every_algorithm_is_here():
    assert CONFIGS.keys() == {*ALGORITHMS, "ppo", "rloo"}


@dataclasses.dataclass(frozen=True)
class Steps:
    """Two steps of an algorithm, the second also from a checkpoint of the first.

    Attributes:
      abstract: the shapes and shardings that the task promises.
      signatures: types and shardings of the states before the first and before the second step.
      deleted: whether each array of the first state is gone after the step that took it.
      metrics: of both steps, sums over counts.
      second, resumed: the parameters and optimizer states after the second step.
    """

    abstract: Any
    signatures: list[Any]
    deleted: list[bool]
    metrics: list[dict[str, float]]
    second: Any
    resumed: Any


def signature(state: TrainState) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, str(leaf.sharding)), state)


@pytest.fixture(scope="module", params=CONFIGS)
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    workdir.mkdir()
    config = load_file(CONFIGS[request.param])
    config.train.steps, config.train.epochs = 4, 0.0
    config.data.eval, config.eval.every = "", 0
    if request.param not in ("ppo", "rloo"):
        config.eval.prompts = ()
        config.train.rows_per_step = config.train.micro_rows = config.eval.batch_rows = 8
    task = task_of(config, workdir)
    checkpoints = Checkpoints(workdir)
    first = task.init_state()
    checkpoints.save_frozen(first.frozen)
    signatures = [signature(first)]
    leaves = jax.tree.leaves((first.params, first.opt_state))
    collected = task.collector.next(first)
    second, metrics_1 = task.train_step(first, collected.batch)
    metrics_1 = {**collected.metrics, **metrics_1}
    signatures.append(signature(second))
    checkpoints.save(second, {}, {})
    checkpoints.wait()
    restored = checkpoints.restore(task.abstract_state)
    assert restored is not None
    checkpoints.close()
    position = task.collector.get_state()
    ends = []
    for state in (second, restored.state):
        task.collector.set_state(position)
        collected = task.collector.next(state)
        after, metrics_2 = task.train_step(state, collected.batch)
        metrics_2 = {**collected.metrics, **metrics_2}
        ends.append(jax.device_get((after.params, after.opt_state)))
    task.collector.close()
    return Steps(
        abstract=signature(task.abstract_state),
        signatures=signatures,
        deleted=[leaf.is_deleted() for leaf in leaves],
        metrics=[
            {name: float(m.sum) / max(float(m.count), 1.0) for name, m in metrics.items()}
            for metrics in (metrics_1, metrics_2)
        ],
        second=ends[0],
        resumed=ends[1],
    )


def test_the_second_step_is_not_traced_again(steps: Steps):
    """A state that a step gives back has the types and shardings of the one it took, and those that were promised."""
    assert steps.signatures[0] == steps.signatures[1] == steps.abstract


def test_the_state_is_donated(steps: Steps):
    assert all(steps.deleted)


def test_a_step_from_a_checkpoint_is_the_same_bit_for_bit(steps: Steps):
    jax.tree.map(np.testing.assert_array_equal, steps.resumed, steps.second)


def test_the_metrics_are_finite_and_both_steps_have_the_same(steps: Steps):
    first, second = steps.metrics
    assert first.keys() == second.keys() and any("loss" in name for name in first)
    assert all(np.isfinite(value) for value in (*first.values(), *second.values())), steps.metrics
