"""`launch.plot`: one run, two runs, chosen metrics, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from entry_points import run

from posttrain_jax.algorithms import dpo
from posttrain_jax.run.curves import write_panels


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        rows = [{"step": step, "time": 0.0, "train/loss": 1.0 / step} for step in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_panels(folder, dpo.PANELS)
    return folders


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_one_run_is_drawn_into_its_workdir_and_two_where_out_says(runs, tmp_path: Path):
    first, second = map(str, runs)
    ended = run("launch.plot", first)
    assert (ended.code, ended.out) == (0, f"{first}/curves.png\n"), ended.err
    ended = run("launch.plot", first, second, f"--out={tmp_path}/both.png", "--metric=train/loss")
    assert (ended.code, ended.out) == (0, f"{tmp_path}/both.png\n"), ended.err
    assert is_picture(runs[0] / "curves.png") and is_picture(tmp_path / "both.png")


def test_what_cannot_be_drawn_is_refused(runs, tmp_path: Path):
    first = str(runs[0])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/metrics.jsonl").write_text("{\n{}\n")
    for argv, words in (
        ([], "The workdirs of the runs to draw are needed; an example: python -m launch.plot"),
        ([str(tmp_path)], "is not the workdir of a run that has logged something"),
        ([str(tmp_path / "broken")], "holds a line that is not JSON"),
        (
            [first, "--metric=train/los"],
            "--metric=train/los: no run has logged it; the nearest is train/loss.",
        ),
        ([first, "--out=curves.txt"], "--out=curves.txt cannot be drawn: Format 'txt' is not supported"),
        ([first, f"--out={tmp_path}/none/curves.png"], "No such file or directory"),
    ):
        ended = run("launch.plot", *argv)
        (line,) = ended.err.splitlines()
        assert ended.code == 2 and line.startswith("error: ") and words in line, line
