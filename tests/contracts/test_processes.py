"""Two processes (jax.distributed, gloo on the CPU) do what one does, and they read each other's checkpoints."""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from entry_points import EntryPoint, run_together
from tasks import spec_of

from configs.sft.smollm2_135m import get_config
from posttrain_jax.core.checkpoint_params import restore_params
from posttrain_jax.core.workdir import completed_steps

pytestmark = [pytest.mark.slow, pytest.mark.alone]

COMMAND = (
    "launch.train",
    "--config=configs/sft/smollm2_135m.py:tiny",
    "--config.train.steps=6",
    "--config.checkpoint.every=3",
    "--config.eval.every=3",
    "--config.eval.max_new_tokens=4",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
)


def pair(*arguments: str) -> list[tuple[str, ...]]:
    """The two processes' commands, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        (*arguments, f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={index}")
        for index in range(2)
    ]


def losses(workdir: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        (row["step"], row.get("train/loss"), row.get("eval/loss"), row.get("train/tokens")) for row in rows
    ]


def params(workdir: Path):
    shapes = spec_of(get_config("tiny")).model.abstract_params()
    tree, step = restore_params(workdir, shapes)
    assert step == 6
    return jax.device_get(tree)


def assert_close(workdir: Path, other: Path) -> None:
    """Six AdamW steps in another order of summation: losses to 1e-5, parameters to a fiftieth of one step's lr."""
    for mine, yours in zip(losses(workdir), losses(other), strict=True):
        assert mine[0] == yours[0]
        for a, b in zip(mine[1:], yours[1:], strict=True):
            assert (a is None) == (b is None)
            assert a is None or a == pytest.approx(b, rel=1e-5), (mine, yours)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params(workdir), params(other))


@pytest.fixture(scope="module")
def single(processes, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("single") / "run"
    ended = processes.run(*COMMAND, f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    return workdir


@pytest.fixture(scope="module")
def double(processes, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("double") / "run"
    first, second = run_together(pair(*COMMAND, f"--workdir={workdir}"), env=processes.environment())
    assert first.code == 0, first.err
    assert second.code == 0, second.err
    said = [line for line in second.out.splitlines() if not line.startswith("[Gloo]")]
    assert not said, "only process 0 speaks"
    return workdir


def test_two_processes_follow_one(single: Path, double: Path):
    assert_close(double, single)
    assert len(list((double / "tensorboard").iterdir())) == 1
    assert json.loads((double / "summary.json").read_text())["status"] == "complete"


def test_one_process_reads_what_two_wrote(single: Path, double: Path, processes, tmp_path: Path):
    workdir = cut_back(double, tmp_path)
    ended = processes.run(*COMMAND, f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    assert "Resuming from step 3" in ended.out
    assert_close(workdir, single)


def test_two_processes_read_what_one_wrote(single: Path, processes, tmp_path: Path):
    workdir = cut_back(single, tmp_path)
    first, second = run_together(pair(*COMMAND, f"--workdir={workdir}"), env=processes.environment())
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "Resuming from step 3" in first.out
    assert_close(workdir, single)


def test_ppo_in_two_processes_follows_one(processes, tmp_path: Path):
    """Both write all answers and learn from their share of them; what is logged is of all."""
    command = (
        "launch.train",
        "--config=configs/ppo/letters.py:tiny",
        "--config.train.steps=2",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=-1",
    )
    assert processes.run(*command, f"--workdir={tmp_path / 'one'}").code == 0
    first, second = run_together(pair(*command, f"--workdir={tmp_path / 'two'}"), env=processes.environment())
    assert (first.code, second.code) == (0, 0), first.err + second.err
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for mine, yours in zip(*rows, strict=True):
        assert mine.keys() == yours.keys()
        for name in ("train/score", "train/loss", "train/kl_per_sequence", "train/grad_norm", "eval/score"):
            if name in mine:
                assert mine[name] == pytest.approx(yours[name], rel=2e-3, abs=1e-5), name


def test_rollouts_of_processes_whose_devices_take_turns(processes):
    """Rows stand in their order over the mesh, and both have the scores that the first process's reward drew."""
    commands = [command[:-3] for command in pair("tests.contracts.rollouts_apart")]
    address = pair("")[0][1].removeprefix("--coordinator=")
    ended = run_together(
        [(*command, address, str(index)) for index, command in enumerate(commands)],
        env=processes.environment(devices=2),
    )
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    first, second = (json.loads(one.out.splitlines()[-1]) for one in ended)
    assert first == second
    assert first["tokens"] == first["scores"] == list(range(8))
    assert first["failures"] == 1 and len(set(first["drawn"])) == 8


def cut_back(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run as if it had been killed after step 3."""
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    assert completed_steps(tmp_path / "run") == [3]
    return tmp_path / "run"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two processes of one long run, after its third step."""

    workdir: Path
    running: list[EntryPoint]


@pytest.fixture
def started(processes, tmp_path: Path) -> Iterator[Pair]:
    workdir = tmp_path / "run"
    commands = pair(*COMMAND, f"--workdir={workdir}", "--config.train.steps=4000", "--config.eval.every=0")
    running = [processes.start(*command) for command in commands]
    try:
        metrics = workdir / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and '"step": 3' in metrics.read_text()):
            assert time.monotonic() < deadline
            assert all(process.code() is None for process in running), [p.wait(5) for p in running]
            time.sleep(0.05)
        yield Pair(workdir, running)
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_stops_both_at_the_same_step(started: Pair, signum: signal.Signals):
    started.running[1].send_signal(signum)
    ended = [process.wait(120) for process in started.running]
    assert [one.code for one in ended] == [0, 0], ended
    summary = json.loads((started.workdir / "summary.json").read_text())
    assert summary["status"] == "preempted"
    assert completed_steps(started.workdir)[-1] == summary["final_step"] < 4000


@pytest.mark.parametrize("killed", [0, 1])
def test_the_end_of_one_ends_the_other_with_one_sentence(started: Pair, killed: int):
    started.running[killed].send_signal(signal.SIGKILL)
    # A few seconds where a collective breaks; where it only waits, the missing heartbeats tell after 100 s.
    ended = started.running[1 - killed].wait()
    waits, line = ended.err.splitlines()
    assert waits.startswith(f"Process {1 - killed} of 2 waits for the others, for up to ")
    assert line.startswith("error: Another process of this run has ended or cannot be reached")
    assert ended.code not in (0, 2)
