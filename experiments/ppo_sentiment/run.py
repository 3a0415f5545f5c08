"""PPO on SmolLM2-135M: openings of film reviews gone on with so that a classifier likes them; trains and records.

python -m experiments.ppo_sentiment.run --workdir=runs/ppo_sentiment [--variant=tiny] [--seed=0]

Run again, it goes on where it stopped. Writes result.json, samples.md and curves.png here (or into --out).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from experiments.training import read_lines, train, write_result
from posttrain_jax.run.samples_page import completion_of

HERE = Path(__file__).resolve().parent
CONFIG = "configs/ppo/smollm2_sentiment.py"
SHOWN = 6  # prompts in samples.md
WATCHED = (
    "score",
    "kl_per_sequence",
    "entropy_per_token",
    "clip_fraction",
    "explained_variance",
    "completion_tokens",
    "repeated_4gram_share",
)


def main() -> None:
    """Trains and records."""
    workdir, out = train(__doc__, CONFIG, out=HERE)
    write_result(out / "result.json", record(workdir))
    (out / "samples.md").write_text(samples(workdir), "utf-8")
    shutil.copyfile(workdir / "curves.png", out / "curves.png")


def record(workdir: Path) -> dict[str, Any]:
    """Held-out scores before and after, the interval of their difference, and what was watched on the way.

    The interval is normal, of two independent means; the prompts and the random numbers are the same both times, which
    makes it too wide if anything.
    """
    config = json.loads((workdir / "config.json").read_text("utf-8"))
    lines = read_lines(workdir / "metrics.jsonl")
    held_out = [line for line in lines if "eval/score" in line]
    trained = [line for line in lines if "train/score" in line]
    first, last = held_out[0], held_out[-1]
    error = (first["eval/score_standard_error"] ** 2 + last["eval/score_standard_error"] ** 2) ** 0.5
    rise = last["eval/score"] - first["eval/score"]
    kept = (
        "eval/score",
        "eval/score_standard_error",
        "eval/no_eos_share",
        "eval/repeated_4gram_share",
        "eval/completion_tokens",
    )
    return {
        "seed": config["seed"],
        "iterations": last["step"],
        "held_out": config["data"]["eval"],
        "before": {name.removeprefix("eval/"): round(first[name], 4) for name in kept},
        "after": {name.removeprefix("eval/"): round(last[name], 4) for name in kept},
        "rise": round(rise, 4),
        "rise_interval": [round(rise - 1.96 * error, 4), round(rise + 1.96 * error, 4)],
        "train": [
            {"step": line["step"]}
            | {name: round(line[f"train/{name}"], 4) for name in WATCHED if f"train/{name}" in line}
            for line in trained
        ],
        "minutes": round((lines[-1]["time"] - lines[0]["time"]) / 60, 1),
    }


def samples(workdir: Path) -> str:
    """Completions of the first held-out prompts, before and after."""
    rows = read_lines(workdir / "samples.jsonl")
    steps = sorted({row["step"] for row in rows})
    first, last = ([row for row in rows if row["step"] == step] for step in (steps[0], steps[-1]))
    lines = [
        f"| opening | before | score | after {steps[-1]} iterations | score |",
        "|---|---|---:|---|---:|",
    ]
    for before, after in list(zip(first, last, strict=True))[:SHOWN]:
        cells = [before["prompt"], completion_of(before), f"{before['score']:.2f}"]
        cells += [completion_of(after), f"{after['score']:.2f}"]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.strip().replace("\n", " / ").replace("|", "\\|")


if __name__ == "__main__":
    main()
