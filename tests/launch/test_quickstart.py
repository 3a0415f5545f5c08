"""The quickstart with the tiny variant: two stages, the second on the first; what was finished is made again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def quickstart(folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.quickstart", "--variant=tiny", f"--dir={folder}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert "Training SmolLM2" not in quickstart(tmp_path / "q")
    assert (tmp_path / "q/hf/config.json").is_file()
    assert "Training SmolLM2" in quickstart(tmp_path / "q")
