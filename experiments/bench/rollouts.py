"""Speed and memory of PPO and RLOO beside TRL, in one run: episodes per second, answers and updates together.

python -m experiments.bench.rollouts                                          the recorded table; a quiet machine
python -m experiments.bench.rollouts --rounds=1 --settings=rloo               is everything in place?
python -m experiments.bench.rollouts --rounds=1 --sides=jax_8,jax_32,trl_8,trl_32 --name=rollouts_probe
                                                                              how many answers at once are the fastest?

TRL 1.16 has no PPO trainer, so PPO runs beside 1.12.0, the last seen with one, in an environment of its own. Prepares
model, reward model and prompts, then runs the sides one after the other, in another order each round, each as a fresh
process. Writes results/NAME.json after every round, and results/NAME.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from experiments.bench.preferences import call
from experiments.bench.rollouts_contract import EPOCHS, SETTINGS, Run
from experiments.bench.sft import HERE, ROOT, circumstances, make_torch_environment, positive
from posttrain_jax.data.sources import read_rows
from posttrain_jax.demo import assets
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.io.load import load_model

WARMUP = 1
BAR = 2.0
PPO_TRL = "trl==1.12.0"
PPO_VENV = HERE / ".venv-trl-ppo"
TITLES = {"ppo": "PPO", "rloo": "RLOO"}
SHAPES = {"ppo": (32, 1), "rloo": (8, 4)}  # prompts, answers to each
OPENINGS = 64


def parse_flags() -> argparse.Namespace:
    """The flags; their defaults are those of the recorded table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="jax_8,trl_8", help="jax_N or trl_N, N answers at once")
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"any of {', '.join(SETTINGS)}")
    parser.add_argument("--rounds", type=positive, default=5, help="each side runs once a round")
    parser.add_argument(
        "--iterations", type=int, default=2, help=f"of a run; the first {WARMUP} is not in the rates"
    )
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="rollouts", help="of the files in results/")
    flags = parser.parse_args()
    flags.sides, flags.settings = flags.sides.split(","), flags.settings.split(",")
    for name in flags.sides:
        kind, _, together = name.partition("_")
        if kind not in ("jax", "trl") or not together.isdigit():
            parser.error(f"unknown side {name!r}; write jax_N or trl_N")
    unknown = [name for name in flags.settings if name not in SETTINGS]
    if unknown:
        parser.error(f"unknown setting {unknown[0]!r}; known: {', '.join(SETTINGS)}")
    if flags.iterations <= WARMUP:
        parser.error(f"--iterations must be more than {WARMUP}")
    return flags


def make_ppo_environment() -> pathlib.Path:
    """The interpreter with TRL's PPO trainer: the packages of requirements.txt but for TRL itself."""
    wanted = (HERE / "requirements.txt").read_text("utf-8") + PPO_TRL
    stamp, python = PPO_VENV / ".installed", PPO_VENV / "bin" / "python"
    if not (stamp.is_file() and stamp.read_text("utf-8") == wanted):
        print(f"Installing {PPO_TRL} and PyTorch into {PPO_VENV.relative_to(ROOT)} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", PPO_VENV], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "-r", HERE / "requirements.txt"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", PPO_TRL], check=True)
        stamp.write_text(wanted, "utf-8")
    return python


def prepare(folder: pathlib.Path, layers: int = 0) -> None:
    """Model, reward model, its head and prompts, once; with `layers`, the layers are cut or repeated to so many."""
    if (folder / "info.json").is_file():
        return
    loaded = load_model(str(assets.fetch("smollm2-135m-instruct")))
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    if layers:
        order = np.arange(layers) % loaded.config.n_layers
        stacked = jax.tree.map(lambda kernel: np.asarray(kernel)[order], loaded.params["layers"])
        loaded = dataclasses.replace(
            loaded,
            config=dataclasses.replace(loaded.config, n_layers=layers),
            params={**loaded.params, "layers": stacked},
        )
    width = loaded.config.d_model
    head = (np.random.default_rng(0).normal(size=(width, 1)) / (width + 1) ** 0.5).astype(np.float32)
    score_head = {"kernel": head, "gain": np.float32(1), "bias": np.float32(0)}
    params = {name: part for name, part in loaded.params.items() if name != "head"}
    for name, tree in (("model", loaded.params), ("reward", {**params, "score_head": score_head})):
        export_hf(
            folder / name,
            config=loaded.config,
            params=tree,
            tokenizer=tokenizer,
            dtype="float32",
            overwrite=True,
        )
    np.save(folder / "head.npy", head)
    rows = [row.value for row in read_rows(str(assets.fetch("movie_openings")))][:OPENINGS]
    lines = [json.dumps({"prompt": row["prompt"]}) for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    info = {
        "model": "SmolLM2-135M-Instruct" + (f" with {layers} layers" if layers else "") + ", float32",
        "data": f"the first {len(rows)} openings of film reviews ({min(lengths)} to {max(lengths)} tokens)",
    }
    (folder / "info.json").write_text(json.dumps(info) + "\n", "utf-8")


Runs = dict[str, dict[str, list[Run]]]
"""For every setting and side its runs, one a round."""


def per_second(run: Run) -> float:
    """Episodes per second after the first iteration."""
    return sum(run.episodes[WARMUP:]) / sum(run.seconds[WARMUP:])


def median_of(runs: list[Run]) -> float:
    """Of their rates."""
    return statistics.median(map(per_second, runs))


def parts_of(runs: list[Run]) -> str:
    """Where the time goes, in per cent of what is told apart; "" where a side tells nothing."""
    seconds = {
        name: statistics.median(sum(run.parts[name][WARMUP:]) for run in runs) for name in runs[0].parts
    }
    whole = sum(seconds.values())
    return ", ".join(f"{name} {100 * spent / whole:.0f} %" for name, spent in seconds.items())


def ratio_line(setting: str, sides: dict[str, list[Run]]) -> str:
    """posttrain_jax over TRL, each at its fastest; the speed is the median of the rounds' ratios."""
    best = {}
    for kind in ("jax", "trl"):
        there = [name for name, runs in sides.items() if name.startswith(kind) and runs]
        if not there:
            return ""
        best[kind] = max(there, key=lambda name: median_of(sides[name]))
    ours, theirs = sides[best["jax"]], sides[best["trl"]]
    speeds = [per_second(a) / per_second(b) for a, b in zip(ours, theirs, strict=False)]
    memory = statistics.median(run.peak_rss_bytes for run in ours)
    memory /= statistics.median(run.peak_rss_bytes for run in theirs)
    return (
        f"- {TITLES[setting]}: {best['jax']} / {best['trl']}: {statistics.median(speeds):.2f}x the episodes per second "
        f"({min(speeds):.2f} to {max(speeds):.2f} in a round; the bar is {BAR:g}x), {memory:.2f}x the peak memory (the "
        "bar is 1x)"
    )


def report(runs: Runs, about: dict[str, Any]) -> str:
    """The Markdown text."""
    shapes = "; ".join(
        f"{TITLES[name]}: {SHAPES[name][0]} prompts x {SHAPES[name][1]}, {EPOCHS[name]} epochs"
        for name in runs
    )
    lines = [
        f"{about['model']}, going on from {about['data']} by at most {about['new_tokens']} tokens at temperature 1; "
        f"{shapes}. PPO with a value network and a reward model of the same size; {about['threads']} threads, AdamW. "
        f"Medians of {about['rounds']} alternating runs of {about['iterations']} iterations, the first not in the "
        "rates.",
        "",
        f"`{about['command']}` on {about['date']}, commit {about['commit']}, {about['cpu']}; {about['versions']}.",
        "",
        "| setting | side, answers at once | episodes/s | spread | answer, tokens | peak memory, GB "
        "| to the end of the first iteration, s | time |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for setting, sides in runs.items():
        for name, done in sides.items():
            if not done:
                continue
            rates = [per_second(run) for run in done]
            lines.append(
                f"| {TITLES[setting]} | {name} | {median_of(done):.3f} "
                f"| {100 * (max(rates) - min(rates)) / median_of(done):.0f} % "
                f"| {statistics.median(run.completion_tokens[-1] for run in done):.1f} "
                f"| {statistics.median(run.peak_rss_bytes for run in done) / 1e9:.2f} "
                f"| {statistics.median(run.seconds_to_first for run in done):.1f} | {parts_of(done)} |"
            )
    lines.append("")
    lines += [line for setting, sides in runs.items() if (line := ratio_line(setting, sides))]
    return "\n".join(lines) + "\n"


def write(name: str, runs: Runs, about: dict[str, Any]) -> None:
    """results/NAME.json and .md."""
    folder = HERE / "results"
    plain = {
        setting: {side: [dataclasses.asdict(run) for run in done] for side, done in sides.items()}
        for setting, sides in runs.items()
    }
    (folder / f"{name}.json").write_text(
        json.dumps({"about": about, "runs": plain}, indent=1) + "\n", "utf-8"
    )
    (folder / f"{name}.md").write_text(report(runs, about), "utf-8")


def main() -> None:
    """Runs everything and prints the table."""
    flags = parse_flags()
    theirs = {
        "ppo": make_ppo_environment() if "ppo" in flags.settings else None,
        "rloo": make_torch_environment() if "rloo" in flags.settings else None,
    }
    rows = HERE / "rows" / "rollouts"
    rows.mkdir(parents=True, exist_ok=True)
    prepare(rows)
    about: dict[str, Any] = {
        **json.loads((rows / "info.json").read_text("utf-8")),
        **circumstances("rollouts"),
        "iterations": flags.iterations,
        "new_tokens": flags.new_tokens,
        "threads": flags.threads,
    }
    runs: Runs = {setting: {name: [] for name in flags.sides} for setting in flags.settings}
    versions: set[str] = set()
    for number in range(flags.rounds):
        turn = number % len(flags.sides)
        for setting in flags.settings:
            prompts, samples = SHAPES[setting]
            for name in flags.sides[turn:] + flags.sides[:turn]:
                kind, _, together = name.partition("_")
                python = str(theirs[setting]) if kind == "trl" else sys.executable
                command = [python, "-m", f"experiments.bench.rollouts_{kind}", f"--rows={rows}"]
                command += [f"--setting={setting}", f"--iterations={flags.iterations}"]
                command += [f"--prompts={prompts}", f"--samples={samples}", f"--together={together}"]
                command += [f"--new_tokens={flags.new_tokens}", f"--threads={flags.threads}"]
                run = Run.parse(call(command, flags.threads))
                runs[setting][name].append(run)
                versions |= {f"{package} {version}" for package, version in run.versions.items()}
                print(
                    f"round {number + 1}/{flags.rounds}  {setting:5s} {name:8s} {per_second(run):7.3f} episodes/s  "
                    f"{run.peak_rss_bytes / 1e9:5.2f} GB  {parts_of([run])}",
                    flush=True,
                )
        about["rounds"] = number + 1
        about["versions"] = ", ".join(sorted(versions))
        write(flags.name, runs, about)
    print((HERE / "results" / f"{flags.name}.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
