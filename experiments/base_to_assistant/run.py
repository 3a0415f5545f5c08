"""From base model to assistant: trains, and writes the recorded answers and numbers of this folder.

python -m experiments.base_to_assistant.run --workdir=runs/base_to_assistant [--variant=tiny]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = "configs/sft/gemma3_270m_assistant.py"


def main() -> None:
    """Runs the training entry point (which resumes) and records what it wrote."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--variant", default="")
    parser.add_argument("--out", type=Path, default=HERE, help="where answers.json and answers.md go")
    arguments = parser.parse_args()
    config = f"{CONFIG}:{arguments.variant}" if arguments.variant else CONFIG
    command = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={arguments.workdir}"]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    record(arguments.workdir, arguments.out)


def record(workdir: Path, out: Path) -> None:
    """Writes `answers.json` and `answers.md`: held-out loss, and every prompt before and after."""
    metrics = _lines(workdir / "metrics.jsonl")
    held_out = [row for row in metrics if "eval/loss" in row]
    samples = _lines(workdir / "samples.jsonl")
    first, last = held_out[0]["step"], held_out[-1]["step"]
    before = {row["prompt"]: row for row in samples if row["step"] == first}
    after = {row["prompt"]: row for row in samples if row["step"] == last}
    result = {
        "steps": last,
        "held_out_loss": {str(row["step"]): round(row["eval/loss"], 4) for row in held_out},
        "stopped_by_itself": {
            "before": sum(row["finish_reason"] == "stop" for row in before.values()),
            "after": sum(row["finish_reason"] == "stop" for row in after.values()),
            "of": len(after),
        },
        "answers": [
            {"prompt": prompt, "before": before[prompt]["answer"], "after": after[prompt]["answer"]}
            for prompt in after
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "answers.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (out / "answers.md").write_text(_table(result["answers"]), "utf-8")


def _table(answers: list[dict[str, str]]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    rows = [f"| {cell(a['prompt'])} | {cell(a['before'])} | {cell(a['after'])} |" for a in answers]
    return "\n".join(["| prompt | before | after |", "|---|---|---|", *rows]) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


if __name__ == "__main__":
    main()
