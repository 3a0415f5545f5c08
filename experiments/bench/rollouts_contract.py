"""What the sides of the benchmark of PPO and RLOO share: the prompts, the flags, the one JSON line that each prints.

Imports NumPy and the standard library alone, because it runs in every side's own environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time

import numpy as np

from experiments.bench.preferences_contract import peak_memory_bytes

_STARTED = float(os.environ.get("BENCH_STARTED", time.time()))

SETTINGS = ("ppo", "rloo")
EPOCHS = {"ppo": 4, "rloo": 1}
LR = 3e-6
BETA = 0.05
CLIP = 0.2


@dataclasses.dataclass(frozen=True)
class Settings:
    """One side's run, the same for every side apart from `together`.

    Attributes:
      rows: the folder that `rollouts.py` prepared.
      setting: "ppo" (policy, value network, reference and reward model, 4 epochs of one minibatch) or "rloo" (policy,
        reference, a reward function; one update).
      iterations: answers and the updates on them; the first is not in the rates.
      prompts: of an iteration.
      samples: answers to each.
      new_tokens: of an answer that does not end before.
      together: answers that a forward and backward pass takes.
      threads: how many CPU threads the side may use.
    """

    rows: pathlib.Path
    setting: str
    iterations: int
    prompts: int
    samples: int
    new_tokens: int
    together: int
    threads: int


def parse_settings(doc: str | None) -> Settings:
    """The flags that every side takes. Also keeps the process on as many CPUs as it has threads, where it can."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=pathlib.Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--together", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    settings = Settings(**vars(parser.parse_args()))
    if sys.platform == "linux":
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[: settings.threads])
    return settings


def load_prompts(rows: pathlib.Path) -> list[str]:
    """The openings that are gone on from, in their order."""
    with (rows / "prompts.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def load_head(rows: pathlib.Path) -> np.ndarray:
    """The head of reward model and value network at the start, float32 `[D, 1]`."""
    return np.load(rows / "head.npy")


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process measured. Lists have an entry for each iteration.

    Attributes:
      side, setting, together: which.
      episodes: answers.
      completion_tokens: mean tokens of an answer.
      seconds: from the end of the iteration before (for the first: the start of the loop) to the end of this one.
      kl: mean over the answers of sum log pi - log pi_ref; 0 in the first iteration.
      parts: seconds of each part of an iteration, by name, where the side tells them apart.
      seconds_to_first: process start to the end of the first iteration.
      peak_rss_bytes: largest resident set.
      versions: of the packages that matter.
    """

    side: str
    setting: str
    together: int
    episodes: list[int]
    completion_tokens: list[float]
    seconds: list[float]
    kl: list[float]
    parts: dict[str, list[float]]
    seconds_to_first: float
    peak_rss_bytes: int
    versions: dict[str, str]

    @staticmethod
    def parse(text: str) -> Run:
        """The run whose JSON object is the last line of what a side printed.

        Raises:
          ValueError: there is no such line.
        """
        lines = text.strip().splitlines()
        fields = json.loads(lines[-1]) if lines else None
        if not isinstance(fields, dict) or set(fields) != {field.name for field in dataclasses.fields(Run)}:
            raise ValueError(
                f"the side's last line is not a run: {lines[-1][:200] if lines else 'no output'}"
            )
        return Run(**fields)


class Recorder:
    """Times the iterations of one side, and prints its line."""

    def __init__(self, side: str, settings: Settings, versions: dict[str, str]) -> None:
        self._side, self._settings, self._versions = side, settings, versions
        self._answer_tokens: list[float] = []
        self._kl: list[float] = []
        self._parts: dict[str, list[float]] = {}
        self._ends: list[float] = []
        self._loop_start = 0.0

    def start(self) -> None:
        """Call right before the first iteration."""
        self._loop_start = time.time()

    def iteration(self, *, completion_tokens: float, kl: float, parts: dict[str, float]) -> None:
        """Call when an iteration's results are there."""
        self._ends.append(time.time())
        self._answer_tokens.append(completion_tokens)
        self._kl.append(kl)
        for name, seconds in parts.items():
            self._parts.setdefault(name, []).append(round(seconds, 3))

    def finish(self) -> None:
        """Prints the line, the last on standard output."""
        times = [self._loop_start, *self._ends]
        settings = self._settings
        run = Run(
            side=self._side,
            setting=settings.setting,
            together=settings.together,
            episodes=[settings.prompts * settings.samples] * len(self._ends),
            completion_tokens=self._answer_tokens,
            seconds=[round(b - a, 3) for a, b in itertools.pairwise(times)],
            kl=self._kl,
            parts=self._parts,
            seconds_to_first=round(self._ends[0] - _STARTED, 3),
            peak_rss_bytes=peak_memory_bytes(),
            versions=self._versions,
        )
        sys.stdout.flush()
        print(json.dumps(dataclasses.asdict(run)), flush=True)
