"""What the sides of the generation benchmark share: the work of each setting, and how a side is talked to.

A side is one process that loads the model once and then answers lines on standard input: a setting's name in, a JSON
object `{"seconds", "tokens", "answers"}` out. So rounds alternate without loading and compiling anew. Imports NumPy and
the standard library alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

SEED = 0
SHORTEST_PROMPT, LONGEST_PROMPT = 64, 256
SHORTEST_ANSWER, LONGEST_ANSWER = 16, 256


@dataclasses.dataclass(frozen=True)
class Work:
    """What one setting asks for.

    Attributes:
      title: how the table calls it.
      prompts: how many of the prompts, from the first on.
      batch: answers written side by side.
      new_tokens: tokens of every answer; 0 = unlike ones (`answer_lengths`).
      samples: answers per prompt; more than one are drawn at temperature 1, one is greedy.
    """

    title: str
    prompts: int
    batch: int
    new_tokens: int = 128
    samples: int = 1

    def lengths(self) -> list[int]:
        """New tokens of each prompt's answers."""
        return [self.new_tokens] * self.prompts if self.new_tokens else answer_lengths(self.prompts)


WORKS = {
    "batch1": Work("(a) batch 1, 128 new tokens", prompts=2, batch=1),
    "batch8": Work("(a) batch 8, 128 new tokens", prompts=8, batch=8),
    "batch32": Work("(a) batch 32, 128 new tokens", prompts=32, batch=32),
    "mixed": Work("(b) 24 answers of 16 to 256 tokens, 8 at a time", prompts=24, batch=8, new_tokens=0),
    "samples": Work(
        "(c) 8 samples of each of 8 prompts, 64 new tokens", prompts=8, batch=64, new_tokens=64, samples=8
    ),
}


def answer_lengths(count: int) -> list[int]:
    """Geometric lengths of mean 64, clipped to 16 .. 256; the same in every run."""
    drawn = np.random.default_rng(SEED).geometric(1 / 64, count)
    return np.clip(drawn, SHORTEST_ANSWER, LONGEST_ANSWER).tolist()


def load_prompts(rows: pathlib.Path) -> list[np.ndarray]:
    """Real conversations, each cut to a length between 64 and 256; the same in every run."""
    random = np.random.default_rng(SEED)
    prompts = []
    with (rows / "sequences.jsonl").open(encoding="utf-8") as file:
        for line in file:
            tokens = json.loads(line)["tokens"]
            length = int(random.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1))
            if len(tokens) >= length:
                prompts.append(np.asarray(tokens[:length]))
    return prompts


def serve(run: Callable[[Work], list[list[int]]], versions: dict[str, str]) -> None:
    """Answers settings until standard input ends; `run` returns the new tokens of every answer.

    Keeps the process on as many CPUs as OMP_NUM_THREADS says, where it can.
    """
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])])
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        work = WORKS[line.strip()]
        start = time.perf_counter()
        answers = run(work)
        seconds = time.perf_counter() - start
        tokens = sum(len(answer) for answer in answers)
        print(json.dumps({"seconds": seconds, "tokens": tokens, "answers": answers}), flush=True)
