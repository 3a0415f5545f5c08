"""What the sides of the benchmark share: the prepared rows, the flags, and the one JSON line that each side prints.

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
from collections.abc import Iterator

import numpy as np

# The orchestrator writes down when it started the process; alone, a side counts from here.
_STARTED = float(os.environ.get("BENCH_STARTED", time.time()))


@dataclasses.dataclass(frozen=True)
class Settings:
    """One side's run. The same for every side, apart from `variant`.

    Attributes:
      rows: the folder that `prepare.py` wrote.
      steps: optimizer steps; the first `warmup` are not in the rates.
      rows_per_step: rows (packed, or one sequence each) in a step.
      lora_rank: 0 = full fine-tuning; else adapters on all seven linear layers, alpha = 2 * rank.
      lr: constant learning rate; weight decay 0, gradient clipping at norm 1, AdamW (0.9, 0.999).
      threads: how many CPU threads the side may use.
      variant: which of the side's own settings, see each side.
    """

    rows: pathlib.Path
    steps: int
    rows_per_step: int
    lora_rank: int
    lr: float
    threads: int
    variant: str


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """The packed rows in the order in which they are trained on; every array is int32 `[rows, max_length]`."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray

    def batches(self, settings: Settings) -> Iterator[PackedRows]:
        """One batch for each step; after the last whole batch it starts again."""
        whole = len(self.tokens) // settings.rows_per_step
        if whole == 0:
            sys.exit(
                f"error: {len(self.tokens)} packed rows are not enough for {settings.rows_per_step} a step"
            )
        for step in range(settings.steps):
            start = step % whole * settings.rows_per_step
            yield self.take(slice(start, start + settings.rows_per_step))

    def take(self, which: slice) -> PackedRows:
        """Some of the rows."""
        return PackedRows(
            self.tokens[which], self.loss_mask[which], self.segment_ids[which], self.positions[which]
        )

    @property
    def real(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_ids > 0).sum())

    @property
    def trained(self) -> int:
        """Tokens that the loss counts."""
        return int(self.loss_mask.sum())


def load_packed(rows: pathlib.Path) -> PackedRows:
    """The packed rows that `prepare.py` wrote."""
    with np.load(rows / "packed.npz") as stored:
        return PackedRows(stored["tokens"], stored["loss_mask"], stored["segment_ids"], stored["positions"])


def load_sequences(rows: pathlib.Path) -> list[dict[str, list[int]]]:
    """The same sequences before packing: `input_ids`, and `labels` with -100 where the loss does not look."""
    sequences = []
    with (rows / "sequences.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            labels = [t if m else -100 for t, m in zip(row["tokens"], row["loss_mask"], strict=True)]
            sequences.append({"input_ids": row["tokens"], "labels": labels})
    return sequences


class Recorder:
    """Times the steps of one side, and prints its line.

    The line is a JSON object: `side`, `settings`, `steps`; the lists with one entry for each step `tokens_real`,
    `tokens_trained`, `seconds_per_step` (the end of the step before, or for the first the start of the loop, to the
    end of this one), `loss` (mean over the step's trained tokens); `seconds_to_first_step` (process start to the end
    of the first step), `peak_rss_bytes`, and `versions`.
    """

    def __init__(self, side: str, settings: Settings, versions: dict[str, str]) -> None:
        self._side, self._settings, self._versions = side, settings, versions
        self._real: list[int] = []
        self._trained: list[int] = []
        self._loss: list[float] = []
        self._ends: list[float] = []
        self._loop_start = 0.0

    def start(self) -> None:
        """Call right before the first step."""
        self._loop_start = time.time()

    def step(self, *, loss: float, real: int, trained: int) -> None:
        """Call when a step's results are there: after `loss.item()`, after `block_until_ready`."""
        self._ends.append(time.time())
        self._loss.append(loss)
        self._real.append(real)
        self._trained.append(trained)

    def finish(self) -> None:
        """Prints the line, the last on standard output."""
        times = [self._loop_start, *self._ends]
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record = {
            "side": self._side,
            "settings": {**dataclasses.asdict(self._settings), "rows": str(self._settings.rows)},
            "steps": len(self._ends),
            "tokens_real": self._real,
            "tokens_trained": self._trained,
            "seconds_per_step": [round(b - a, 4) for a, b in itertools.pairwise(times)],
            "loss": self._loss,
            "seconds_to_first_step": round(self._ends[0] - _STARTED, 3),
            "peak_rss_bytes": kilobytes * (1 if sys.platform == "darwin" else 1024),
            "versions": self._versions,
        }
        print(json.dumps(record), flush=True)


def parse_settings(doc: str | None) -> Settings:
    """The flags that every side takes. Also keeps the process on as many CPUs as it has threads, where it can."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=pathlib.Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows_per_step", type=int, default=4)
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", default="")
    settings = Settings(**vars(parser.parse_args()))
    if sys.platform == "linux":
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[: settings.threads])
    return settings
