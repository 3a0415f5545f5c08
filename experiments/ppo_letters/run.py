"""PPO and RLOO from scratch on a task whose optimum is known: five seeds each, and what the KL coefficient does.

python -m experiments.ppo_letters.run --workdir=runs/ppo_letters [--seeds=5] [--steps=60]

Run again, it goes on where it stopped. Writes results.json and results.md here (or into --out).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = "configs/ppo/letters.py"
OPTIMUM = 1.0  # every letter an "e"
COEFFICIENTS = "0.0,0.01,0.03,0.1"


def main() -> None:
    """Runs what is not there yet and records it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--coefficients", "--prices", default=COEFFICIENTS, help="of the KL")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    steps = f"--config.train.steps={arguments.steps}"
    learnt = {
        name: [
            _train(arguments.workdir / f"{name}-{seed}", f"{CONFIG}{variant}", steps, f"--config.seed={seed}")
            for seed in range(arguments.seeds)
        ]
        for name, variant in (("ppo", ""), ("rloo", ":rloo"))
    }
    by_coefficient = {
        coefficient: _train(
            arguments.workdir / f"kl-{coefficient}",
            CONFIG,
            steps,
            f"--config.ppo.kl_coefficient={coefficient}",
        )
        for coefficient in arguments.coefficients.split(",")
    }
    results = {"optimum": OPTIMUM, "learnt": learnt, "by_kl_coefficient": by_coefficient}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (arguments.out / "results.md").write_text(table(results), "utf-8")
    print(table(results))


def _train(workdir: Path, config: str, *flags: str) -> dict[str, Any]:
    """One run as a process; how its score rose."""
    seconds = workdir / "seconds"
    if not seconds.is_file():
        command = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={workdir}", *flags]
        command.append(
            "--config.rollout.reference=frozen"
        )  # the KL to it is measured where it costs nothing, too
        started = time.time()
        done = subprocess.run(command, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        seconds.write_text(f"{time.time() - started:.1f}\n", "utf-8")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text("utf-8").splitlines()]
    windows = [line for line in lines if "train/score" in line]
    evaluations = [line for line in lines if "eval/score" in line]
    reached = [line["step"] for line in windows if line["train/score"] >= 0.95 * OPTIMUM]
    return {
        "score_before": round(evaluations[0]["eval/score"], 4),
        "score_after": round(evaluations[-1]["eval/score"], 4),
        "last_train_score": round(windows[-1]["train/score"], 4),
        "last_train_kl": round(windows[-1]["train/kl_per_sequence"], 3),
        "iterations_to_95": reached[0] if reached else None,
        "seconds": float(seconds.read_text("utf-8")),
    }


def table(results: dict[str, Any]) -> str:
    """The Markdown text."""
    lines = [
        "| algorithm | seed | held-out score before | after | iterations to 95 % of the optimum | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, runs in results["learnt"].items():
        for seed, run in enumerate(runs):
            lines.append(
                f"| {name.upper()} | {seed} | {run['score_before']:.3f} | {run['score_after']:.3f} "
                f"| {run['iterations_to_95'] or 'not reached'} | {run['seconds']:.0f} |"
            )
    lines += ["", "| KL coefficient (PPO, seed 0) | score at the end | KL at the end, nats per completion |"]
    lines.append("|---:|---:|---:|")
    for coefficient, run in results["by_kl_coefficient"].items():
        lines.append(f"| {coefficient} | {run['last_train_score']:.3f} | {run['last_train_kl']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
