"""What every evaluation starts from: all keys of its task, with their defaults."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import config_dict
from posttrain_jax.evaluate.options import sections_of_task


def eval_config(task: str) -> ConfigDict:
    """The keys of a task; `launch.evaluate --describe` says what each means."""
    config = config_dict(sections_of_task(task))
    config.eval.task = task
    return config
