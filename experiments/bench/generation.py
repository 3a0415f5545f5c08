"""Speed of generation beside `transformers`, in one run: SmolLM2-135M, float32, the same prompts and lengths.

python -m experiments.bench.generation                                     the recorded table; a quiet machine
python -m experiments.bench.generation --rounds=1 --settings=batch1        is everything in place?
python -m experiments.bench.generation --sides=torch,torch_static --rounds=1   which cache is faster?

Every side is one process that stays; each round runs every setting on every side, in another order. The first run of
a setting on a side (compilation, allocation) is not counted. Writes results/NAME.json and results/NAME.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from experiments.bench.generation_contract import WORKS, load_prompts
from experiments.bench.sft import HERE, ROOT, circumstances, make_torch_environment, positive

ROWS = HERE / "rows" / "200x512"
SIDES = {
    "jax": ("posttrain_jax", "experiments.bench.generation_jax", ()),
    "torch": ("transformers, dynamic cache", "experiments.bench.generation_torch", ("--cache=dynamic",)),
    "torch_static": ("transformers, static cache", "experiments.bench.generation_torch", ("--cache=static",)),
}
BARS = {"batch1": 2.0, "batch8": 1.5, "batch32": 2.0, "mixed": 2.5, "samples": 2.0}


class Worker:
    """A side's process."""

    def __init__(self, name: str, python: pathlib.Path | str, threads: int) -> None:
        _, module, arguments = SIDES[name]
        self._process = subprocess.Popen(
            [str(python), "-m", module, f"--rows={ROWS}", *arguments],
            cwd=ROOT,
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions: dict[str, str] = self._read()["versions"]

    def run(self, setting: str) -> dict[str, Any]:
        """One run of a setting."""
        assert self._process.stdin is not None
        self._process.stdin.write(setting + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: a side ended with {self._process.wait()}")
        return json.loads(line)


def environment(threads: int) -> dict[str, str]:
    """The same for every side."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


@dataclasses.dataclass(frozen=True)
class Rates:
    """Medians over the rounds: new tokens per second (prefill included), and the spread of it."""

    tokens_per_second: float
    spread: float

    @staticmethod
    def of(runs: list[dict[str, Any]]) -> Rates:
        rates = [run["tokens"] / run["seconds"] for run in runs]
        median = statistics.median(rates)
        return Rates(median, (max(rates) - min(rates)) / median)


def roofline_share(setting: str, rate: float, machine: dict[str, float]) -> tuple[float, str]:
    """Which share of the machine's limit a rate is, and which limit binds.

    A step of B rows reads every weight and the rows' caches once and spends 2 FLOPs a weight and row; it takes as long
    as the longer of the two. Prefill counts as if it were free.
    """
    work, prompts = WORKS[setting], load_prompts(ROWS)
    lengths = work.lengths()
    rows = min(work.batch, work.prompts * work.samples)
    prompt = statistics.mean(len(row) for row in prompts[: work.prompts])
    cached = prompt + statistics.mean(lengths) / 2
    read = 4 * machine["weights"] + rows * cached * machine["cache_bytes_per_token"]
    limits = {
        "memory": read / machine["copy_bytes_per_second"],
        "products": 2 * machine["weights"] * rows / machine["flops_per_second"],
    }
    binding = max(limits, key=lambda name: limits[name])
    return rate * limits[binding] / rows, binding


def same_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of greedy tokens that are the same, up to each answer's first difference."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(len(answer) for answer in ours)


def report(runs: dict[str, dict[str, list[dict[str, Any]]]], about: dict[str, Any]) -> str:
    """The Markdown text."""
    machine = about["machine"]
    lines = [
        f"Generation with SmolLM2-135M-Instruct, float32, {about['threads']} threads; prompts of 64 to 256 tokens. "
        f"New tokens per second, prefill included; medians of {about['rounds']} alternating runs.",
        "",
        f"`{about['command']}` on {about['date']}, commit {about['commit']}, {about['cpu']}; {about['versions']}.",
        f"Machine: copies {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s, large float32 products "
        f"{machine['flops_per_second'] / 1e9:.0f} GFLOP/s.",
        "",
        "| setting | side | tokens/s | spread | ours / fastest transformers | bar | share of the roofline |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for setting, sides in runs.items():
        rates = {side: Rates.of(done) for side, done in sides.items() if done}
        others = [rate.tokens_per_second for side, rate in rates.items() if side != "jax"]
        for side, rate in rates.items():
            ratio = share = bar = ""
            if side == "jax":
                part, binding = roofline_share(setting, rate.tokens_per_second, machine)
                share = f"{100 * part:.0f} % ({binding})"
                if others:
                    ratio = f"**{rate.tokens_per_second / max(others):.2f}x**"
                    bar = f"{BARS[setting]:g}x"
            lines.append(
                f"| {WORKS[setting].title} | {SIDES[side][0]} | {rate.tokens_per_second:.1f} "
                f"| {100 * rate.spread:.0f} % | {ratio} | {bar} | {share} |"
            )
    lines.append("")
    for setting, sides in runs.items():
        if WORKS[setting].samples == 1 and sides.get("jax") and sides.get("torch"):
            same = same_share(sides["jax"][0]["answers"], sides["torch"][0]["answers"])
            lines.append(
                f"- {WORKS[setting].title}: {100 * same:.1f} % of the greedy tokens lie before the first difference "
                "of the two sides' answers"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="jax,torch", help=f"any of {', '.join(SIDES)}")
    parser.add_argument("--settings", default=",".join(WORKS), help=f"any of {', '.join(WORKS)}")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="generation", help="of the files in results/")
    flags = parser.parse_args()
    sides, settings = flags.sides.split(","), flags.settings.split(",")
    for given, known in ((sides, SIDES), (settings, WORKS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
    torch_python = make_torch_environment()
    prepare = [sys.executable, "-m", "experiments.bench.prepare", f"--out={ROWS}"]
    prepare += ["--count=200", "--max_length=512"]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    measure = [sys.executable, "-m", "experiments.bench.generation_jax", f"--rows={ROWS}", "--roofline"]
    machine = json.loads(
        subprocess.run(
            measure, cwd=ROOT, env=environment(flags.threads), check=True, capture_output=True, text=True
        ).stdout
    )
    pythons = {side: sys.executable if side == "jax" else torch_python for side in sides}
    workers = {side: Worker(side, pythons[side], flags.threads) for side in sides}
    versions = {k: v for worker in workers.values() for k, v in worker.versions.items()}
    about = {
        **circumstances("generation"),
        "threads": flags.threads,
        "machine": machine,
        "versions": ", ".join(f"{package} {version}" for package, version in sorted(versions.items())),
    }
    for setting in settings:
        for side in sides:
            workers[side].run(setting)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        setting: {side: [] for side in sides} for setting in settings
    }
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    for number in range(flags.rounds):
        about["rounds"] = number + 1
        turn = number % len(sides)
        for setting in settings:
            for side in sides[turn:] + sides[:turn]:
                run = workers[side].run(setting)
                runs[setting][side].append(run)
                rate = run["tokens"] / run["seconds"]
                print(f"round {number + 1}/{flags.rounds}  {setting:8s} {side:14s} {rate:8.1f}", flush=True)
        stored = json.dumps({"about": about, "runs": without_answers(runs)}, indent=1)
        (results / f"{flags.name}.json").write_text(stored + "\n", "utf-8")
        (results / f"{flags.name}.md").write_text(report(runs, about), "utf-8")
    print(f"\n{report(runs, about)}\nwritten to {(results / flags.name).relative_to(ROOT)}.md and .json")


def without_answers(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """The runs as they are stored: the tokens themselves are left out."""
    return {
        setting: {
            side: [{"seconds": r["seconds"], "tokens": r["tokens"]} for r in done]
            for side, done in sides.items()
        }
        for setting, sides in runs.items()
    }


if __name__ == "__main__":
    main()
