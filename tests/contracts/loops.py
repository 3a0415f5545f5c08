"""What tests of the loop share: a tiny run, what it wrote, and a collector that crashes."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict
from tasks import task_of

from configs.sft.smollm2_135m import get_config
from posttrain_jax.core.schema import read
from posttrain_jax.core.types import Task
from posttrain_jax.run.loop import LoopOptions
from posttrain_jax.run.options import CheckpointOptions, LogOptions, OfflineEvalOptions

SPEED = {"train/tokens_per_second", "train/seconds_per_step", "train/mfu"}


def tiny_config(**changes) -> ConfigDict:
    """The :tiny experiment on 8 devices, without samples; `section__key=value` changes a key."""
    config = get_config("tiny")
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.eval.prompts = ()
    config.log.tensorboard = False
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


def options(config: ConfigDict) -> LoopOptions:
    values = config.to_dict()
    return LoopOptions(
        log=read(LogOptions, values["log"], "log"),
        eval=read(OfflineEvalOptions, values["eval"], "eval"),
        checkpoint=read(CheckpointOptions, values["checkpoint"], "checkpoint"),
        max_skipped=config.train.max_skipped,
        config=values,
    )


def make_task(config: ConfigDict, workdir: Path) -> Task:
    workdir.mkdir(parents=True, exist_ok=True)
    return task_of(config, workdir)


def lines(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


class CrashingCollector:
    """A collector that fails after some steps, as a crash of the process would, but within this one."""

    def __init__(self, inner, after: int):
        self.inner, self.left = inner, after

    def next(self, state):
        if not self.left:
            raise RuntimeError("crash")
        self.left -= 1
        return self.inner.next(state)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)

    def close(self):
        self.inner.close()


def same_but_for_speed(a: Path, b: Path, name: str = "metrics.jsonl") -> None:
    drop = SPEED | {"time"}
    left, right = (
        [{k: v for k, v in row.items() if k not in drop} for row in lines(p, name)] for p in (a, b)
    )
    assert left == right
