"""From a config to its task, as `launch.train` goes, without the loop."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from posttrain_jax.core.types import Task
from posttrain_jax.models.spec import ModelSpec
from posttrain_jax.wiring.algorithms import make_task, read_experiment
from posttrain_jax.wiring.experiment import Experiment
from posttrain_jax.wiring.model import model_spec


def experiment_of(config: ConfigDict) -> Experiment:
    return read_experiment(config.to_dict())


def task_of(config: ConfigDict, workdir: Path) -> Task:
    return make_task(experiment_of(config), workdir)


def spec_of(config: ConfigDict, *, is_reward: bool = False) -> ModelSpec:
    return model_spec(experiment_of(config), is_reward=is_reward)
