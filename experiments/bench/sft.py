"""Speed and memory of supervised fine-tuning, beside TRL and a plain PyTorch loop, in one run.

python -m experiments.bench.sft                             the recorded table; a quiet machine with 2 cores
python -m experiments.bench.sft --rounds=1 --steps=2        is everything in place?
python -m experiments.bench.sft --rounds=1 --name=probe --sides=jax,torch,torch_all_logits,trl,trl_packed,jax_lora,\
    trl_lora,trl_lora_packed                                which setting of each side is the fastest?

Makes its own environment for the PyTorch sides (.venv-trl, once), prepares the rows, then runs the sides one after
the other, in another order each round, each as a fresh process. Writes results/NAME.json after every round (with
every line that a side printed) and results/NAME.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

# Only the standard library: a child's peak memory starts from what its parent had when it was forked.

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH_VENV = HERE / ".venv-trl"
WARMUP = 1


@dataclasses.dataclass(frozen=True)
class Side:
    """One line of the table: which module runs, in which environment, with which setting.

    Attributes:
      label: how the table calls it.
      module: run as `python -m`.
      torch: in the PyTorch environment instead of this one.
      lora: adapters are trained instead of all parameters.
      variant: handed to the side.
    """

    label: str
    module: str
    torch: bool = False
    lora: bool = False
    variant: str = ""


_JAX, _TORCH, _TRL = (
    "experiments.bench.side_jax",
    "experiments.bench.side_torch",
    "experiments.bench.side_trl",
)
SIDES = {
    "jax": Side("posttrain_jax", _JAX),
    "torch": Side("plain torch loop, packed rows, logits of trained tokens", _TORCH, torch=True),
    "torch_all_logits": Side(
        "plain torch loop, packed rows, all logits", _TORCH, torch=True, variant="all_logits"
    ),
    "trl": Side("TRL SFTTrainer, padded", _TRL, torch=True),
    "trl_packed": Side("TRL SFTTrainer, packed", _TRL, torch=True, variant="packed"),
    "trl_default": Side(
        "TRL SFTTrainer, padded, its default checkpointing", _TRL, torch=True, variant="checkpointing"
    ),
    "jax_lora": Side("posttrain_jax, LoRA", _JAX, lora=True),
    "trl_lora": Side("TRL + PEFT, LoRA, padded", _TRL, torch=True, lora=True),
    "trl_lora_packed": Side("TRL + PEFT, LoRA, packed", _TRL, torch=True, lora=True, variant="packed"),
}
DEFAULT_SIDES = "jax,torch,trl_packed,jax_lora,trl_lora_packed"


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of a flag."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def parse_flags() -> argparse.Namespace:
    """The flags; their defaults are those of the recorded table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default=DEFAULT_SIDES, help=f"any of {', '.join(SIDES)}")
    parser.add_argument("--rounds", type=positive, default=5, help="each side runs once a round")
    parser.add_argument(
        "--steps", type=int, default=3, help=f"the first {WARMUP} of each run is not in the rates"
    )
    parser.add_argument("--rows", type=int, default=200, help="rows of alpaca_en_demo")
    parser.add_argument(
        "--max_length", type=int, default=1024, help="sequence limit, and length of a packed row"
    )
    parser.add_argument("--rows_per_step", type=int, default=2)
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="sft", help="of the files in results/")
    flags = parser.parse_args()
    flags.sides = flags.sides.split(",")
    unknown = [side for side in flags.sides if side not in SIDES]
    if unknown:
        parser.error(f"unknown side {unknown[0]!r}; known: {', '.join(SIDES)}")
    if flags.steps <= WARMUP:
        parser.error(f"--steps must be more than {WARMUP}")
    return flags


def make_torch_environment() -> pathlib.Path:
    """The PyTorch sides' interpreter; installs the pinned packages when requirements.txt changed."""
    requirements = HERE / "requirements.txt"
    stamp = TORCH_VENV / ".installed"
    python = TORCH_VENV / "bin" / "python"
    if not (stamp.is_file() and stamp.read_text("utf-8") == requirements.read_text("utf-8")):
        print(
            f"Installing TRL and PyTorch into {TORCH_VENV.relative_to(ROOT)} (about a minute) ...", flush=True
        )
        subprocess.run([sys.executable, "-m", "venv", TORCH_VENV], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "-r", requirements], check=True)
        stamp.write_text(requirements.read_text("utf-8"), "utf-8")
    return python


def run_side(
    side: Side, flags: argparse.Namespace, rows: pathlib.Path, torch_python: pathlib.Path
) -> dict[str, Any]:
    """One process; the JSON object that it printed last."""
    command = [str(torch_python) if side.torch else sys.executable, "-m", side.module]
    command += [f"--rows={rows}", f"--steps={flags.steps}", f"--rows_per_step={flags.rows_per_step}"]
    command += [f"--threads={flags.threads}", f"--variant={side.variant}"]
    command += (
        [f"--lora_rank={flags.lora_rank}", "--lr=1e-4"] if side.lora else ["--lora_rank=0", "--lr=1e-5"]
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": str(flags.threads),
        "MKL_NUM_THREADS": str(flags.threads),
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
        sys.exit(f"{done.stderr[-4000:]}\nerror: {side.label} failed: {' '.join(command)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Summary:
    """A side's medians over the rounds: tokens per second after the first step, bytes, seconds."""

    real_per_second: float
    trained_per_second: float
    peak_rss_bytes: float
    seconds_to_first_step: float
    spread: float


def summarize(runs: list[dict[str, Any]]) -> Summary:
    """Medians; `spread` is (largest - smallest) / median of the real tokens per second."""

    def rate(run: dict[str, Any], key: str) -> float:
        return sum(run[key][WARMUP:]) / sum(run["seconds_per_step"][WARMUP:])

    real = [rate(run, "tokens_real") for run in runs]
    return Summary(
        real_per_second=statistics.median(real),
        trained_per_second=statistics.median(rate(run, "tokens_trained") for run in runs),
        peak_rss_bytes=statistics.median(run["peak_rss_bytes"] for run in runs),
        seconds_to_first_step=statistics.median(run["seconds_to_first_step"] for run in runs),
        spread=(max(real) - min(real)) / statistics.median(real),
    )


def ratios(summaries: dict[str, Summary]) -> list[str]:
    """How posttrain_jax stands to the fastest setting of each other kind, one line each."""
    lines = []
    for ours, kind, others in (
        ("jax", "TRL", ("trl", "trl_packed", "trl_default")),
        ("jax", "the plain torch loop", ("torch", "torch_all_logits")),
        ("jax_lora", "TRL + PEFT", ("trl_lora", "trl_lora_packed")),
    ):
        there = [name for name in others if name in summaries]
        if ours not in summaries or not there:
            continue
        fastest = max(there, key=lambda name: summaries[name].real_per_second)
        speed = summaries[ours].real_per_second / summaries[fastest].real_per_second
        memory = summaries[ours].peak_rss_bytes / summaries[fastest].peak_rss_bytes
        lines.append(
            f"- {SIDES[ours].label} / {kind} at its fastest ({SIDES[fastest].label}): {speed:.2f}x the real tokens per "
            f"second, {memory:.2f}x the peak memory"
        )
    return lines


def loss_check(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The sides that train the same packed rows must have the same loss in the first step (before any update)."""
    first = {
        name: runs[name][0]["loss"][0] for name in ("jax", "torch", "torch_all_logits") if runs.get(name)
    }
    if "jax" not in first or len(first) < 2:
        return []
    worst = max(abs(loss - first["jax"]) / abs(loss) for name, loss in first.items() if name != "jax")
    return [
        f"- loss of the first step against PyTorch on the same packed rows: relative difference {worst:.1e}"
    ]


def report(runs: dict[str, list[dict[str, Any]]], about: dict[str, Any]) -> str:
    """The Markdown text."""
    summaries = {name: summarize(of_side) for name, of_side in runs.items() if of_side}
    rounds = min(len(of_side) for of_side in runs.values())
    lines = [
        f"SFT of {about['model']} on {about['data']}, {about['rows_per_step']} rows of at most {about['max_length']} "
        f"tokens a step, {about['threads']} threads, AdamW. Medians of {rounds} alternating runs of "
        f"{about['steps']} steps, the first step not in the rates.",
        "",
        f"`{about['command']}` on {about['date']}, commit {about['commit']}, {about['cpu']}; {about['versions']}.",
        "",
        "| side | real tokens/s | spread | trained tokens/s | peak memory, GB | start to first step, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in summaries.items():
        lines.append(
            f"| {SIDES[name].label} | {row.real_per_second:.1f} | {100 * row.spread:.0f} % "
            f"| {row.trained_per_second:.1f} | {row.peak_rss_bytes / 1e9:.2f} | {row.seconds_to_first_step:.1f} |"
        )
    return "\n".join([*lines, "", *ratios(summaries), *loss_check(runs)]) + "\n"


def cpu_name() -> str:
    """The processor's name, family and model (clouds hide the number in its name), and how many cores we may use."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    first, _, _ = (cpuinfo.read_text("utf-8") if cpuinfo.is_file() else "").partition("\n\n")
    said = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    name = said.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in said and "model" in said:
        name += f", family {said['cpu family']} model {said['model']}"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{name} ({cores} cores)"


def commit() -> str:
    """The checkout's short hash, with a + when files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    return run.stdout.strip() or "unknown"


def circumstances(module: str) -> dict[str, str]:
    """What every table says of its run: the command (python -m experiments.bench.MODULE ...), date, commit, CPU."""
    return {
        "command": f"python -m experiments.bench.{module} {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": cpu_name(),
    }


def main() -> None:
    """Runs everything and prints the table."""
    flags = parse_flags()
    torch_python = make_torch_environment()
    rows = HERE / "rows" / f"{flags.rows}x{flags.max_length}"
    prepare = [sys.executable, "-m", "experiments.bench.prepare", f"--out={rows}"]
    prepare += [f"--count={flags.rows}", f"--max_length={flags.max_length}"]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    info = json.loads((rows / "info.json").read_text("utf-8"))

    about = {
        **info,
        **circumstances("sft"),
        "steps": flags.steps,
        "rows_per_step": flags.rows_per_step,
        "threads": flags.threads,
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in flags.sides}
    versions: dict[str, str] = {}
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    for number in range(flags.rounds):
        turn = number % len(flags.sides)
        for name in flags.sides[turn:] + flags.sides[:turn]:
            run = run_side(SIDES[name], flags, rows, torch_python)
            runs[name].append(run)
            versions |= run["versions"]
            rate = summarize([run]).real_per_second
            print(f"round {number + 1}/{flags.rounds}  {name:18s} {rate:8.1f} real tokens/s", flush=True)
        about["versions"] = ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))
        stored = json.dumps({"about": about, "runs": runs}, indent=1)
        (results / f"{flags.name}.json").write_text(stored + "\n", "utf-8")
        (results / f"{flags.name}.md").write_text(report(runs, about), "utf-8")
    print(f"\n{report(runs, about)}\nwritten to {(results / flags.name).relative_to(ROOT)}.md and .json")


if __name__ == "__main__":
    main()
