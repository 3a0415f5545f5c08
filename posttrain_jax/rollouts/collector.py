"""Prompts -> trajectories from the engine -> a score each -> log-probabilities of the reference -> a packed batch.

What is sampled depends on the seed and the step alone, so a run that was killed, even while it was sampling, samples
the same trajectories again. Other ways to collect (refilling groups whose scores are all equal, environments of
several turns, sampling ahead with older weights) are collectors made of the same
parts: `Sampler`, `Scorer`, `BatchMaker`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import (
    CollectorState,
    Metric,
    Metrics,
    PyTree,
    RowStream,
    StepBatch,
    TrainState,
)
from posttrain_jax.data.prompts import Prompt, PromptData
from posttrain_jax.rewards.scorer import Scored, Scorer
from posttrain_jax.rewards.short_names import short_names
from posttrain_jax.rollouts.batch import BatchMaker
from posttrain_jax.rollouts.experience import policy_params
from posttrain_jax.rollouts.sampling import Sampler, completion_of
from posttrain_jax.rollouts.statistics import completion_metrics
from posttrain_jax.rollouts.trajectory import Trajectory
from posttrain_jax.run.batches import RowBatches

FORMAT = 2  # of a collector's state; before 2 it had none


@dataclasses.dataclass(frozen=True)
class Weights:
    """What samples: the policy's whole parameters, and the training step that they are of."""

    params: PyTree
    policy_step: int


def current_weights(state: TrainState) -> Weights:
    """Those that the step learns from: sampling on-policy."""
    return Weights(policy_params(combine(state.params, state.frozen)), int(state.step))


@dataclasses.dataclass(frozen=True)
class ScoredRollouts:
    """Trajectories with their scores, and how long both took."""

    trajectories: list[Trajectory]
    scored: Scored
    seconds_generate: float
    seconds_score: float


def rollouts(
    sampler: Sampler,
    scorer: Scorer,
    weights: Weights,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    training: bool,
    temperature: float | None = None,
) -> ScoredRollouts:
    """Samples completions of prompts and scores them; `training` as in `Scorer`, `temperature` as in `Sampler`."""
    started = time.perf_counter()
    trajectories = sampler.sample(
        weights.params, prompts, seed=seed, policy_step=weights.policy_step, temperature=temperature
    )
    sampled = time.perf_counter()
    completions = [completion_of(one, sampler.tokenizer) for one in trajectories]
    scored = scorer(completions, training=training)
    trajectories = [
        dataclasses.replace(one, score=float(score), has_score=bool(has_score))
        for one, score, has_score in zip(trajectories, scored.scores, scored.has_score, strict=True)
    ]
    return ScoredRollouts(trajectories, scored, sampled - started, time.perf_counter() - sampled)


class PolicyCollector:
    """The collector of algorithms that learn from the policy's own completions (core/types.py::Collector).

    Args:
      prompts: all that there are, and
      loader: which of them a step has.
      sampler: with the engine, one for the whole run.
      scorer: what learning is rewarded by.
      make_batch: from trajectories to the batch of a step.
      seed: of the run; what is sampled comes from it and the step.
      text: rows that are learned from beside the trajectories, a collector of its own; or None.
      gold: what evaluations score with and nothing is learned from, closed with the collector; or None.
      weights: a state -> what samples. The hook for sampling with older weights; `Trajectory.policy_step` says which.
    """

    def __init__(
        self,
        prompts: PromptData,
        loader: RowStream,
        sampler: Sampler,
        scorer: Scorer,
        make_batch: BatchMaker,
        *,
        seed: int,
        text: RowBatches | None = None,
        gold: Scorer | None = None,
        weights: Callable[[TrainState], Weights] = current_weights,
    ) -> None:
        self._prompts = prompts
        self._loader = loader
        self._sampler = sampler
        self._scorer = scorer
        self._make_batch = make_batch
        self._seed = seed
        self._text = text
        self._gold = gold
        self._weights = weights

    def next(self, state: TrainState) -> StepBatch:
        """An iteration's trajectories on the devices.

        Raises:
          StepNotTaken: a reward function failed at every completion.
        """
        rows = next(self._loader)
        prompts = [self._prompts.at(index) for index in rows.arrays["places"].tolist()]
        weights = self._weights(state)
        step = int(state.step)
        collected = rollouts(
            self._sampler,
            self._scorer,
            weights,
            prompts,
            seed=step_seed(self._seed, step),
            training=True,
        )
        scored = collected.scored
        scored.require_scores()
        if scored.error:
            log_on_host0(
                f"A reward function failed at {sum(scored.failures.values())} completions, which are not learned from; "
                f"first: {scored.error}"
            )
        text = self._text.next(state).batch if self._text is not None else {}
        batch, metrics = self._make_batch(collected.trajectories, state, text)
        metrics = {**_metrics(collected, step), **metrics}
        named = {f"train/{name}": metric for name, metric in metrics.items()}
        return StepBatch(batch, named, rows.row_ids)

    def normalize_scores(self, params: PyTree, count: int) -> None:
        """Finds gain and bias of scores on `count` completions of the starting policy, unless a checkpoint had them.

        Args:
          params: the policy's.
          count: at least so many, of prompts that are drawn, for files may be sorted (IMDb's training rows: first all
            the negative ones).
        """
        if not count or self._scorer.is_normalized:
            return
        number = min(-(-count // self._sampler.options.samples), len(self._prompts))
        drawn = np.random.default_rng(self._seed).choice(len(self._prompts), number, replace=False)
        every = self._prompts.all()
        prompts = [every[index] for index in np.sort(drawn).tolist()]
        trajectories = self._sampler.sample(params, prompts, seed=NORMALIZE_SEED, policy_step=0)
        completions = [completion_of(one, self._sampler.tokenizer) for one in trajectories]
        gain, bias = self._scorer.normalize(completions)
        log_on_host0(
            f"Scores are {gain:.6g} x score + {bias:.6g}: mean 0, variance 1 over {number:,} prompts."
        )

    def get_state(self) -> CollectorState:
        """Where prompts and text stand, and the normalization of scores: found again, on another mesh or with a reward
        that failed at a completion this time, it would be another one in the middle of a run."""
        values: dict[str, Any] = {"format": FORMAT, "prompts": self._loader.get_state()}
        if self._text is not None:
            values["text"] = self._text.get_state().values
        return CollectorState(values, {"normalization": np.asarray(self._scorer.normalization, np.float64)})

    def set_state(self, state: CollectorState) -> None:
        """Goes on where `get_state` was called.

        Raises:
          InputError: the state is an earlier version's, or the prompts are others.
        """
        if state.values.get("format") != FORMAT:
            raise InputError(
                "The checkpoint is in the middle of a run of an earlier version, whose rollouts this version does not "
                "continue; finish it with that version, or start again in a new --workdir (its model can still be "
                "loaded as model.init)."
            )
        self._loader.set_state(state.values["prompts"])
        if self._text is not None:
            self._text.set_state(CollectorState(state.values["text"]))
        self._scorer.normalization = tuple(state.arrays["normalization"].tolist())

    def close(self) -> None:
        """Ends the loaders' threads and the reward functions' processes."""
        self._loader.close()
        self._scorer.close()
        if self._text is not None:
            self._text.close()
        if self._gold is not None:
            self._gold.close()


NORMALIZE_SEED = 2**31 - 2  # of the completions that scores are normalized on, which no step samples with


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's completions, from the run's."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0] >> 1)


def _metrics(collected: ScoredRollouts, step: int) -> Metrics:
    """Of the scores' parts, of the completions, and where the time went; names without a prefix."""
    scored, trajectories = collected.scored, collected.trajectories
    short = short_names(list(scored.components))
    metrics = {
        f"score/{short[name]}": _mean(values[~scored.failed[name]] if name in scored.failed else values)
        for name, values in scored.components.items()
    }
    metrics |= {f"failed/{short[name]}": Metric.of(number) for name, number in scored.failures.items()}
    metrics |= {name: Metric.of(value) for name, value in completion_metrics(trajectories).items()}
    metrics |= {
        "staleness": _mean(np.asarray([step - one.policy_step for one in trajectories])),
        "seconds_generate": Metric.of(collected.seconds_generate),
        "seconds_score": Metric.of(collected.seconds_score),
    }
    if scored.has_score.any():
        metrics["score_std"] = Metric.of(scored.scores[scored.has_score].std())
    return metrics


def _mean(values: np.ndarray) -> Metric:
    return Metric(jnp.float32(values.sum()), jnp.float32(values.size))
