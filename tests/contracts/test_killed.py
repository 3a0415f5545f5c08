"""A run that is killed at any moment and started again ends as one that never was: parameters bit for bit,
the same metrics.jsonl and samples.jsonl. Real processes of `launch.train`, real signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from entry_points import ROOT
from tasks import spec_of

from configs.sft.smollm2_135m import get_config
from posttrain_jax.core.checkpoint_params import restore_params
from posttrain_jax.core.workdir import completed_steps
from posttrain_jax.models.io.load import load_members, load_model

pytestmark = [pytest.mark.slow, pytest.mark.alone]

STEPS = 20
COMMAND = (
    "launch.train",
    "--config=configs/sft/smollm2_135m.py:tiny",
    f"--config.train.steps={STEPS}",
    "--config.checkpoint.every=2",
    "--config.checkpoint.keep=3",
    "--config.log.every=3",
    "--config.eval.every=5",
    "--config.optim.ema=0.9",
    "--config.eval.max_new_tokens=4",
)
VARY = {"time", "train/tokens_per_second", "train/seconds_per_step", "train/mfu"}


def rows(workdir: Path, name: str) -> list[dict]:
    parsed = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in VARY and not key.startswith("train/seconds_")}
        for row in parsed
    ]


def params(workdir: Path, *, ema: bool):
    shapes = spec_of(get_config("tiny")).model.abstract_params()
    tree, step = restore_params(workdir, shapes, ema=ema)
    assert step == STEPS
    return jax.device_get(tree)


def assert_same_end(workdir: Path, reference: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(workdir, name) == rows(reference, name), name
    for ema in (False, True):
        jax.tree.map(np.testing.assert_array_equal, params(workdir, ema=ema), params(reference, ema=ema))
    ends = [json.loads((path / "summary.json").read_text()) for path in (workdir, reference)]
    assert ends[0] == ends[1]


@pytest.fixture(scope="module")
def reference(processes, tmp_path_factory) -> Path:
    """A run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("killed") / "reference"
    ended = processes.run(*COMMAND, f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert [row["step"] for row in rows(workdir, "metrics.jsonl") if "train/loss" in row] == [
        *range(3, 20, 3),
        20,
    ]
    assert {row["step"] for row in rows(workdir, "samples.jsonl")} == {0, 5, 10, 15, 20}
    return workdir


def logged(workdir: Path) -> str:
    path = workdir / "metrics.jsonl"
    return path.read_text() if path.is_file() else ""


def being_written(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def test_sigkill_at_many_moments(processes, reference: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    checkpoints = workdir / "checkpoints"
    moments = {
        "after the first evaluation, before any checkpoint": lambda: '"eval/loss"' in logged(workdir),
        "the folder of a save has just appeared": lambda: bool(being_written(workdir)),
        "right after a commit": lambda: (checkpoints / "2").is_dir(),
        "a line has just been logged, the next step is under way": lambda: '"step": 6' in logged(workdir),
        "parameters are being written": lambda: any(
            path.is_file() for folder in being_written(workdir) for path in folder.glob("params*/**/*")
        ),
        "the manifest is there, the name is not": lambda: (
            any((folder / "manifest.json").exists() for folder in being_written(workdir))
            or (checkpoints / "12").is_dir()
        ),
    }
    half_written = 0
    for moment, reached in moments.items():
        ended = processes.run_until(reached, signal.SIGKILL, *COMMAND, f"--workdir={workdir}")
        assert ended.code == -signal.SIGKILL, (moment, ended)
        assert not (workdir / "summary.json").exists(), moment
        half_written += bool(being_written(workdir))
    assert half_written, "no kill fell into a save; the moments need to be chosen anew"
    ended = processes.run(*COMMAND, f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    assert "Resuming from step" in ended.out
    assert not being_written(workdir), "half-written checkpoints are left"
    assert_same_end(workdir, reference)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_and_goes_on(processes, reference: Path, signum: signal.Signals, tmp_path: Path):
    workdir = tmp_path / "run"
    ended = processes.run_until(
        lambda: '"step": 3' in logged(workdir), signum, *COMMAND, f"--workdir={workdir}"
    )
    assert ended.code == 0, ended.err
    assert f"{signum.name}: the run saves after this step" in ended.out
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["status"] == "preempted"
    assert 3 <= summary["final_step"] < STEPS
    assert completed_steps(workdir)[-1] == summary["final_step"]
    ended = processes.run(*COMMAND, f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    assert f"Resuming from step {summary['final_step']} " in ended.out
    assert_same_end(workdir, reference)


def test_starting_a_complete_run_again_changes_nothing(processes, reference: Path):
    before = (rows(reference, "metrics.jsonl"), params(reference, ema=False))
    ended = processes.run(*COMMAND, f"--workdir={reference}")
    assert ended.code == 0, ended.err
    assert rows(reference, "metrics.jsonl") == before[0]
    jax.tree.map(np.testing.assert_array_equal, params(reference, ema=False), before[1])


def test_a_second_run_is_refused_and_the_first_outlives_its_reader(
    reference: Path, processes, tmp_path: Path
):
    """As in `launch.train ... | head -1`, and then the same command again while it runs."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", *COMMAND, f"--workdir={workdir}", "--config.train.steps=20"]
    pipe = subprocess.PIPE
    first = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=processes.environment()
    )
    try:
        first.stdout.readline()
        first.stdout.close()
        second = processes.run(*COMMAND, f"--workdir={workdir}")
        assert second.code == 2, second
        (line,) = second.err.splitlines()
        assert f"The workdir {workdir} is in use by process {first.pid} on " in line
        assert first.stderr.read() == ""
        assert first.wait(120) == 0
    finally:
        first.kill()
        first.wait()
        first.stderr.close()
    assert_same_end(workdir, reference)


def test_sigterm_while_the_first_step_compiles(processes, tmp_path: Path):
    """Nothing is trained yet: it still ends in order, with a checkpoint of the step it stopped at."""
    workdir = tmp_path / "run"
    ended = processes.run_until(
        lambda: (workdir / "checkpoints").is_dir(), signal.SIGTERM, *COMMAND, f"--workdir={workdir}"
    )
    assert ended.code == 0, ended.err
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["status"] == "preempted"
    assert completed_steps(workdir) == [summary["final_step"]]


def test_sigterm_while_the_model_is_made(processes, tmp_path: Path):
    """Before there is anything to save: it ends in order, and the same command starts the run."""
    workdir = tmp_path / "run"
    ended = processes.run_until(
        lambda: (workdir / "config.json").is_file(), signal.SIGTERM, *COMMAND, f"--workdir={workdir}"
    )
    assert ended.code == 0, ended.err
    assert ended.err == ""
    summary = workdir / "summary.json"
    assert not summary.exists() or json.loads(summary.read_text())["status"] == "preempted"


PREFERENCES = {
    "dpo": ("--config=configs/dpo/smollm2_135m.py:tiny",),
    "an ensemble of reward models": (
        "--config=configs/reward_model/smollm2_135m.py:tiny",
        "--config.reward.members=2",
        "--config.model.lora.rank=2",
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_learning_from_preferences_goes_on(processes, name: str, tmp_path: Path):
    """DPO is killed after a checkpoint; reward models after the last step, before their scores are normalized."""
    command = (
        "launch.train",
        *PREFERENCES[name],
        "--config.train.steps=4",
        "--config.checkpoint.every=2",
        "--config.eval.every=4",
        "--config.eval.max_new_tokens=4",
        "--config.log.tensorboard=false",
    )
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    ended = processes.run(*command, f"--workdir={whole}")
    assert ended.code == 0, ended.err

    def reached() -> bool:
        if name == "dpo":
            return (workdir / "checkpoints" / "2").is_dir()
        committed = (workdir / "checkpoints" / "2").is_dir()
        return committed and any(row["step"] == 4 for row in rows_so_far(workdir))

    ended = processes.run_until(reached, signal.SIGKILL, *command, f"--workdir={workdir}")
    assert ended.code == -signal.SIGKILL, ended
    assert not (workdir / "checkpoints" / "4").exists()
    ended = processes.run(*command, f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    assert "Resuming from step 2 " in ended.out
    assert rows(workdir, "metrics.jsonl") == rows(whole, "metrics.jsonl")
    models = [
        load_members(str(path)) if "reward" in name else [load_model(str(path))] for path in (workdir, whole)
    ]
    for got, want in zip(*models, strict=True):
        assert got.source.step == 4
        jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


ONLINE = {
    "ppo": ("--config.ppo.kl_coefficient=0.05", "--config.ppo.kl_target=6.0"),
    "ppo with pretraining text and a moving reference": (
        "--config.ppo.ptx_coefficient=27.8",
        "--config.ppo.ptx_data=configs/tiny/chats.jsonl",
        "--config.ppo.ptx_rows=8",
        "--config.optim.ema=0.9",
        "--config.rollout.reference=ema",
    ),
    "rloo": ("--config.algorithm=rloo", "--config.rollout.samples=2"),
}


@pytest.mark.parametrize("name", ONLINE)
def test_online_learning_writes_the_same_answers_again(processes, name: str, tmp_path: Path):
    """Killed while an iteration after the fourth is drawn, scored or learnt from: the same trajectories, and so the
    same metrics, samples, parameters and price of the KL."""
    command = (
        "launch.train",
        "--config=configs/ppo/letters.py:tiny",
        "--config.train.steps=16",
        "--config.checkpoint.every=2",
        "--config.log.tensorboard=false",
        *ONLINE[name],
    )
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    ended = processes.run(*command, f"--workdir={whole}")
    assert ended.code == 0, ended.err
    ended = processes.run_until(
        lambda: (workdir / "checkpoints" / "4").is_dir(),
        signal.SIGKILL,
        *command,
        f"--workdir={workdir}",
    )
    assert ended.code == -signal.SIGKILL, ended
    assert not (workdir / "checkpoints" / "16").exists()
    ended = processes.run(*command, f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    assert "Resuming from step" in ended.out
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert rows(workdir, file) == rows(whole, file), file
    got, want = (load_model(str(path)) for path in (workdir, whole))
    assert got.source.step == 16
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def rows_so_far(workdir: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl that is being written."""
    return [json.loads(line) for line in logged(workdir).split("\n")[:-1]]
