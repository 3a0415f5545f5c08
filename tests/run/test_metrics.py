"""Metrics on their way out: windows that come back from JSON, files that are cut back, names at W&B."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from posttrain_jax.core.types import Metric
from posttrain_jax.run.metrics import Accumulator, as_json, truncate_after, wandb_id


def test_numbers_without_a_value_are_valid_json():
    assert json.dumps(as_json({"a": math.nan, "b": math.inf, "c": 1.0}), allow_nan=False)
    assert as_json({"a": math.nan, "b": -math.inf}) == {"a": "nan", "b": "-inf"}


def test_truncate_drops_later_steps_and_a_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "a": 1}\n{"step": 2, "text": "\u2028"}\n{"step": 3, "a": 1}\n{"step": 2, "a"'
    )
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 0, "a": 1}\n{"step": 2, "text": "\u2028"}\n'
    truncate_after(path, -1)
    assert path.read_text() == ""
    truncate_after(tmp_path / "absent.jsonl", 2)


def test_truncate_counts_the_lines_that_no_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "metrics.jsonl"
    odd = [
        "5",
        "[1]",
        "null",
        '"step"',
        "{}",
        '{"step": "1"}',
        '{"step": null}',
        '{"step": true}',
        '{"step": -1}',
        "[" * 100_000,
    ]
    path.write_bytes(b"\xff\n" + "\n".join(['{"step": 1}', *odd, '{"step": 2}', ""]).encode())
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert f"{path}: 11 lines that are no objects with a step were dropped." in capsys.readouterr().out


def test_the_name_at_wandb_is_of_the_run_and_not_of_the_folder(tmp_path: Path):
    first = wandb_id(tmp_path / "run/wandb_id", new=True)
    assert wandb_id(tmp_path / "run/wandb_id", new=False) == first
    shutil.rmtree(tmp_path / "run")
    assert wandb_id(tmp_path / "run/wandb_id", new=True) != first


def test_accumulator_comes_back_from_json():
    sums = Accumulator()
    sums.add({"loss": Metric(np.float32(0.1), np.float32(3)), "none": Metric(np.float32(0), np.float32(0))})
    again = Accumulator(json.loads(json.dumps(sums.state())))
    for accumulator in (sums, again):
        accumulator.add({"loss": Metric(np.float32(7.0), np.float32(1))})
    assert sums.flush() == again.flush() == {"loss": (float(np.float32(0.1)) + 7.0) / 4}
    assert sums.flush() == {}
