"""The quickstart with the tiny variant: two stages, the second on the first; what was finished is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from entry_points import run

from launch.config import load_file
from launch.quickstart import CONFIG, IDENTITY


def quickstart(folder: Path) -> str:
    ended = run("launch.quickstart", "--variant=tiny", f"--dir={folder}")
    assert ended.code == 0, ended.err
    return ended.out


def test_the_mixture_holds_the_identity_rows():
    """In whose place the quickstart puts those with --name."""
    assert IDENTITY in dict(load_file(f"{CONFIG}:quickstart").data.train)


@pytest.mark.slow
@pytest.mark.alone
def test_both_stages_and_a_second_start(tmp_path: Path):
    first = quickstart(tmp_path / "q")
    assert "held-out loss (nats per token)" in first and "held-out pairs ranked right" in first
    config = json.loads((tmp_path / "q-dpo/config.json").read_text())
    assert config["model"]["init"] == str(tmp_path / "q")
    assert (tmp_path / "q/hf/config.json").is_file()
    (tmp_path / "q-dpo/summary.json").unlink()  # as if it had been killed in its second stage
    shutil.rmtree(tmp_path / "q/hf")  # and even before the export of its first
    assert "Stage 1 of 2" not in quickstart(tmp_path / "q")
    assert (tmp_path / "q/hf/config.json").is_file()
    assert "Stage 1 of 2" in quickstart(tmp_path / "q")
