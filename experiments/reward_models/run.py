"""A reward model and an ensemble of four on the same 69 pairs: trains both, reports on both, and records the numbers.

python -m experiments.reward_models.run --workdir=runs/reward_models [--tiny]

Run again, it goes on where it stopped. More data to report on: --out_of_distribution=NAME=DATA,..., such as
summaries=asset:factual_summary_pairs,hhh=asset:hhh_alignment (a download of 358 MB, of which 225 kB are kept).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = "configs/reward_model/smollm2_135m.py"
SHORT = (
    "--config.data.max_length=512",
    "--config.data.eval=split:30",
)  # an hour on 2 CPU cores instead of four
RUNS = {"single": (f"--config={CONFIG}", *SHORT), "ensemble": (f"--config={CONFIG}:ensemble", *SHORT)}
TINY_RUNS = {
    "single": (f"--config={CONFIG}:tiny",),
    "ensemble": (f"--config={CONFIG}:tiny", "--config.reward.members=2", "--config.model.lora.rank=2"),
}
OTHER_DATA = "summaries=asset:factual_summary_pairs"
TINY_OTHER_DATA = "pairs=configs/tiny/pairs.jsonl"


def main() -> None:
    """Runs the two entry points for both models and records what they wrote."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="random models of two layers, no download")
    parser.add_argument("--out_of_distribution", default="", help="as of launch.reward_report")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json and results.md go")
    arguments = parser.parse_args()
    others = arguments.out_of_distribution or (TINY_OTHER_DATA if arguments.tiny else OTHER_DATA)
    for name, config in (TINY_RUNS if arguments.tiny else RUNS).items():
        workdir = arguments.workdir / name
        _run("launch.train", *config, f"--workdir={workdir}")
        _run(
            "launch.reward_report",
            f"--model={workdir}",
            f"--out_of_distribution={others}",
            f"--out={workdir}-report",
        )
    record(arguments.workdir, arguments.out)


def _run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def record(workdir: Path, out: Path) -> None:
    """Writes `results.json` and `results.md`: what both reports say of every split."""
    results = {
        name: {
            split: _summary(part)
            for split, part in json.loads((workdir / f"{name}-report" / "report.json").read_text("utf-8"))[
                "splits"
            ].items()
        }
        for name in RUNS
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (out / "results.md").write_text(_table(results), "utf-8")


def _summary(part: dict[str, Any]) -> dict[str, Any]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    found = {
        "pairs": part["pairs"],
        "accuracy": {end: rounded(value) for end, value in part["accuracy"].items()},
        "loss": rounded(part["loss"]),
        "calibration_error": rounded(part["calibration"]["expected_calibration_error"]),
        "score_and_length": rounded(part["length"]["spearman"]),
        "longer_scores_higher": rounded(part["length"]["longer_scores_higher"]),
        "chosen_is_longer": rounded(part["length"]["chosen_is_longer"]),
    }
    if "disagreement" in part:
        disagreement = part["disagreement"]
        found["member_accuracy"] = [rounded(value) for value in disagreement["member_accuracy"]]
        found["accuracy_by_disagreement"] = [
            rounded(tercile["accuracy"]["value"]) for tercile in disagreement["by_tercile"]
        ]
    return found


def _table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    header = (
        "| model | split | pairs | accuracy (95 %) | loss | calibration error | score and length (Spearman) |"
    )
    rows = [
        f"| {name} | {split} | {found['pairs']} | {_share(found['accuracy'])} | {found['loss']} | "
        f"{found['calibration_error']} | {found['score_and_length']} |"
        for name, splits in results.items()
        for split, found in splits.items()
    ]
    return "\n".join([header, "|---|---|---:|---:|---:|---:|---:|", *rows]) + "\n"


def _share(accuracy: dict[str, float]) -> str:
    return f"{accuracy['value']:.1%} ({accuracy['low']:.1%} to {accuracy['high']:.1%})"


if __name__ == "__main__":
    main()
