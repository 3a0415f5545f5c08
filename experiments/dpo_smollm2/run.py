"""DPO on SmolLM2-135M with real pairs: trains, and writes the recorded numbers of this folder.

python -m experiments.dpo_smollm2.run --workdir=runs/dpo_smollm2 [--variant=tiny] [--seed=0]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.training import read_lines, train, write_result
from posttrain_jax.data.split import split_amount
from posttrain_jax.evaluate.statistics import ratio_estimates

HERE = Path(__file__).resolve().parent
CONFIG = "configs/dpo/smollm2_135m.py"
KEPT = (
    "eval/loss",
    "eval/reward_accuracy",
    "eval/rewards/chosen",
    "eval/rewards/rejected",
    "eval/rewards/margins",
    "eval/logps/chosen",
    "eval/logps/rejected",
)


def main() -> None:
    """Trains and records."""
    workdir, out = train(__doc__, CONFIG, out=HERE)
    write_result(out / "result.json", record(workdir))


def record(workdir: Path) -> dict[str, Any]:
    """Held-out metrics before and after, and the interval of the accuracy after (bootstrap over prompts)."""
    config = json.loads((workdir / "config.json").read_text())
    lines = read_lines(workdir / "metrics.jsonl")
    held_out = [line for line in lines if "eval/loss" in line]
    first, last = held_out[0], held_out[-1]
    amount = split_amount(config["data"]["eval"])
    assert amount is not None  # the config holds out a number of prompts
    pairs = int(amount)
    right = round(last["eval/reward_accuracy"] * pairs)
    rows = [{"accuracy": (float(i < right), 1.0)} for i in range(pairs)]
    interval = ratio_estimates(rows, resamples=10_000, seed=0)["accuracy"]
    return {
        "seed": config["seed"],
        "steps": last["step"],
        "held_out_pairs": pairs,
        "before": {name.removeprefix("eval/"): round(first[name], 4) for name in KEPT},
        "after": {name.removeprefix("eval/"): round(last[name], 4) for name in KEPT},
        "accuracy_interval": [round(interval.low, 4), round(interval.high, 4)],
        "minutes": round((lines[-1]["time"] - lines[0]["time"]) / 60, 1),
    }


if __name__ == "__main__":
    main()
