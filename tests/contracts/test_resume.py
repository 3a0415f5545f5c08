"""Runs that crash, are resumed, or start anew: nothing is lost, and nothing of before is left."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from contracts.loops import (
    CrashingCollector,
    lines,
    make_task,
    options,
    same_but_for_speed,
    tiny_config,
)
from posttrain_jax.algorithms import sft
from posttrain_jax.core.checkpoint_params import restore_params
from posttrain_jax.core.errors import InputError, StepNotTaken
from posttrain_jax.core.workdir import completed_steps
from posttrain_jax.run.loop import train


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


RESUMED = {
    "lora": {"optim__name": "adamw"},
    "adafactor_accumulated": {"optim__name": "adafactor", "train__micro_rows": 4, "train__rows_per_step": 8},
    "sgd_ema": {"optim__name": "sgd", "optim__momentum": 0.9, "optim__ema": 0.9, "optim__lr": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "sgd_ema", "adafactor_accumulated"])
def test_a_crashed_run_ends_as_one_that_never_crashed(tmp_path: Path, name: str):
    """Eight devices; the crash lies between a checkpoint (4) and a log line (6), in the middle of a window."""
    config = tiny_config(train__steps=7, checkpoint__every=2, log__every=3, eval__every=3, **RESUMED[name])
    if name == "lora":
        config.model.lora.rank = 2
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    task = make_task(config, whole)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        sft.combine(task.abstract_state.params, task.abstract_state.frozen),
    )
    train(task, options(config), whole)
    task = make_task(config, broken)
    with pytest.raises(RuntimeError, match="crash"):
        train(
            dataclasses.replace(task, collector=CrashingCollector(task.collector, after=5)),
            options(config),
            broken,
        )
    assert completed_steps(broken)[-1] == 4
    train(make_task(config, broken), options(config), broken)
    same_but_for_speed(whole, broken)
    for ema in (False, True) if config.optim.ema else (False,):
        want, got = (restore_params(path, shapes, ema=ema)[0] for path in (whole, broken))
        jax.tree.map(np.testing.assert_array_equal, got, want)
    if name == "lora":
        assert not (whole / "checkpoints/7/params/embed").exists()
        assert any(np.asarray(want["layers"]["attn"]["q"]["lora_b"]).ravel())


def test_a_step_that_is_not_taken_loses_nothing(tmp_path: Path):
    """The third of 4 steps, where the next checkpoint is of the last: step 2 is saved, and the rows are read again."""
    config = tiny_config(log__every=1, checkpoint__every=0)
    read: list[np.ndarray] = []

    class Failing(CrashingCollector):
        def next(self, state):
            collected = self.inner.next(state)
            read.append(np.asarray(collected.batch.tokens))
            if len(read) == 3:
                raise StepNotTaken("The reward function f failed at all 8 completions.")
            return collected

    def failing_task():
        task = make_task(config, tmp_path)
        return dataclasses.replace(task, collector=Failing(task.collector, after=-1))

    with pytest.raises(InputError, match="failed at all 8 completions"):
        train(failing_task(), options(config), tmp_path)
    assert completed_steps(tmp_path) == [2]
    assert not (tmp_path / "summary.json").exists()
    train(failing_task(), options(config), tmp_path)
    np.testing.assert_array_equal(read[2], read[3])
    assert len(read) == 5 and [row["step"] for row in lines(tmp_path) if "train/loss" in row] == [1, 2, 3, 4]


class Replaying(CrashingCollector):
    """A collector with arrays of its own: it gives the older half of a step's rows again in the next step."""

    def __init__(self, inner, after: int):
        super().__init__(inner, after)
        self.kept = np.zeros((0, 0), np.int32)

    def next(self, state):
        collected = super().next(state)
        tokens = np.asarray(collected.batch.tokens)
        half = tokens.shape[1] // 2
        if self.kept.size:
            replayed = np.concatenate([self.kept, tokens[:, half:]], axis=1)
            new = jax.device_put(replayed, collected.batch.tokens.sharding)
            batch = dataclasses.replace(collected.batch, tokens=new)
            collected = dataclasses.replace(collected, batch=batch)
        self.kept = tokens[:, half:]
        return collected

    def get_state(self):
        state = self.inner.get_state()
        return dataclasses.replace(state, arrays={"kept": self.kept} if self.kept.size else {})

    def set_state(self, state):
        self.inner.set_state(state)
        self.kept = state.arrays["kept"]


def test_arrays_of_a_collector_are_in_the_checkpoint(tmp_path: Path):
    """A run that crashes after its third step ends as one that does not. A checkpoint whose arrays are damaged is set
    aside like any other."""
    config = tiny_config(train__steps=6, checkpoint__every=2, eval__every=0)

    def run_in(folder: Path, after: int) -> None:
        task = make_task(config, folder)
        train(dataclasses.replace(task, collector=Replaying(task.collector, after)), options(config), folder)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run_in(whole, -1)
    with pytest.raises(RuntimeError, match="crash"):
        run_in(broken, 5)
    assert completed_steps(broken) == [2, 4]
    for file in (broken / "checkpoints/4/collector").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    run_in(broken, -1)
    assert (broken / "checkpoints/4.damaged").is_dir()
    same_but_for_speed(whole, broken)


def test_a_new_start_forgets_the_frozen_parameters_of_one_without_checkpoints(tmp_path: Path):
    """A LoRA run dies before its first checkpoint, and is started again on another base model."""
    config = tiny_config(train__steps=1, eval__every=0)
    config.data.eval = ""
    config.model.lora.rank = 2
    task = make_task(config, tmp_path)
    with pytest.raises(RuntimeError, match="crash"):
        train(
            dataclasses.replace(task, collector=CrashingCollector(task.collector, after=0)),
            options(config),
            tmp_path,
        )
    config.seed += 1
    task = make_task(config, tmp_path)
    train(task, options(config), tmp_path)
    frozen = task.init_state().frozen
    whole = sft.combine(task.abstract_state.params, task.abstract_state.frozen)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole)
    params, _ = restore_params(tmp_path, shapes)
    np.testing.assert_array_equal(params["embed"]["embedding"], frozen["embed"]["embedding"])


def test_a_resumed_run_does_not_name_rows_of_updates_skipped_before_its_checkpoint(tmp_path: Path):
    """An update was skipped, no line was logged since, and the run went on from a checkpoint."""
    config = tiny_config(train__steps=4, checkpoint__every=2, eval__every=0, log__every=100)
    task = make_task(config, tmp_path)

    def skipping_step(state, batch):
        first = int(state.step) == 0
        state, metrics = task.train_step(state, batch)
        more = jax.device_put(np.int32(first), state.skipped.sharding)
        skipped = state.skipped + more
        return dataclasses.replace(state, skipped=skipped), metrics

    broken = dataclasses.replace(
        task, train_step=skipping_step, collector=CrashingCollector(task.collector, after=3)
    )
    with pytest.raises(RuntimeError, match="crash"):
        train(broken, options(config), tmp_path)
    assert [row["step"] for row in lines(tmp_path, "skipped.jsonl")] == [2]
    train(make_task(config, tmp_path), options(config), tmp_path)
    assert [row["step"] for row in lines(tmp_path, "skipped.jsonl")] == [2]
