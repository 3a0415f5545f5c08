"""How the parts of a PPO iteration grow with the number of answers, their length and the model's depth.

python -m experiments.bench.rollouts_growth

From a base (8 answers of at most 48 tokens, SmolLM2-135M's 30 layers) one thing at a time is changed. Every point is a
fresh process of `rollouts_jax` (policy, value network, reference and reward model of the same size, 4 epochs of one
minibatch), the rounds alternate. Writes results/rollouts_growth.json after every round, and results/rollouts_growth.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from typing import Any

from experiments.bench.preferences import call
from experiments.bench.rollouts import WARMUP, prepare
from experiments.bench.rollouts_contract import Run
from experiments.bench.sft import HERE, circumstances, positive

PARTS = ("generate", "score", "reference", "train")


@dataclasses.dataclass(frozen=True)
class Point:
    """One line of the table. `together` answers go through a forward and backward pass of the update."""

    answers: int = 8
    new_tokens: int = 48
    layers: int = 30
    together: int = 8


POINTS = (
    Point(),
    Point(answers=16),
    Point(answers=32),
    Point(new_tokens=24),
    Point(new_tokens=96),
    Point(layers=15),
    Point(layers=60),
)


def measure(point: Point, *, iterations: int, threads: int) -> Run:
    """A process of `rollouts_jax`."""
    rows = HERE / "rows" / ("rollouts" if point.layers == 30 else f"rollouts_{point.layers}")
    rows.mkdir(parents=True, exist_ok=True)
    prepare(rows, 0 if point.layers == 30 else point.layers)
    command = [sys.executable, "-m", "experiments.bench.rollouts_jax", f"--rows={rows}", "--setting=ppo"]
    command += [f"--iterations={iterations}", f"--prompts={point.answers}", "--samples=1"]
    command += [f"--together={point.together}", f"--new_tokens={point.new_tokens}", f"--threads={threads}"]
    return Run.parse(call(command, threads))


def seconds_of(run: Run, part: str) -> float:
    """Of an iteration, the mean of those after the first."""
    return statistics.mean(run.parts[part][WARMUP:])


def report(runs: dict[Point, list[Run]], about: dict[str, Any]) -> str:
    """The Markdown text."""
    lines = [
        "PPO on SmolLM2-135M-Instruct, float32, seconds of an iteration; other depths are its layers, cut or repeated. "
        f"Medians over {about['rounds']} round(s) of {about['iterations']} iterations, the first not counted.",
        "",
        f"`{about['command']}` on {about['date']}, commit {about['commit']}, {about['cpu']}.",
        "",
        "| answers | new tokens | layers | " + " | ".join(PARTS) + " | whole | answers/s | peak memory, GB |",
        "|---:" * (len(PARTS) + 6) + "|",
    ]
    for point, done in runs.items():
        seconds = [statistics.median(seconds_of(run, part) for run in done) for part in PARTS]
        memory = statistics.median(run.peak_rss_bytes for run in done) / 1e9
        lines.append(
            f"| {point.answers} | {point.new_tokens} | {point.layers} | "
            + " | ".join(f"{spent:.1f}" for spent in seconds)
            + f" | {sum(seconds):.1f} | {point.answers / sum(seconds):.3f} | {memory:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs every point and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=1)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    runs: dict[Point, list[Run]] = {point: [] for point in POINTS}
    for number in range(flags.rounds):
        for point, done in runs.items():
            done.append(measure(point, iterations=flags.iterations, threads=flags.threads))
            parts = "  ".join(f"{part} {seconds_of(done[-1], part):.1f} s" for part in PARTS)
            print(f"round {number + 1}/{flags.rounds}  {point}  {parts}", flush=True)
        about = {
            **circumstances("rollouts_growth"),
            "iterations": flags.iterations,
            "rounds": number + 1,
        }
        plain = [
            dataclasses.asdict(point) | {"runs": [dataclasses.asdict(run) for run in done]}
            for point, done in runs.items()
        ]
        results = HERE / "results" / "rollouts_growth"
        results.with_suffix(".json").write_text(
            json.dumps({"about": about, "points": plain}, indent=1) + "\n", "utf-8"
        )
        results.with_suffix(".md").write_text(report(runs, about), "utf-8")
    print(report(runs, about))


if __name__ == "__main__":
    main()
