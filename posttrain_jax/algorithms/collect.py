"""An iteration's first half: prompts -> answers from the engine -> a score each -> experience, and what is said of it.

The same answers and scores, without the learning, are the evaluation and the samples of a run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import Metric, Metrics, PyTree, TrainState
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.data.shown_row import empty_warning
from posttrain_jax.rollouts.draw import RolloutOptions, Rollouts, put_rollouts, roll_out, shown_prompt
from posttrain_jax.rollouts.experience import Experience, policy_params
from posttrain_jax.rollouts.score import Scored, Scorer
from posttrain_jax.sampling.engine import Engine
from posttrain_jax.sampling.score import Difference
from posttrain_jax.wiring.experiment import ModelSpec

EVAL_SEED = 2**31 - 1  # of the answers to held-out prompts, which no step draws with
NORMALIZE_SEED = 2**31 - 2  # of the answers that scores are normalized on
SAMPLED_PROMPTS = 16  # in `samples.jsonl`
REPEATED_TOKENS = 4  # n of the n-grams that `repetition` counts


@dataclasses.dataclass(frozen=True)
class Answered:
    """Answers, their scores, and how long both took."""

    rollouts: Rollouts
    scored: Scored
    seconds_generate: float
    seconds_score: float


@dataclasses.dataclass(frozen=True)
class Collector:
    """Answers prompts with a state's policy and makes experience of the answers.

    Attributes:
      policy: what answers (its parameters come with every call), and
      engine: what writes its answers, the same one for the whole run.
      options: how answers are drawn.
      row_length: T, of a prompt with its answer.
      scorer: what learning is rewarded by.
      mesh: of the devices.
      reference: a state -> the reference's parameters.
      experience: jitted `experience_of`: (whole parameters, beta, rows, reference's parameters).
      max_logp_difference: how far engine and trainer may be apart at a token, nats; 0 = any.
    """

    policy: ModelSpec
    engine: Engine
    options: RolloutOptions
    row_length: int
    scorer: Scorer
    mesh: Mesh
    reference: Callable[[TrainState], PyTree]
    experience: Callable[..., tuple[Experience, Metrics]]
    max_logp_difference: float

    def at_temperature(self, temperature: float) -> Collector:
        """The same with answers drawn at `temperature` (0 = the likeliest token); as it is where that is below 0."""
        if temperature < 0:
            return self
        return dataclasses.replace(self, options=dataclasses.replace(self.options, temperature=temperature))

    def roll_out(self, params: PyTree, prompts: Sequence[Prompt], seed: int) -> Rollouts:
        """Answers.

        Args:
          params: whole; the value network's are left aside.
          prompts: what is answered.
          seed: of the draws.
        """
        return roll_out(
            self.engine,
            self.policy.model,
            policy_params(params),
            prompts,
            self.options,
            row_length=self.row_length,
            seed=seed,
        )

    def answers(
        self, params: PyTree, prompts: Sequence[Prompt], seed: int, *, training: bool = False
    ) -> Answered:
        """Answers and their scores; `training` as in `Scorer`."""
        started = time.perf_counter()
        rollouts = self.roll_out(params, prompts, seed)
        drawn = time.perf_counter()
        scored = self.scorer(rollouts, training=training)
        return Answered(rollouts, scored, drawn - started, time.perf_counter() - drawn)

    def collect(
        self, state: TrainState, prompts: Sequence[Prompt], seed: int, micro_batches: int
    ) -> tuple[Experience, Metrics]:
        """What is learnt from, and what is said of it (see `rollouts/experience.py`; names without a prefix).

        Raises:
          StepNotTaken: a reward function failed at every answer.
          InputError: engine and trainer are further apart than `max_logp_difference`.
        """
        params = combine(state.params, state.frozen)
        answered = self.answers(params, prompts, seed, training=True)
        rollouts, scored = answered.rollouts, answered.scored
        scored.require_scores()
        if scored.error:
            log_on_host0(
                f"A reward function failed at {sum(scored.failures.values())} answers, which are not learnt from; "
                f"first: {scored.error}"
            )
        started = time.perf_counter()
        batch = put_rollouts(rollouts, scored.scores, self.mesh, micro_batches, has_score=scored.has_score)
        experience, metrics = self.experience(
            params, state.opt_state["kl_coefficient"], batch, self.reference(state)
        )
        jax.block_until_ready(experience)
        apart = metrics["sampler_logp_gap_per_token"]
        Difference(
            largest=float(metrics["sampler_logp_gap_max"].sum),
            mean=float(apart.sum) / max(float(apart.count), 1.0),
            tokens=int(apart.count),
        ).check(self.max_logp_difference)
        said = {
            f"score/{name}": _mean(values[~scored.failed[name]] if name in scored.failed else values)
            for name, values in scored.components.items()
        }
        said |= {f"failed/{name}": Metric.of(number) for name, number in scored.failures.items()}
        said |= {name: Metric.of(value) for name, value in _of_answers(rollouts).items()}
        said |= {
            "seconds_generate": Metric.of(answered.seconds_generate),
            "seconds_score": Metric.of(answered.seconds_score),
            "seconds_experience": Metric.of(time.perf_counter() - started),
        }
        if scored.has_score.any():
            said["score_std"] = Metric.of(scored.scores[scored.has_score].std())
        return experience, {**metrics, **said}


def _mean(values: np.ndarray) -> Metric:
    return Metric(jnp.float32(values.sum()), jnp.float32(values.size))


def _failures(scored: Scored) -> dict[str, float]:
    """How many held-out answers each reward function failed at; says the first error."""
    if scored.error:
        log_on_host0(
            f"A reward function failed at {sum(scored.failures.values())} held-out answers; first: {scored.error}"
        )
    return {f"eval/failed/{name}": float(number) for name, number in scored.failures.items()}


class Evaluation:
    """Answers to the same prompts at every evaluation, drawn with the same random numbers: once for the metrics and the
    samples of a step.

    Args:
      collector: writes and scores them.
      prompts: held out; or, where nothing is, some to show.
      gold: scores them too, and is never learnt from; or None.
    """

    def __init__(self, collector: Collector, prompts: Sequence[Prompt], gold: Scorer | None) -> None:
        self._collector = collector
        self._prompts = prompts
        self._gold = gold
        self._step = -1
        self._answered: Answered | None = None

    def _at(self, state: TrainState) -> Answered:
        if self._answered is None or int(state.step) != self._step:
            params = combine(state.params, state.frozen)
            self._answered = self._collector.answers(params, self._prompts, EVAL_SEED)
            self._step = int(state.step)
            if self._step == 0:  # said now, not after days; later a function may be out of reach for a while
                self._answered.scored.require_scores()
            texts = self._answered.rollouts.texts(self._collector.policy.tokenizer)
            warning = empty_warning(sum(not text.strip() for text in texts), len(texts))
            if warning:
                log_on_host0(warning)
        return self._answered

    def metrics(self, state: TrainState) -> dict[str, float]:
        """Scores; standard errors are over prompts, for the answers to one are not independent."""
        answered = self._at(state)
        rollouts, scored, count = answered.rollouts, answered.scored, len(self._prompts)
        values = _with_error("eval/score", scored.scores, count)
        values |= {f"eval/{name}": value for name, value in _of_answers(rollouts).items()}
        values["eval/completion_tokens"] = float(np.mean([answer.size for answer in rollouts.answers]))
        values |= {f"eval/score/{name}": float(found.mean()) for name, found in scored.components.items()}
        values |= _failures(scored)
        if self._gold is not None:
            gold = self._gold(rollouts, training=False)
            if self._step == 0:
                gold.require_scores()
            values |= _with_error("eval/gold", gold.scores, count) | _failures(gold)
        return values

    def samples(self, state: TrainState) -> list[dict[str, Any]]:
        """The first prompts with their answers and scores, for `samples.jsonl`."""
        answered = self._at(state)
        shown = min(SAMPLED_PROMPTS, len(self._prompts)) * self._collector.options.samples
        rollouts = answered.rollouts.select(np.arange(shown))
        tokenizer = self._collector.policy.tokenizer
        return [
            {
                "prompt": shown_prompt(prompt, tokenizer),
                "answer": text,
                "score": float(score),
                "finish_reason": "stop" if ended else "length",
                "tokens": int(answer.size),
            }
            for prompt, text, score, ended, answer in zip(
                rollouts.prompts,
                rollouts.texts(tokenizer),
                answered.scored.scores[:shown],
                rollouts.ended,
                rollouts.answers,
                strict=True,
            )
        ]


def _with_error(name: str, scores: np.ndarray, prompts: int) -> dict[str, float]:
    by_prompt = scores.reshape(prompts, -1).mean(axis=1)
    error = by_prompt.std() / max(prompts - 1, 1) ** 0.5
    return {name: float(scores.mean()), f"{name}_standard_error": float(error)}


def _of_answers(rollouts: Rollouts) -> dict[str, float]:
    """Share of answers without an end token, and their mean `repetition`."""
    return {
        "no_eos_share": float(1.0 - rollouts.ended.mean()),
        "repeated_4gram_share": float(np.mean([repetition(answer) for answer in rollouts.answers])),
    }


def repetition(tokens: np.ndarray) -> float:
    """The share of an answer's runs of 4 tokens that it had written before, between 0 and 1; 0 for a shorter one."""
    count = tokens.size - REPEATED_TOKENS + 1
    if count < 1:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, REPEATED_TOKENS)
    return 1.0 - len(np.unique(grams, axis=0)) / count
