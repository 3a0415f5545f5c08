"""The sections of a config that say how long a run is, and what it writes when."""

from __future__ import annotations

import dataclasses

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import check, setting


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How much is trained on, and how a step is cut."""

    steps: int = setting(0, "length of the run; exactly one of steps and epochs is set", unit="steps")
    epochs: float = setting(0.0, "the same, in passes over the training rows", unit="epochs", maximum=1e6)
    rows_per_step: int = setting(
        8, "rows of a step on all devices (pairs, labeled completions, prompts)", unit="rows", minimum=1
    )
    micro_rows: int = setting(0, "rows computed at once on all devices; 0 = all", unit="rows")
    remat: str = setting(
        "elementwise",
        "what the backward pass computes again instead of keeping it",
        choices=("none", "elementwise", "mlp", "full"),
    )
    max_skipped: int = setting(5, "non-finite updates in a row that stop the run", unit="updates", minimum=1)

    def __post_init__(self) -> None:
        check(self, "train")
        if self.steps and self.epochs:
            raise InputError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs:g}; set exactly one of train.steps and "
                "train.epochs, and the other to 0."
            )


@dataclasses.dataclass(frozen=True)
class LogOptions:
    """What is logged, and where to."""

    every: int = setting(
        10, "between two lines of metrics.jsonl and of the terminal", unit="steps", minimum=1
    )
    tensorboard: bool = setting(True, "TensorBoard events too")
    wandb_project: str = setting("", 'Weights & Biases too; "" = off')
    profile: str = setting("", '"FIRST:LAST", such as "10:12": these steps are traced; "" = off')

    def __post_init__(self) -> None:
        check(self, "log")
        profiled_steps(self.profile)


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """When the held-out rows are looked at, and with which weights."""

    every: int = setting(0, "between evaluations; 0 = before the first and after the last step", unit="steps")
    weights: str = setting(
        "raw", "raw: the last weights; ema: their moving average (optim.ema)", choices=("raw", "ema")
    )

    def __post_init__(self) -> None:
        check(self, "eval")


@dataclasses.dataclass(frozen=True)
class OfflineEvalOptions(EvalOptions):
    """Of an algorithm that learns from rows on disk."""

    batch_rows: int = setting(8, "rows at once on all devices", unit="rows", minimum=1)
    prompts: tuple[str, ...] = setting(
        (), "are answered at every evaluation, into samples.jsonl", longest=100_000
    )
    max_new_tokens: int = setting(128, "longest of these completions", unit="tokens", minimum=1)


@dataclasses.dataclass(frozen=True)
class OnlineEvalOptions(EvalOptions):
    """Of an algorithm that samples: the held-out prompts are answered as an iteration's, the first 16 of them into
    samples.jsonl."""

    temperature: float = setting(
        -1.0, "of these completions; 0 = the likeliest token, -1 = rollout.temperature", minimum=-1
    )


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When the state is saved, and what stays."""

    every: int = setting(0, "between checkpoints; 0 = at the end", unit="steps")
    keep: int = setting(2, "the latest checkpoints that stay", minimum=1)
    best_metric: str = setting("", "such as eval/loss: its best checkpoint stays too")
    best_is_high: bool = setting(False, "the best is the highest (an accuracy), not the lowest (a loss)")

    def __post_init__(self) -> None:
        check(self, "checkpoint")


def profiled_steps(profile: str) -> tuple[int, int]:
    """The first and the last step of `log.profile`; (-1, -1) where it is "".

    Raises:
      InputError: it is nothing of the kind.
    """
    if not profile:
        return -1, -1
    first, _, last = profile.partition(":")
    if not (first.isdecimal() and last.isdecimal() and len(profile) < 20 and 0 < int(first) <= int(last)):
        raise InputError(f'log.profile is {profile[:80]!r}; write "FIRST:LAST" steps, for example "10:12".')
    return int(first), int(last)
