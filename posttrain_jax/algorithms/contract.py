"""What an algorithm says of itself, as plain values: the wiring reads it, and turns it into a `Task`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic

import numpy as np

from posttrain_jax.core.sharding import RowBatch
from posttrain_jax.core.types import Array, Metrics, Panel, PreferenceBatch, ProgressField, PyTree, TrainState
from posttrain_jax.data.loader import RowSource
from posttrain_jax.data.options import Source
from posttrain_jax.data.preference_groups import PreferenceData, PreferenceSource
from posttrain_jax.data.preference_rows import Preferences
from posttrain_jax.models.spec import ModelSpec
from posttrain_jax.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class Steps(Generic[RowBatch]):
    """The pure functions of an algorithm that learns from rows on disk, with all but these arguments bound.

    Attributes:
      make_state: (parameters, key, *, optimizer, ema_decay) -> the first state.
      train_step: (state, batch `[M, B, ...]`, *constants, *, optimizer, schedule, ema_decay) -> (state, metrics).
      eval_step: (whole parameters, batch `[M, B, ...]`, *constants) -> metrics named "eval/..."; with `eval_first` its
        means follow the constants.
      train, held_out: the rows.
      batch: what a step's rows become.
      row_tokens: T, for the count of FLOPs.
      constants: trees on the mesh that every step is handed and none changes.
      eval_first: as eval_step, for numbers of all held-out rows that eval_step needs: a pass that comes first.
      after_eval: warns of, or adds to, the values of an evaluation.
      members: models that are trained side by side, for the memory of their activations.
      finish, progress, panels: as in `Task`.
    """

    make_state: Callable[..., TrainState]
    train_step: Callable[..., tuple[TrainState, Metrics]]
    eval_step: Callable[..., Metrics]
    train: Sequence[RowSource]
    held_out: Sequence[RowSource]
    batch: type[RowBatch]
    row_tokens: int
    constants: tuple[PyTree, ...] = ()
    eval_first: Callable[..., Metrics] | None = None
    after_eval: Callable[[dict[str, float]], dict[str, float]] = lambda values: values
    finish: Callable[[TrainState], TrainState] | None = None
    members: int = 1
    progress: tuple[ProgressField, ...] = ()
    panels: tuple[Panel, ...] = ()


@dataclasses.dataclass(frozen=True)
class TextAlgorithm:
    """Learns from texts and conversations.

    Attributes:
      steps: (model, train rows, held-out rows, tokens of a row) -> its functions.
    """

    steps: Callable[[Model, Sequence[RowSource], Sequence[RowSource], int], Steps]


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference's log-probabilities of completions, `[..., 2]` as `forward.completions.policy_logps` has them.

    Attributes:
      train, held_out: of each source, float32 `[S, 2]`; empty where they were not computed before the first step.
      logps: (whole parameters, `params`, rows) -> `[B, N, 2]`, computed in every step; or None.
      params: of a reference in memory, else {}.
      identity: says which model `params` are; "" without them.
    """

    train: Sequence[np.ndarray] = ()
    held_out: Sequence[np.ndarray] = ()
    logps: Callable[[PyTree, PyTree, PreferenceBatch], Array] | None = None
    params: PyTree = dataclasses.field(default_factory=dict)
    identity: str = ""


@dataclasses.dataclass(frozen=True)
class PreferenceSetup:
    """What the functions of an algorithm that learns from preferences are bound to.

    Attributes:
      spec: the model.
      data: train and held-out preferences, and the shapes of their rows.
      reference: what completions are compared with.
      map_completions: (function of rows, parameters, source) -> its value of every completion of a training source.
      seed: of the run.
    """

    spec: ModelSpec
    data: Preferences
    reference: Reference
    map_completions: Callable[[Callable[..., Array], PyTree, PreferenceSource], np.ndarray]
    seed: int


def no_data_check(options: Any, data: Preferences) -> None:
    """All data will do."""


def no_model_check(options: Any, spec: ModelSpec) -> None:
    """Every model will do."""


@dataclasses.dataclass(frozen=True)
class PreferenceAlgorithm:
    """Learns from prompts with completions that were compared, labeled or rated.

    Attributes:
      section: the name of its own section in a config.
      options: the dataclass of this section.
      steps: (options, setup) -> its functions.
      reference: options -> where the reference's log-probabilities come from: "none"; "cached" before the first step
        and kept on disk; or computed in every step, by parameters of its own ("memory") or by the policy's with the
        LoRA adapter left out ("adapter").
      reference_model: options -> the MODEL that is "cached" or in "memory"; "" = the policy that training starts from.
      check_model: raises InputError where the model does not fit the options, before any data are read.
      check_data: raises InputError where the data do not fit the options, before anything is computed from them.
      change_data: (data, *, seed, max_length) -> what is added to the data after the split.
      is_reward: it trains a reward model: checkpoints hold a `score_head`, and no completions can be sampled.
    """

    section: str
    options: type
    steps: Callable[[Any, PreferenceSetup], Steps]
    reference: Callable[[Any], str] = lambda options: "none"
    reference_model: Callable[[Any], str] = lambda options: ""
    check_model: Callable[[Any, ModelSpec], None] = no_model_check
    check_data: Callable[[Any, Preferences], None] = no_data_check
    change_data: Callable[..., PreferenceData] | None = None
    is_reward: bool = False


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """What text, how many packed rows of it in an iteration, and how many tokens a row has."""

    data: Source
    rows: int
    length: int


@dataclasses.dataclass(frozen=True)
class Online:
    """An algorithm that learns from the policy's own completions: its pure function, and what it asks for.

    Attributes:
      train_step: (state, TrajectoryBatch, *, networks, optimizer, schedule, ema_decay) -> (state, metrics).
      epochs, minibatches: passes over an iteration's trajectories, and updates in each.
      kl_coefficient: beta at the start; 0 = it needs no reference.
      value: the value network: "none"; "policy" = a copy of the policy with a head of zeros; "shared" = such a head
        alone, on the policy's trunk; else a MODEL, a reward model as in InstructGPT.
      value_lr: the value network's peak learning rate; 0 = the policy's.
      value_warmup: iterations in which the value network alone is trained.
      text: rows of text that are learned from beside the trajectories; or None.
      progress, panels: as in `Task`.
    """

    train_step: Callable[..., tuple[TrainState, Metrics]]
    epochs: int
    minibatches: int
    kl_coefficient: float
    value: str = "none"
    value_lr: float = 0.0
    value_warmup: int = 0
    text: TextOptions | None = None
    progress: tuple[ProgressField, ...] = ()
    panels: tuple[Panel, ...] = ()


@dataclasses.dataclass(frozen=True)
class OnlineSizes:
    """Sizes of an iteration: prompts, completions of each, and most tokens of a prompt with its completion."""

    prompts: int
    samples: int
    max_length: int


@dataclasses.dataclass(frozen=True)
class OnlineAlgorithm:
    """Learns from the policy's own completions.

    Attributes:
      section: the name of its own section in a config.
      options: the dataclass of this section.
      online: (options, sizes) -> its function, and what it asks for; raises InputError where sizes do not fit.
    """

    section: str
    options: type
    online: Callable[[Any, OnlineSizes], Online]
