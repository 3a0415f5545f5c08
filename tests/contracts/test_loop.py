"""The loop: what it dispatches when, what it writes, when it stops, which checkpoints it keeps."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tasks import experiment_of

from contracts.loops import (
    CrashingCollector,
    lines,
    make_task,
    options,
    tiny_config,
)
from launch.train import run
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.workdir import completed_steps
from posttrain_jax.run import loop as train_loop
from posttrain_jax.run.checkpoint import Checkpoints
from posttrain_jax.run.loop import Summary, train
from posttrain_jax.wiring.task import run_steps


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_a_whole_run_leaves_what_the_contract_names(tmp_path: Path):
    config = tiny_config(
        train__steps=7, log__every=3, eval__every=4, checkpoint__every=5, log__tensorboard=True
    )
    config.log.profile = "2:3"
    run(config, tmp_path)
    rows = lines(tmp_path)
    train_steps = [row["step"] for row in rows if "train/loss" in row]
    eval_steps = [row["step"] for row in rows if "eval/loss" in row]
    assert train_steps == [3, 6, 7]
    assert eval_steps == [0, 4, 7]
    names = {
        "step",
        "time",
        "train/loss",
        "train/token_accuracy",
        "train/grad_norm",
        "train/lr",
        "train/skipped",
    }
    names |= {
        "train/tokens_per_second",
        "train/trained_tokens",
        "train/padding_share",
        "train/seconds_per_step",
    }
    assert names <= rows[1].keys()
    assert {"eval/loss", "eval/perplexity", "eval/loss_per_sequence", "eval/token_accuracy"} <= rows[0].keys()
    assert rows[0]["eval/perplexity"] == pytest.approx(math.exp(rows[0]["eval/loss"]))
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["final_step"]) == ("complete", 7)
    assert summary["metrics"]["eval/loss"] == rows[-1]["eval/loss"]
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == config.optim.lr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert completed_steps(tmp_path) == [5, 7]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    check_events(tmp_path, rows)


def check_events(workdir: Path, rows: list[dict]) -> None:
    """The event file, read by TensorBoard's own framing: length, CRC, record, CRC."""
    import struct

    from tensorboardX.proto.event_pb2 import Event

    (path,) = (workdir / "tensorboard").iterdir()
    data, at, values = path.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        values.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
        at += 16 + length
    for row in rows:
        for name in row.keys() - {"step", "time"}:
            assert values[row["step"], name] == pytest.approx(row[name], rel=1e-6), (row["step"], name)


def test_log_windows_average_over_tokens_not_steps(tmp_path: Path):
    """The loss of a window of 3 steps is the sum of its tokens' losses over their count."""
    each, window = tiny_config(train__steps=3), tiny_config(train__steps=3, log__every=3)
    for name, config in (("each", each), ("window", window)):
        train(make_task(config, tmp_path / name), options(config), tmp_path / name)
    steps = [row for row in lines(tmp_path / "each") if "train/loss" in row]
    (whole,) = [row for row in lines(tmp_path / "window") if "train/loss" in row]
    tokens = np.array([row["train/trained_tokens"] for row in steps])
    losses = np.array([row["train/loss"] for row in steps])
    assert len(set(tokens)) == 3
    assert whole["train/loss"] == pytest.approx(float((losses * tokens).sum() / tokens.sum()), rel=1e-6)
    assert whole["train/lr"] == steps[-1]["train/lr"]


def test_step_t_plus_1_is_dispatched_before_the_metrics_of_t_are_read(tmp_path: Path, monkeypatch):
    """Recorded at the two real boundaries: the jitted step, and the one function that fetches metrics."""
    config = tiny_config(train__steps=5, eval__every=0, checkpoint__every=0)
    task = make_task(config, tmp_path)
    order: list[str] = []
    fetch = train_loop.to_host

    def recording_step(state, batch):
        order.append(f"dispatch {sum(entry.startswith('dispatch') for entry in order) + 1}")
        return task.train_step(state, batch)

    def recording_fetch(metrics):
        order.append(f"read {sum(entry.startswith('read') for entry in order) + 1}")
        return fetch(metrics)

    monkeypatch.setattr(train_loop, "to_host", recording_fetch)
    train(dataclasses.replace(task, train_step=recording_step), options(config), tmp_path)
    for step in range(1, 5):
        assert order.index(f"dispatch {step + 1}") < order.index(f"read {step}"), order
    assert order.count("read 5") == 1


def test_the_step_of_a_resumed_run_compiles_once(tmp_path: Path):
    """A restored state has the shardings, types and weak types of a new one."""
    config = tiny_config(train__steps=4, checkpoint__every=2, eval__every=0)
    task = make_task(config, tmp_path)
    with pytest.raises(RuntimeError, match="crash"):
        train(
            dataclasses.replace(task, collector=CrashingCollector(task.collector, after=3)),
            options(config),
            tmp_path,
        )
    assert completed_steps(tmp_path) == [2]
    task = make_task(config, tmp_path)
    signatures = []

    def recording_step(state, batch):
        signatures.append(jax.tree.map(lambda leaf: (jax.typeof(leaf), str(leaf.sharding)), state))
        return task.train_step(state, batch)

    train(dataclasses.replace(task, train_step=recording_step), options(config), tmp_path)
    assert len(signatures) == 2
    assert jax.tree.leaves(signatures[0]) == jax.tree.leaves(signatures[1])


def test_a_step_that_moves_something_to_the_devices_by_the_way_is_refused(tmp_path: Path):
    """A Python number added to an array on the devices is a transfer that nobody asked for."""
    config = tiny_config(train__steps=1, eval__every=0)
    config.data.eval = ""
    task = make_task(config, tmp_path)

    def step(state, batch):
        return task.train_step(dataclasses.replace(state, step=state.step + 0), batch)

    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(dataclasses.replace(task, train_step=step), options(config), tmp_path)


def test_non_finite_steps_stop_the_run_and_name_the_rows(tmp_path: Path, capsys):
    config = tiny_config(train__steps=20, train__max_skipped=3, eval__every=0, checkpoint__every=2)
    task = make_task(config, tmp_path)

    def poisoned_step(state, batch):
        """From step 4 on a weight is NaN, as a corrupted chip would have it."""
        if int(state.step) == 3:
            scale = state.params["final_norm"]["scale"]
            state.params["final_norm"]["scale"] = jax.device_put(
                np.full(scale.shape, np.nan, scale.dtype), scale.sharding
            )
        return task.train_step(state, batch)

    with pytest.raises(InputError) as caught:
        train(dataclasses.replace(task, train_step=poisoned_step), options(config), tmp_path)
    message = str(caught.value)
    assert "At step 6" in message
    assert "train/loss is nan" in message
    assert "3 updates in a row" in message
    assert "chats.jsonl:" in message
    assert "\n" not in message
    assert [row["step"] for row in lines(tmp_path) if "train/loss" in row] == [1, 2, 3]
    assert [row["train/skipped"] for row in lines(tmp_path) if row["step"] in (4, 5)] == [1.0, 2.0]
    assert not (tmp_path / "summary.json").exists()
    assert completed_steps(tmp_path) == [2, 4]
    said = capsys.readouterr().out
    assert "step 4: train/loss is nan; this update was skipped (1 in a row)" in said
    skipped = lines(tmp_path, "skipped.jsonl")
    assert [row["step"] for row in skipped] == [4, 5, 6]
    assert all(row["what"] == "train/loss is nan" for row in skipped)
    assert "; ".join(skipped[-1]["rows"][:8]) in message
    shutil.rmtree(tmp_path / "checkpoints/4")
    train(make_task(config, tmp_path), options(config), tmp_path)
    assert lines(tmp_path, "skipped.jsonl") == []


def test_the_last_and_the_best_checkpoints_stay(tmp_path: Path):
    """eval/loss by step 1..6 is made 5 3 4 6 7 8: of keep=2 there remain 5 and 6, and the best, 2."""
    config = tiny_config(train__steps=6, checkpoint__every=1, eval__every=1)
    config.checkpoint.best_metric = "eval/loss"
    values = iter([9.0, 5.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    task = dataclasses.replace(
        make_task(config, tmp_path), evaluate=lambda state: {"eval/loss": next(values)}
    )
    summary = train(task, options(config), tmp_path)
    assert completed_steps(tmp_path) == [2, 5, 6]
    assert summary == Summary("complete", 6, summary.metrics)


def test_a_resumed_run_remembers_which_checkpoint_was_best(tmp_path: Path):
    """Step 2 is the best before the crash; what comes after is worse, and keep=1 must not push it out."""
    config = tiny_config(train__steps=6, checkpoint__every=1, eval__every=1)
    config.checkpoint.best_metric = "eval/loss"
    config.checkpoint.keep = 1
    values = iter([9.0, 5.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    task = make_task(config, tmp_path)
    crashing = dataclasses.replace(
        task,
        collector=CrashingCollector(task.collector, after=3),
        evaluate=lambda state: {"eval/loss": next(values)},
    )
    with pytest.raises(RuntimeError, match="crash"):
        train(crashing, options(config), tmp_path)
    task = dataclasses.replace(
        make_task(config, tmp_path), evaluate=lambda state: {"eval/loss": next(values)}
    )
    train(task, options(config), tmp_path)
    assert completed_steps(tmp_path) == [2, 6]
    (tmp_path / "checkpoints/6/metrics/metrics").write_text('{"eval')
    assert Checkpoints(tmp_path, best_metric="eval/loss").restore(task.abstract_state).step == 2


def test_every_checkpoint_is_evaluated_where_the_best_is_kept(tmp_path: Path):
    """Evaluations every 5 steps and checkpoints every 2 fall together nowhere before the end: 2 is the best, a NaN is
    none, and of keep=1 the last stays. The evaluations look at the moving average, where it is asked for."""
    config = tiny_config(
        train__steps=6, checkpoint__every=2, eval__every=5, optim__ema=0.9, eval__weights="ema"
    )
    config.checkpoint.best_metric = "eval/loss"
    config.checkpoint.keep = 1
    values = {0: 0.5, 2: 3.0, 4: math.nan, 5: 0.5, 6: 6.0}
    averages = []

    def evaluate(state):
        averages.append(state.params is state.ema)
        return {"eval/loss": values[int(state.step)]}

    task = make_task(config, tmp_path)
    train(dataclasses.replace(task, evaluate=evaluate), options(config), tmp_path)
    assert [row["step"] for row in lines(tmp_path) if "eval/loss" in row] == [0, 2, 4, 5, 6]
    assert completed_steps(tmp_path) == [2, 6]
    assert averages == [True] * 5


class Meddling(CrashingCollector):
    """Batches before one of which something happens to the workdir."""

    def __init__(self, inner, after: int, meddle):
        super().__init__(inner, after)
        self.meddle = meddle

    def next(self, state):
        if not self.left:
            self.meddle()
        self.left -= 1
        return self.inner.next(state)


def test_a_save_that_a_file_system_refuses_is_one_line_and_spares_the_checkpoints_before(tmp_path: Path):
    """After step 3 a file stands where `checkpoints` was: the save of step 4 cannot be made."""
    config = tiny_config(train__steps=6, checkpoint__every=2, eval__every=0)

    def meddle() -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "checkpoints/2").is_dir():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (tmp_path / "checkpoints").rename(tmp_path / "before")
        (tmp_path / "checkpoints").write_text("not a folder")

    task = make_task(config, tmp_path)
    task = dataclasses.replace(task, collector=Meddling(task.collector, 3, meddle))
    with pytest.raises(InputError, match=r"met a file error \((File exists|Not a directory)") as caught:
        train(task, options(config), tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path / "checkpoints") in str(caught.value)
    with pytest.raises(InputError, match="there is no checkpoint yet. Put that right"):
        run(config, tmp_path)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "before").rename(tmp_path / "checkpoints")
    run(config, tmp_path)
    assert completed_steps(tmp_path) == [4, 6]


def test_a_best_metric_that_is_never_measured_is_refused(tmp_path: Path):
    config = tiny_config()
    config.checkpoint.best_metric = "eval/los"
    with pytest.raises(
        InputError, match=r"checkpoint.best_metric is 'eval/los', but the evaluation gives one of eval/"
    ):
        run(config, tmp_path)


def test_a_profile_window_that_outlasts_the_run_is_still_written(tmp_path: Path):
    config = tiny_config(train__steps=3, eval__every=0, checkpoint__every=0)
    config.log.profile = "3:9"
    run(config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_epochs_are_counted_exactly():
    """1.1 epochs of 100 rows, one a step: 110 (1.1 * 100 is 110.00000000000001 in floating point)."""
    config = tiny_config(train__steps=0, train__rows_per_step=1)
    for epochs, steps in ((1.1, 110), (0.07, 7), (2.0, 200), (0.005, 1), (0.011, 2), (1e-9, 1)):
        config.train.epochs = epochs
        assert run_steps(experiment_of(config).train, [range(60), range(40)]) == steps, epochs
    config.train.epochs = math.inf
    with pytest.raises(InputError, match="train.epochs is inf"):
        experiment_of(config)
