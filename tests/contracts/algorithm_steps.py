"""Two steps of every algorithm on its `:tiny` config, by the task that the shipped wiring makes."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tasks import task_of

from launch.config import load_file
from posttrain_jax.core.trees import leaf_paths
from posttrain_jax.core.types import TrainState
from posttrain_jax.run.checkpoint import Checkpoints

CONFIGS = {
    "sft": "configs/sft/smollm2_135m.py:tiny",
    "reward_model": "configs/reward_model/smollm2_135m.py:tiny",
    "dpo": "configs/dpo/smollm2_135m.py:tiny",
    "kto": "configs/dpo/smollm2_135m_kto.py:tiny",
    "ppo": "configs/ppo/letters.py:tiny",
    "rloo": "configs/ppo/letters.py:rloo",
}
CHECKED = ("embed/embedding", "attn/q/kernel", "mlp/down/kernel", "final_norm/scale", "score_head/kernel")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Two steps of an algorithm, the second also from a checkpoint of the first.

    Attributes:
      abstract: the shapes and shardings that the task promises.
      signatures: types and shardings of the states before the first and before the second step.
      deleted: whether each array of the first state is gone after the step that took it.
      metrics: of both steps, sums over counts.
      first: the parameters before the first step.
      second, resumed: the parameters and optimizer states after the second step.
    """

    abstract: Any
    signatures: list[Any]
    deleted: list[bool]
    metrics: list[dict[str, float]]
    first: Any
    second: Any
    resumed: Any


def signature(state: TrainState) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, str(leaf.sharding)), state)


def two_steps(algorithm: str, workdir: pathlib.Path) -> Steps:
    """Takes them in a new workdir."""
    workdir.mkdir()
    config = load_file(CONFIGS[algorithm])
    config.train.steps, config.train.epochs = 4, 0.0
    config.data.eval, config.eval.every = "", 0
    if algorithm not in ("ppo", "rloo"):
        config.eval.prompts = ()
        config.train.rows_per_step = config.train.micro_rows = config.eval.batch_rows = 8
    task = task_of(config, workdir)
    checkpoints = Checkpoints(workdir)
    first = task.init_state()
    checkpoints.save_frozen(first.frozen)
    signatures = [signature(first)]
    leaves = jax.tree.leaves((first.params, first.opt_state))
    # A view of the first parameters would keep these from being donated.
    params = jax.device_get(jax.tree.map(jnp.copy, first.params))
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
        first=params,
        second=ends[0],
        resumed=ends[1],
    )


def golden_values(steps: Steps) -> dict[str, float]:
    """Losses and gradient norms of both steps; and by how much some parameters moved in the two: the norm of their
    change, and its product with a fixed vector of unit variance, which no entry can leave without a trace."""
    values = {
        f"{name}, step {number}": metrics[f"train/{name}"]
        for number, metrics in enumerate(steps.metrics, 1)
        for name in ("loss", "grad_norm")
    }
    before, after = (jax.tree.leaves(tree) for tree in (steps.first, steps.second[0]))
    for path, old, new in zip(leaf_paths(steps.first), before, after, strict=True):
        if path.endswith(CHECKED):
            change = (np.asarray(new, np.float64) - np.asarray(old, np.float64)).ravel()
            values[f"{path}, norm of the change"] = float(np.linalg.norm(change))
            fixed = np.random.default_rng(0).standard_normal(change.size)
            values[f"{path}, product of the change"] = float(change @ fixed)
    return values
