"""Ours: the task that `launch.train` would run, iteration by iteration, without its loop's files."""

from __future__ import annotations

import pathlib
import tempfile

import jax
import numpy as np
from ml_collections import ConfigDict

from configs.base import online_config
from experiments.bench.rollouts_contract import BETA, CLIP, EPOCHS, LR, Recorder, Settings, parse_settings
from launch.entry import set_up_jax
from posttrain_jax.core.types import Metrics
from posttrain_jax.wiring.algorithms import make_task, read_experiment

PARTS = {
    "generate": "train/seconds_generate",
    "score": "train/seconds_score",
    "reference": "train/seconds_reference",
    "train": "train/seconds_train",
}


def config_of(settings: Settings) -> ConfigDict:
    """The experiment."""
    config = online_config(settings.setting)
    config.model.init = str(settings.rows / "model")
    config.data.train = str(settings.rows / "prompts.jsonl")
    config.data.max_length = 256
    config.rollout.max_new_tokens = settings.new_tokens
    config.rollout.samples = settings.samples
    if settings.setting == "ppo":
        config.score.models = (str(settings.rows / "reward"),)
        config.ppo.value, config.ppo.value_clip = str(settings.rows / "reward"), CLIP
    else:
        config.score.functions = ("posttrain_jax.rewards.rules:token_count",)
        config.score.workers = 1
    config[settings.setting].epochs = EPOCHS[settings.setting]
    config[settings.setting].kl_coefficient, config[settings.setting].clip = BETA, CLIP
    config.train.steps = settings.iterations
    config.train.rows_per_step = settings.prompts
    config.train.micro_rows = settings.together
    config.optim.lr = LR
    config.optim.schedule = "constant"
    return config


def value(metrics: Metrics, name: str) -> float:
    """A metric's value."""
    return float(np.divide(metrics[name].sum, metrics[name].count))


def main() -> None:
    """Runs the iterations and prints the line."""
    settings = parse_settings(__doc__)
    set_up_jax()
    recorder = Recorder("jax", settings, {"jax": jax.__version__})
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(read_experiment(config_of(settings).to_dict()), pathlib.Path(folder))
        state = task.init_state()
        recorder.start()
        for _ in range(settings.iterations):
            collected = task.collector.next(state)
            state, metrics = task.train_step(state, collected.batch)
            metrics = {**collected.metrics, **metrics}
            jax.block_until_ready(state)
            recorder.iteration(
                completion_tokens=value(metrics, "train/completion_tokens"),
                kl=value(metrics, "train/kl_per_sequence"),
                parts={part: value(metrics, name) for part, name in PARTS.items()},
            )
        task.collector.close()
    recorder.finish()


if __name__ == "__main__":
    main()
