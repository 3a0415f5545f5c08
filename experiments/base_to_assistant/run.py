"""From base model to assistant: trains, and writes the recorded answers and numbers of this folder.

python -m experiments.base_to_assistant.run --workdir=runs/base_to_assistant [--variant=tiny]
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments.training import read_lines, train
from posttrain_jax.run.samples_page import completion_of

HERE = Path(__file__).resolve().parent
CONFIG = "configs/sft/gemma3_270m_assistant.py"


def main() -> None:
    """Trains and records."""
    record(*train(__doc__, CONFIG, out=HERE))


def record(workdir: Path, out: Path) -> None:
    """Writes `answers.json` and `answers.md`: held-out loss, and every prompt before and after."""
    metrics = read_lines(workdir / "metrics.jsonl")
    held_out = [row for row in metrics if "eval/loss" in row]
    samples = read_lines(workdir / "samples.jsonl")
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
            {"prompt": prompt, "before": completion_of(before[prompt]), "after": completion_of(after[prompt])}
            for prompt in after
        ],
    }
    (out / "answers.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (out / "answers.md").write_text(_table(result["answers"]), "utf-8")


def _table(answers: list[dict[str, str]]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    rows = [f"| {cell(a['prompt'])} | {cell(a['before'])} | {cell(a['after'])} |" for a in answers]
    return "\n".join(["| prompt | before | after |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    main()
