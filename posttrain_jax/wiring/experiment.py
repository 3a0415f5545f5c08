"""An experiment's config as typed sections: here a ConfigDict ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.optim import OptimOptions
from posttrain_jax.core.schema import Sections, check, setting
from posttrain_jax.core.sharding import MeshOptions
from posttrain_jax.data.options import DataOptions, PreferenceDataOptions, PromptDataOptions, TextDataOptions
from posttrain_jax.models.options import ModelOptions
from posttrain_jax.rewards.score_options import ScoreOptions
from posttrain_jax.rollouts.sampling import RolloutOptions
from posttrain_jax.run.options import (
    CheckpointOptions,
    EvalOptions,
    LogOptions,
    OfflineEvalOptions,
    OnlineEvalOptions,
    TrainOptions,
)
from posttrain_jax.run.stop_rules import StopRules


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The keys that lie in no section."""

    algorithm: str = setting("sft", "how the model learns (wiring/algorithms.py)")
    seed: int = setting(0, "of the order of the rows and of everything that is drawn")

    def __post_init__(self) -> None:
        check(self, "")


# The sections of every experiment; `data` and `eval` have further keys by the kind of algorithm.
SHARED: Sections = {
    "": RunOptions,
    "model": ModelOptions,
    "data": DataOptions,
    "train": TrainOptions,
    "optim": OptimOptions,
    "mesh": MeshOptions,
    "log": LogOptions,
    "eval": EvalOptions,
    "checkpoint": CheckpointOptions,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config says.

    Attributes:
      options: the algorithm's own section, None where it has none.
      sections: all sections by name.
    """

    algorithm: str
    seed: int
    model: ModelOptions
    data: DataOptions
    train: TrainOptions
    optim: OptimOptions
    mesh: MeshOptions
    log: LogOptions
    eval: EvalOptions
    checkpoint: CheckpointOptions
    options: Any
    sections: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.model.init:
            raise InputError('model.init is not set; it must be a MODEL, or "random".')
        if not self.data.train:
            raise InputError("data.train is not set; it must be the rows to train on.")
        if self.eval.weights == "ema" and not self.optim.ema:
            raise InputError(
                "eval.weights is 'ema', but optim.ema is 0, so no moving average of the weights is kept."
            )


@dataclasses.dataclass(frozen=True)
class OfflineExperiment(Experiment):
    """An experiment whose algorithm learns from rows on disk."""

    eval: OfflineEvalOptions


@dataclasses.dataclass(frozen=True)
class TextExperiment(OfflineExperiment):
    """From texts and conversations."""

    data: TextDataOptions


@dataclasses.dataclass(frozen=True)
class PreferenceExperiment(OfflineExperiment):
    """From preferences."""

    data: PreferenceDataOptions


@dataclasses.dataclass(frozen=True)
class OnlineExperiment(Experiment):
    """An experiment whose algorithm learns from the policy's own completions."""

    data: PromptDataOptions
    eval: OnlineEvalOptions
    rollout: RolloutOptions
    score: ScoreOptions
    stop: StopRules
