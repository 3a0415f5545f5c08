"""KTO on SmolLM2-135M with real labels: trains, and writes the recorded numbers of this folder.

python -m experiments.kto_smollm2.run --workdir=runs/kto_smollm2 [--variant=tiny] [--seed=0]

Run again, it goes on where it stopped. Whether it learnt is said by the rewards beta log pi(y|x) / pi_ref(y|x) of the
held-out completions: how often a good one has a higher reward than a bad one (the area under the ROC curve; 0.5 = by
chance). Completions of one label answer different prompts, so there are no pairs to count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.training import read_lines, train, write_result
from launch.entry import set_up_jax
from posttrain_jax.evaluate.statistics import Estimate, bootstrap_counts, interval
from posttrain_jax.forward.completions import map_completions, policy_logps_of
from posttrain_jax.models.io.load import load_model
from posttrain_jax.wiring.algorithms import read_experiment
from posttrain_jax.wiring.experiment import PreferenceExperiment
from posttrain_jax.wiring.model import mesh_of, model_spec
from posttrain_jax.wiring.offline import preferences_of
from posttrain_jax.wiring.task import micro_batches, seed_key

HERE = Path(__file__).resolve().parent
CONFIG = "configs/dpo/smollm2_135m_kto.py"
SHORT = "--config.data.max_length=512"  # 148 of the 300 completions; 240 fit 1,024 tokens
KEPT = ("loss", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def main() -> None:
    """Trains and records."""
    workdir, out = train(__doc__, CONFIG, out=HERE, overrides=[SHORT])
    set_up_jax()
    write_result(out / "result.json", record(workdir))


def record(workdir: Path) -> dict[str, Any]:
    """Held-out metrics before and after, and how well the rewards tell good completions from bad ones."""
    config = ConfigDict(json.loads((workdir / "config.json").read_text("utf-8")))
    lines = read_lines(workdir / "metrics.jsonl")
    held_out = [line for line in lines if "eval/loss" in line]
    first, last = held_out[0], held_out[-1]
    good, bad = held_out_rewards(config, workdir)
    area = area_under_curve(good, bad)
    return {
        "seed": config.seed,
        "steps": last["step"],
        "held_out": {"good": len(good), "bad": len(bad)},
        "before": {name: round(first[f"eval/{name}"], 4) for name in KEPT},
        "after": {name: round(last[f"eval/{name}"], 4) for name in KEPT},
        "area_under_curve": round(area.value, 4),
        "area_interval": [round(area.low, 4), round(area.high, 4)],
        "minutes": round((lines[-1]["time"] - lines[0]["time"]) / 60, 1),
    }


def held_out_rewards(config: ConfigDict, workdir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The rewards of the held-out completions that are good, and of those that are bad, in nats times beta."""
    experiment = read_experiment(config.to_dict())
    assert isinstance(experiment, PreferenceExperiment)
    mesh = mesh_of(experiment.mesh)
    policy = model_spec(experiment)
    model = policy.model
    data = preferences_of(experiment, policy, workdir)
    assert data.held_out is not None  # the config holds some out
    (source,) = data.held_out.sources
    logps_of = policy_logps_of(model, data.eval_shape.share_prompt)
    after, before = (
        map_completions(
            logps_of,
            params,
            source,
            data.eval_shape,
            mesh,
            groups=config.eval.batch_rows,
            micro_batches=micro_batches(experiment.train, mesh),
        )[:, 0]
        for params in (
            load_model(str(workdir), mesh=mesh).params,
            policy.init_params(mesh, seed_key(config.seed)),
        )
    )
    groups = [source.group(number) for number in range(len(source))]
    rewards = config.kto.beta * (after - before)[[group.first_sequence for group in groups]]
    is_good = np.array([group.labels[0] == 1 for group in groups])
    return rewards[is_good], rewards[~is_good]


def area_under_curve(good_G: np.ndarray, bad_B: np.ndarray) -> Estimate:
    """The chance that a good completion, drawn at random, has a higher reward than a bad one; ties count half.

    The interval is a bootstrap over the good and over the bad completions.
    """
    right_GB = (good_G[:, None] > bad_B) + 0.5 * (good_G[:, None] == bad_B)
    good_draws, bad_draws = (
        np.concatenate(list(bootstrap_counts(len(rewards), resamples=10_000, seed=seed)))
        for seed, rewards in enumerate((good_G, bad_B))
    )
    drawn = np.sum((good_draws @ right_GB) * bad_draws, axis=1) / right_GB.size
    return interval(np.concatenate([[right_GB.mean()], drawn]))


if __name__ == "__main__":
    main()
