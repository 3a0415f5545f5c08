"""Writes `golden_steps.json` anew, of the algorithms that are named, or of all: the numbers of the code as it is.

python -m tests.contracts.write_golden_steps [ALGORITHM ...]
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import conftest  # noqa: F401  (8 devices, as the test has them)

from contracts.algorithm_steps import CONFIGS, golden_values, two_steps


def main() -> None:
    path = FOLDER / "golden_steps.json"
    golden = json.loads(path.read_text()) if path.is_file() else {}
    for algorithm in sys.argv[1:] or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["POSTTRAIN_CACHE"] = f"{folder}/cache"
            steps = two_steps(algorithm, pathlib.Path(folder) / "run")
        golden[algorithm] = {name: float(f"{value:.8g}") for name, value in golden_values(steps).items()}
    path.write_text(json.dumps({name: golden[name] for name in CONFIGS if name in golden}, indent=2) + "\n")


if __name__ == "__main__":
    main()
