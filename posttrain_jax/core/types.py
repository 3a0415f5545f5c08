"""The types that all rooms share, and the letters that name array axes.

Axis letters, used as suffixes of array names at public boundaries:

    B  batch rows       T  time (token positions)   V  vocabulary     D  model width
    H  query heads      G  key/value heads          K  head width     F  feed-forward width
    L  layers           R  LoRA rank                M  micro-batches  N  a flattened B*T, or a count
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A mean as a sum and a count, so that micro-batches, devices and steps add up exactly; its value is sum / count.

    The metric's name says what it is a mean over.
    """

    sum: Array
    count: Array

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.sum + other.sum, self.count + other.count)

    @staticmethod
    def of(value: Array | float) -> Metric:
        """A metric that is a single number (a learning rate, a norm)."""
        return Metric(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))

    def over_leading_axis(self) -> Metric:
        """Its parts, stacked on a leading axis, as one."""
        return Metric(jnp.sum(self.sum, axis=0), jnp.sum(self.count, axis=0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Maximum:
    """The largest of many numbers: the parts of a step are joined by their maximum. It is no `Metric`, for it is no
    mean; a step hands it to the loop as one (`as_metric`), so that a log window shows the mean of its steps' maxima."""

    value: Array

    def join(self, other: Maximum) -> Maximum:
        """The larger of the two."""
        return Maximum(jnp.maximum(self.value, other.value))

    def over_leading_axis(self) -> Maximum:
        """Its parts, stacked on a leading axis, as one."""
        return Maximum(jnp.max(self.value, axis=0))

    def as_metric(self) -> Metric:
        """As a metric that is this single number, NaN too; one that counts nothing where there was no number (-inf)."""
        known = self.value != -jnp.inf
        return Metric(jnp.where(known, self.value, 0.0), known.astype(jnp.float32))


Metrics = dict[str, Metric]
PartMetrics = dict[str, Metric | Maximum]
"""Of a part of a step, a micro-batch or a minibatch."""


def is_metric(node: Any) -> bool:
    """Whether a node of a tree is a metric: the leaves at which metrics are joined (`is_leaf`)."""
    return isinstance(node, Metric | Maximum)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOutput:
    """What a loss returns: the unreduced loss and its metrics.

    Attributes:
      loss: unreduced, float32; per token (`[B, T]`, 0 where masked) or per row (`[B]`).
      count: scalar float32, how many entries of `loss` count (where rows are weighted, the sum of their weights);
        the mean loss is `loss.sum() / count`.
      metrics: named `Metric`s.
    """

    loss: Array
    count: Array
    metrics: Metrics

    @property
    def loss_B(self) -> Array:
        """`loss` under the name of its axis, for losses of one value per row (a pair, a completion)."""
        return self.loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens on their way into a train step; every leaf is `[B, T]` (or `[M, B, T]`).

    Attributes:
      tokens: int32 token ids.
      loss_mask: 1 where the token at this position is a target that is trained on, else 0. The first token
        of a sequence has no prediction, so it is never 1.
      segment_ids: int32; 0 is padding, 1.. number the sequences packed into the row.
      positions: int32; position of each token in its own sequence.
    """

    tokens: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceBatch:
    """Rows of prompts with their completions; see `data/preference_rows.py` for how a row is laid out.

    A row has T tokens, room for N completions and for P comparisons between them; every leaf is `[B, ...]` (or
    `[M, B, ...]`). Unused entries of completions have `sequence_ids` 0, of comparisons `weights` 0.

    Attributes:
      tokens, loss_mask, segment_ids, positions: `[B, T]` as in `Batch`; a segment is a prompt with its completions.
      branches: `[B, T]` int32, 0 = prompt, n = completion n - 1 of the row.
      last_token_index: `[B, N]` int32, the index in the row of a completion's last token.
      lengths: `[B, N]` int32, trained tokens of a completion.
      sequence_ids: `[B, N]` int32, number of the completion in its source + 1.
      group_ids: `[B, N]` int32, 1.. numbers the prompts of the row.
      ranks: `[B, N]` int32, 0 = best of its prompt, equal = tied; as in the data, whatever comparisons are kept.
      ratings, labels, reference_logps: `[B, N]` float32; NaN (ratings) or -1 (labels) where there is none.
      better, worse: `[B, P]` int32, the indices 0..N-1 of the two completions of a comparison.
      weights, margins, probabilities: `[B, P]` float32, see `data.preferences.Comparison`.
      shares: `[B, P]` float32, 1 / C(K, 2) for a comparison among K completions.
    """

    tokens: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array
    branches: Array
    last_token_index: Array
    lengths: Array
    sequence_ids: Array
    group_ids: Array
    ranks: Array
    ratings: Array
    labels: Array
    reference_logps: Array
    better: Array
    worse: Array
    weights: Array
    margins: Array
    probabilities: Array
    shares: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What the transformer returns.

    Attributes:
      hidden_BTD: the last hidden state, after the final norm, in the compute dtype.
      logits_BTV: float32 logits, or None when they were not requested (train steps never request them).
      cache: the KV cache with this call's keys and values written, or None when none was given.
    """

    hidden_BTD: Array
    logits_BTV: Array | None = None
    cache: PyTree = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a run needs to continue exactly where it stopped, apart from the data iterator's state.

    Attributes:
      step: int32 scalar, how many steps were taken (skipped updates count as steps).
      params: the parameters that are trained; the gradient is taken with respect to these alone.
      frozen: the parameters that are not trained (`{}` when all are).
      opt_state: the optimizer's state, for `params`.
      ema: exponential moving average of `params`, or `{}` when off.
      key: typed PRNG key; step t uses `fold_in(key, t)`.
      skipped: int32 scalar, updates skipped so far because a loss or gradient was not finite.
      skipped_in_row: int32 scalar, how many of the latest steps were skipped one after the other.
    """

    step: Array
    params: PyTree
    frozen: PyTree
    opt_state: PyTree
    ema: PyTree
    key: Array
    skipped: Array
    skipped_in_row: Array


class HostRows(Protocol):
    """One process's share of a step's rows, as it comes from the loader."""

    @property
    def arrays(self) -> dict[str, np.ndarray]: ...
    @property
    def row_ids(self) -> list[str]: ...


class RowStream(Protocol):
    """An endless stream of steps' rows whose position is saved as JSON and restored without reading rows again."""

    def __next__(self) -> HostRows: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """What one step learns from.

    Attributes:
      batch: the global batch on the devices, as the algorithm's train step takes it.
      metrics: about how it was collected, named "train/..."; they are logged with those of the step.
      row_ids: "file:line" of the rows (or prompts) in it, for messages.
    """

    batch: PyTree
    metrics: Metrics
    row_ids: list[str]


@dataclasses.dataclass(frozen=True)
class CollectorState:
    """All that a collector needs to go on as if it had not stopped; every process has the same.

    Attributes:
      values: plain JSON.
      arrays: host arrays by name (a replay buffer, say); none of them is written to afterwards.
    """

    values: dict[str, Any]
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Collector(Protocol):
    """Where the loop's batches come from: rows on disk (`run/batches.py`), or completions that the policy samples
    (`rollouts/collector.py`)."""

    def next(self, state: TrainState) -> StepBatch:
        """The next step's batch. Raises StepNotTaken where there is none to learn from; `state` is then as it was."""

    def get_state(self) -> CollectorState: ...
    def set_state(self, state: CollectorState) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class ProgressField:
    """A part of the progress line.

    Attributes:
      text: a format string with one place for each metric, such as "score {:.3f} ± {:.3f}".
      metrics: the logged names whose values fill the places; without one of them the part is left out.
    """

    text: str
    metrics: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Panel:
    """A diagram of `curves.png`: logged metrics of one unit over the steps.

    Attributes:
      title: what the vertical axis shows, with its unit.
      metrics: logged names, a line each.
    """

    title: str
    metrics: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """What an algorithm hands to the training loop; the loop knows nothing else of the algorithm.

    Attributes:
      steps: how many steps the whole run has.
      init_state: makes the first state, on the devices.
      abstract_state: its shapes, dtypes and shardings, for restoring without making it.
      collector: where the steps' batches come from.
      train_step: (state, batch) -> (state, metrics), jitted, state donated.
      evaluate: state -> named numbers, at every evaluation; or None.
      sample: state -> rows for `samples.jsonl`, at every evaluation; or None.
      flops_per_token: model FLOPs of one step per token, for MFU; 0 = unknown.
      finish: changes the state once, after the last step and before it is evaluated and saved; or None.
      stop: (what was just logged, the highest value so far of each metric of an evaluation) -> why the run should end
        here, or ""; None = it has all its steps.
      ahead: how many steps are dispatched before the metrics of one are read; 0 = each step is waited for.
      progress: the parts of the progress line between the step and the time that is left.
      panels: the diagrams of `curves.png`.
      memory: bytes that a step needs on each device beside the state, estimated, by name.
    """

    steps: int
    init_state: Callable[[], TrainState]
    abstract_state: TrainState
    collector: Collector
    train_step: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState], dict[str, float]] | None
    sample: Callable[[TrainState], list[dict[str, Any]]] | None
    flops_per_token: float
    finish: Callable[[TrainState], TrainState] | None = None
    stop: Callable[[dict[str, float], dict[str, float]], str] | None = None
    ahead: int = 1
    progress: tuple[ProgressField, ...] = ()
    panels: tuple[Panel, ...] = ()
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
