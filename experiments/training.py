"""What the experiments' commands share: their flags, and the run of `launch.train` whose numbers they record."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def train(
    description: str | None, config: str, *, out: Path, overrides: Sequence[str] = ()
) -> tuple[Path, Path]:
    """Reads the flags, runs the training entry point (which resumes), and ends with its exit code where it fails.

    Args:
      description: of the command, for --help.
      config: the config file; --variant names one of its variants.
      out: where the recorded files go, unless --out says so.
      overrides: flags of `launch.train`, but for variants.

    Returns:
      The run's workdir, and the folder for what is recorded (it exists).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--variant", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=out, help="where the recorded files go")
    flags = parser.parse_args()
    chosen = [f"--config={config}:{flags.variant}"] if flags.variant else [f"--config={config}", *overrides]
    command = [sys.executable, "-m", "launch.train", *chosen]
    command += [f"--workdir={flags.workdir}", f"--config.seed={flags.seed}"]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    flags.out.mkdir(parents=True, exist_ok=True)
    return flags.workdir, flags.out


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, whose strings may hold other line ends than its own."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes the recorded numbers, and prints them."""
    text = json.dumps(result, indent=1)
    path.write_text(text + "\n", "utf-8")
    print(text)
