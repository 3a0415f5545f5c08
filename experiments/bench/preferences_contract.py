"""What the sides of the preference benchmark share: the pairs, the flags, and the one JSON line that each side prints.

Imports NumPy and the standard library alone, because it runs in every side's own environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import resource
import sys
import time

import numpy as np

# The orchestrator writes down when it started the process; alone, a side counts from here.
_STARTED = float(os.environ.get("BENCH_STARTED", time.time()))

SETTINGS = ("dpo", "reward_model")
LR = {"dpo": 5e-6, "reward_model": 9e-6}
BETA = 0.1


@dataclasses.dataclass(frozen=True)
class Settings:
    """One side's run. The same for every side, apart from `variant`.

    Attributes:
      rows: the folder that `preferences_prepare.py` wrote.
      setting: "dpo" (beta 0.1, sigmoid loss) or "reward_model" (Bradley-Terry, the head of `head.npy`).
      steps: optimizer steps, AdamW (0.9, 0.999), constant learning rate, no weight decay, clipping at norm 1.
      pairs_per_step: in file order, from `first` on, and from the start again after the last.
      first: where the first step begins.
      threads: how many CPU threads the side may use.
      variant: which of the side's own settings, see each side.
      prepare: compute what is kept on disk (the reference's log-probabilities), print nothing and stop.
    """

    rows: pathlib.Path
    setting: str
    steps: int
    pairs_per_step: int
    first: int
    threads: int
    variant: str
    prepare: bool

    @property
    def lr(self) -> float:
        """The learning rate of the setting's config."""
        return LR[self.setting]


def parse_settings(doc: str | None) -> Settings:
    """The flags that every side takes. Also keeps the process on as many CPUs as it has threads, where it can."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=pathlib.Path, required=True, help="folder of preferences_prepare.py")
    parser.add_argument("--setting", choices=SETTINGS, default=SETTINGS[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs_per_step", type=int, default=16)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", default="")
    parser.add_argument("--prepare", action="store_true")
    settings = Settings(**vars(parser.parse_args()))
    if sys.platform == "linux":
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[: settings.threads])
    return settings


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt as token ids; a line of `pairs.jsonl`.

    Attributes:
      chosen, rejected: the whole sequences, prompt included, as the chat template ends them.
      prompt: how many tokens at the start are the prompt.
      chosen_trained, rejected_trained: where the last trained token (the end of the turn) ends; what the template
        writes after it is read by a reward model alone.
    """

    chosen: list[int]
    rejected: list[int]
    prompt: int
    chosen_trained: int
    rejected_trained: int

    @property
    def tokens(self) -> int:
        """Of both sequences, the prompt counted twice."""
        return len(self.chosen) + len(self.rejected)


def load_pairs(rows: pathlib.Path) -> list[Pair]:
    """The pairs in their order."""
    with (rows / "pairs.jsonl").open(encoding="utf-8") as file:
        return [Pair(**json.loads(line)) for line in file]


def load_head(rows: pathlib.Path) -> np.ndarray:
    """The reward head that every side starts from, float32 `[D, 1]`."""
    return np.load(rows / "head.npy")


def pairs_of_steps(settings: Settings, count: int) -> list[list[int]]:
    """Which of `count` pairs each step takes."""
    size = settings.pairs_per_step
    return [
        [(settings.first + step * size + i) % count for i in range(size)] for step in range(settings.steps)
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process measured. Lists have an entry for each step.

    Attributes:
      side, setting, variant: which.
      pairs: trained on in the step.
      tokens: of their sequences, prompts counted with each completion, no padding.
      places: that went through the model, with padding, and with shared prompts counted once.
      seconds: from the end of the step before (for the first: the start of the loop) to the end of this one.
      loss: mean over the pairs, before the step's update.
      margin: chosen minus rejected reward, mean over the pairs, before the step's update.
      seconds_to_first_step: process start to the end of the first step.
      peak_rss_bytes: largest resident set.
      versions: of the packages that matter.
    """

    side: str
    setting: str
    variant: str
    pairs: list[int]
    tokens: list[int]
    places: list[int]
    seconds: list[float]
    loss: list[float]
    margin: list[float]
    seconds_to_first_step: float
    peak_rss_bytes: int
    versions: dict[str, str]

    @staticmethod
    def parse(text: str) -> Run:
        """The run whose JSON object is the last line of what a side printed.

        Raises:
          ValueError: there is no such line, or its lists differ in length.
        """
        lines = text.strip().splitlines()
        fields = json.loads(lines[-1]) if lines else None
        names = {field.name for field in dataclasses.fields(Run)}
        if not isinstance(fields, dict) or set(fields) != names:
            raise ValueError(
                f"the side's last line is not a run: {lines[-1][:200] if lines else 'no output'}"
            )
        run = Run(**fields)
        counts = {
            len(each) for each in (run.pairs, run.tokens, run.places, run.seconds, run.loss, run.margin)
        }
        if len(counts) != 1:
            raise ValueError(
                f"the run's lists have {sorted(counts)} entries; each must have one for every step"
            )
        return run


def peak_memory_bytes() -> int:
    """The largest resident set of this process.

    VmHWM begins with the program; `ru_maxrss` (where there is no /proc) with what the parent had when it forked.
    """
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Recorder:
    """Times the steps of one side, and prints its line."""

    def __init__(self, side: str, settings: Settings, versions: dict[str, str]) -> None:
        self._side, self._settings, self._versions = side, settings, versions
        pairs = load_pairs(settings.rows)
        self._steps = [[pairs[i] for i in step] for step in pairs_of_steps(settings, len(pairs))]
        self._places: list[int] = []
        self._loss: list[float] = []
        self._margin: list[float] = []
        self._ends: list[float] = []
        self._loop_start = 0.0

    def start(self) -> None:
        """Call right before the first step."""
        self._loop_start = time.time()

    def step(self, *, loss: float, margin: float, places: int) -> None:
        """Call when a step's results are there: after `loss.item()`, after `block_until_ready`."""
        self._ends.append(time.time())
        self._loss.append(loss)
        self._margin.append(margin)
        self._places.append(places)

    def finish(self) -> None:
        """Prints the line, the last on standard output."""
        times = [self._loop_start, *self._ends]
        run = Run(
            side=self._side,
            setting=self._settings.setting,
            variant=self._settings.variant,
            pairs=[len(step) for step in self._steps],
            tokens=[sum(pair.tokens for pair in step) for step in self._steps],
            places=self._places,
            seconds=[round(b - a, 4) for a, b in itertools.pairwise(times)],
            loss=self._loss,
            margin=self._margin,
            seconds_to_first_step=round(self._ends[0] - _STARTED, 3),
            peak_rss_bytes=peak_memory_bytes(),
            versions=self._versions,
        )
        sys.stdout.flush()
        print(json.dumps(dataclasses.asdict(run)), flush=True)
