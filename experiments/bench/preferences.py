"""Speed and memory of learning from preferences, beside TRL's DPOTrainer and RewardTrainer, in one run.

python -m experiments.bench.preferences --rounds=5                 the recorded table; a quiet machine with 2 cores
python -m experiments.bench.preferences --rounds=1                 is everything in place?
python -m experiments.bench.preferences --rounds=1 --name=preferences_probe --sides=jax,jax_2rows,trl,trl_4,trl_2,trl_1
                                                                   which setting of each side is the fastest?

Needs the PyTorch environment of `experiments.bench.sft` and makes it where it is not there. Prepares the pairs and the
reference's log-probabilities, then runs the sides one after the other, in another order each round, each as a fresh
process. Every round goes on in the pairs where the round before stopped, the same for every side. Writes
results/NAME.json after every round (with every line that a side printed) and results/NAME.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

from experiments.bench.preferences_contract import SETTINGS, Run
from experiments.bench.sft import HERE, ROOT, circumstances, make_torch_environment, positive

WARMUP = 1


@dataclasses.dataclass(frozen=True)
class Side:
    """One line of the table: its label, and whether it is TRL or posttrain_jax, in which variant."""

    label: str
    torch: bool
    variant: str


SIDES = {
    "jax": Side("posttrain_jax", False, "1x1024"),
    "jax_2rows": Side("posttrain_jax, 2 rows at once", False, "2x1024"),
    "trl": Side("TRL, all pairs of a step at once", True, ""),
    "trl_4": Side("TRL, 4 pairs at once", True, "4"),
    "trl_2": Side("TRL, 2 pairs at once", True, "2"),
    "trl_1": Side("TRL, 1 pair at once", True, "1"),
}
TITLES = {"dpo": "DPO", "reward_model": "Reward model"}
BARS = {"dpo": 2.0, "reward_model": 2.0}

# How near the sides' numbers must be. The first step's loss comes before any update: float32 rounding alone, of sums
# of hundreds of log-probabilities (DPO) or of one product (reward model). Later ones follow AdamW's first updates,
# which are lr * sign(gradient) and differ where a gradient is as small as its rounding.
FIRST_TOLERANCE = 1e-4
LATER_TOLERANCE = 1e-3


def parse_flags() -> argparse.Namespace:
    """The flags; their defaults are those of the recorded table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="jax,trl_1", help=f"any of {', '.join(SIDES)}")
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"any of {', '.join(SETTINGS)}")
    parser.add_argument("--rounds", type=positive, default=5, help="each side runs once a round")
    parser.add_argument(
        "--steps", type=int, default=2, help=f"the first {WARMUP} of each run is not in the rates"
    )
    parser.add_argument("--pairs_per_step", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=100, help="rows of dpo_en_demo, if as many fit")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a prompt with an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="preferences", help="of the files in results/")
    flags = parser.parse_args()
    flags.sides, flags.settings = flags.sides.split(","), flags.settings.split(",")
    for given, known in ((flags.sides, SIDES), (flags.settings, SETTINGS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
    if flags.steps <= WARMUP:
        parser.error(f"--steps must be more than {WARMUP}")
    return flags


def command_of(
    side: Side, setting: str, flags: argparse.Namespace, rows: pathlib.Path, torch_python: pathlib.Path
) -> list[str]:
    """How a side is started."""
    module = "experiments.bench.preferences_" + ("trl" if side.torch else "jax")
    command = [str(torch_python) if side.torch else sys.executable, "-m", module]
    command += [f"--rows={rows}", f"--setting={setting}", f"--steps={flags.steps}"]
    command += [f"--pairs_per_step={flags.pairs_per_step}", f"--threads={flags.threads}"]
    return [*command, f"--variant={side.variant}"]


def call(command: list[str], threads: int) -> str:
    """Runs a side; what it printed. The environment is the same for every side."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Huge pages for large blocks, where the system leaves the choice to the program: good for every side.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "BENCH_STARTED": repr(time.time()),
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8"
    )
    if done.returncode != 0:
        sys.exit(f"{done.stderr[-4000:]}\nerror: exit status {done.returncode} of {' '.join(command)}")
    return done.stdout


Runs = dict[str, dict[str, list[Run]]]
"""For every setting and side its runs, one a round."""


def per_second(run: Run, amounts: list[int]) -> float:
    """Rate after the first step."""
    return sum(amounts[WARMUP:]) / sum(run.seconds[WARMUP:])


@dataclasses.dataclass(frozen=True)
class Summary:
    """A side's medians over the rounds; `spread` is (largest - smallest) / median of the pairs per second."""

    pairs_per_second: float
    spread: float
    tokens_per_second: float
    places_per_pair: float
    peak_rss_bytes: float
    seconds_to_first_step: float


def summarize(runs: list[Run]) -> Summary:
    """Medians over runs."""
    rates = [per_second(run, run.pairs) for run in runs]
    median = statistics.median(rates)
    return Summary(
        pairs_per_second=median,
        spread=(max(rates) - min(rates)) / median,
        tokens_per_second=statistics.median(per_second(run, run.tokens) for run in runs),
        places_per_pair=statistics.median(sum(run.places) / sum(run.pairs) for run in runs),
        peak_rss_bytes=statistics.median(run.peak_rss_bytes for run in runs),
        seconds_to_first_step=statistics.median(run.seconds_to_first_step for run in runs),
    )


def fastest(summaries: dict[str, Summary], *, torch: bool) -> str | None:
    """The name of the fastest side of one kind."""
    there = [name for name in summaries if SIDES[name].torch == torch]
    return max(there, key=lambda name: summaries[name].pairs_per_second, default=None)


def ratio_lines(setting: str, sides: dict[str, list[Run]]) -> list[str]:
    """How posttrain_jax stands to TRL, each at its fastest; the speed is the median of the rounds' ratios."""
    summaries = {name: summarize(runs) for name, runs in sides.items() if runs}
    ours, theirs = fastest(summaries, torch=False), fastest(summaries, torch=True)
    if ours is None or theirs is None:
        return []
    speeds = [
        per_second(a, a.pairs) / per_second(b, b.pairs)
        for a, b in zip(sides[ours], sides[theirs], strict=False)
    ]
    memory = summaries[ours].peak_rss_bytes / summaries[theirs].peak_rss_bytes
    return [
        f"- {TITLES[setting]}: {SIDES[ours].label} / TRL at its fastest ({SIDES[theirs].label}): "
        f"{statistics.median(speeds):.2f}x the pairs per second ({min(speeds):.2f} to {max(speeds):.2f} in a round; "
        f"the bar is {BARS[setting]:g}x), {memory:.2f}x the peak memory (the bar is 1x)"
    ]


def agreement_lines(setting: str, sides: dict[str, list[Run]]) -> list[str]:
    """How near the sides are to each other (and DPO's first loss to log 2), the worst over rounds."""
    lines = []
    named = [(name, run) for name, runs in sides.items() for run in runs]
    if setting == "dpo" and named:
        for torch, kind in ((False, "posttrain_jax"), (True, "TRL")):
            off = [abs(run.loss[0] - math.log(2)) for name, run in named if SIDES[name].torch == torch]
            if off:
                lines.append(
                    _line(f"DPO, loss of the first step minus log 2, {kind}", max(off), FIRST_TOLERANCE)
                )
    first, later, margins = [], [], []
    for name, runs in sides.items():
        if SIDES[name].torch:
            continue
        for other, their_runs in sides.items():
            if not SIDES[other].torch:
                continue
            for ours, theirs in zip(runs, their_runs, strict=False):
                first.append(abs(ours.loss[0] - theirs.loss[0]) / abs(theirs.loss[0]))
                later.append(abs(ours.loss[-1] - theirs.loss[-1]) / abs(theirs.loss[-1]))
                margins.append(abs(ours.margin[-1] - theirs.margin[-1]))
    if first:
        title, step = TITLES[setting], len(named[0][1].loss)
        lines += [
            _line(
                f"{title}, loss of step 1 against TRL, relative difference",
                max(first),
                FIRST_TOLERANCE,
            ),
            _line(
                f"{title}, loss of step {step} against TRL, relative difference",
                max(later),
                LATER_TOLERANCE,
            ),
            _line(
                f"{title}, reward margin of step {step} against TRL, difference",
                max(margins),
                LATER_TOLERANCE,
            ),
        ]
    return lines


def _line(what: str, worst: float, tolerance: float) -> str:
    verdict = "" if worst <= tolerance else ", **not met**"
    return f"- {what}: at most {worst:.1e} (tolerance {tolerance:g}{verdict})"


def report(runs: Runs, about: dict[str, Any]) -> str:
    """The Markdown text."""
    lines = [
        f"DPO (reference log-probabilities cached on both sides) and a reward model from {about['model']}, on "
        f"{about['data']}, the same {about['pairs_per_step']} pairs a step for every side, {about['threads']} threads, "
        f"AdamW. Medians of {about['rounds']} alternating runs of {about['steps']} steps, the first step not in the "
        "rates.",
        "",
        f"`{about['command']}` on {about['date']}, commit {about['commit']}, {about['cpu']}; {about['versions']}.",
        "",
        "| setting | side | pairs/s | spread | tokens/s | places per pair | peak memory, GB | start to first step, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for setting, sides in runs.items():
        for name, done in sides.items():
            if done:
                row = summarize(done)
                lines.append(
                    f"| {TITLES[setting]} | {SIDES[name].label} | {row.pairs_per_second:.3f} "
                    f"| {100 * row.spread:.0f} % | {row.tokens_per_second:.1f} | {row.places_per_pair:.0f} "
                    f"| {row.peak_rss_bytes / 1e9:.2f} | {row.seconds_to_first_step:.1f} |"
                )
    lines += [
        "",
        "Tokens: of both sequences of a pair, the prompt with each, without padding. Places: what goes through the "
        "model for a pair, padding included.",
        "",
    ]
    for setting, sides in runs.items():
        lines += ratio_lines(setting, sides)
    for setting, sides in runs.items():
        lines += agreement_lines(setting, sides)
    return "\n".join(lines) + "\n"


def write(folder: pathlib.Path, name: str, runs: Runs, about: dict[str, Any]) -> None:
    """results/NAME.json and .md."""
    folder.mkdir(exist_ok=True)
    plain = {
        setting: {side: [dataclasses.asdict(run) for run in done] for side, done in sides.items()}
        for setting, sides in runs.items()
    }
    (folder / f"{name}.json").write_text(
        json.dumps({"about": about, "runs": plain}, indent=1) + "\n", "utf-8"
    )
    (folder / f"{name}.md").write_text(report(runs, about), "utf-8")


def read(path: pathlib.Path) -> tuple[Runs, dict[str, Any]]:
    """What `write` stored: the runs, and what is said about them."""
    stored = json.loads(path.read_text("utf-8"))
    runs = {
        setting: {side: [Run.parse(json.dumps(run)) for run in done] for side, done in sides.items()}
        for setting, sides in stored["runs"].items()
    }
    return runs, stored["about"]


def main() -> None:
    """Runs everything and prints the table."""
    flags = parse_flags()
    torch_python = make_torch_environment()
    rows = HERE / "rows" / f"pairs{flags.pairs}x{flags.max_length}"
    prepare = [sys.executable, "-m", "experiments.bench.preferences_prepare", f"--out={rows}"]
    call([*prepare, f"--count={flags.pairs}", f"--max_length={flags.max_length}"], flags.threads)
    info = json.loads((rows / "info.json").read_text("utf-8"))
    if "dpo" in flags.settings:
        for name in flags.sides:
            print(f"{name}: reference log-probabilities, kept in {rows.relative_to(ROOT)}", flush=True)
            call([*command_of(SIDES[name], "dpo", flags, rows, torch_python), "--prepare"], flags.threads)

    about = {
        **info,
        **circumstances("preferences"),
        "steps": flags.steps,
        "pairs_per_step": flags.pairs_per_step,
        "threads": flags.threads,
    }
    runs: Runs = {setting: {name: [] for name in flags.sides} for setting in flags.settings}
    versions: dict[str, str] = {}
    results = HERE / "results"
    for number in range(flags.rounds):
        turn = number % len(flags.sides)
        first = number * flags.steps * flags.pairs_per_step % info["pairs"]
        for setting in flags.settings:
            for name in flags.sides[turn:] + flags.sides[:turn]:
                command = command_of(SIDES[name], setting, flags, rows, torch_python)
                run = Run.parse(call([*command, f"--first={first}"], flags.threads))
                runs[setting][name].append(run)
                versions |= run.versions
                print(
                    f"round {number + 1}/{flags.rounds}  {setting:12s} {name:10s} "
                    f"{per_second(run, run.pairs):7.3f} pairs/s  {run.peak_rss_bytes / 1e9:5.2f} GB",
                    flush=True,
                )
        about["rounds"] = number + 1
        about["versions"] = ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))
        write(results, flags.name, runs, about)
    print(f"\n{report(runs, about)}\nwritten to {(results / flags.name).relative_to(ROOT)}.md and .json")


if __name__ == "__main__":
    main()
