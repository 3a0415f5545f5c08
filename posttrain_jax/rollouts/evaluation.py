"""The evaluation of a policy that samples: completions of held-out prompts, their scores, and samples to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.types import TrainState
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.data.shown_row import empty_warning
from posttrain_jax.rewards.scorer import Scored, Scorer
from posttrain_jax.rewards.short_names import short_names
from posttrain_jax.rollouts.collector import ScoredRollouts, current_weights, rollouts
from posttrain_jax.rollouts.sampling import Sampler, completion_of, shown_prompt, text_of
from posttrain_jax.rollouts.statistics import completion_metrics

EVAL_SEED = 2**31 - 1  # of the completions of held-out prompts, which no step samples with
SAMPLED_PROMPTS = 16  # in `samples.jsonl`


class Evaluation:
    """Completions of the same prompts at every evaluation, sampled with the same random numbers: once for the metrics
    and the samples of a step.

    Args:
      sampler: writes them.
      scorer: scores them.
      prompts: held out; or, where nothing is, some to show.
      gold: scores them too, and is never learned from; or None.
      temperature: of the sampling, 0 = greedy; None = that of the training.
    """

    def __init__(
        self,
        sampler: Sampler,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        *,
        gold: Scorer | None,
        temperature: float | None,
    ) -> None:
        self._sampler = sampler
        self._scorer = scorer
        self._prompts = prompts
        self._gold = gold
        self._temperature = temperature
        self._step = -1
        self._latest: ScoredRollouts | None = None

    def _at(self, state: TrainState) -> ScoredRollouts:
        if self._latest is None or int(state.step) != self._step:
            self._latest = rollouts(
                self._sampler,
                self._scorer,
                current_weights(state),
                self._prompts,
                seed=EVAL_SEED,
                training=False,
                temperature=self._temperature,
            )
            self._step = int(state.step)
            if self._step == 0:  # at once, not after days; later a function may be out of reach for a while
                self._latest.scored.require_scores()
            texts = [text_of(one, self._sampler.tokenizer) for one in self._latest.trajectories]
            warning = empty_warning(sum(not text.strip() for text in texts), len(texts))
            if warning:
                log_on_host0(warning)
        return self._latest

    def metrics(self, state: TrainState) -> dict[str, float]:
        """Scores; standard errors are over prompts, for the completions of one are not independent."""
        latest = self._at(state)
        scored, count = latest.scored, len(self._prompts)
        values = _with_error("eval/score", scored.scores, count)
        values |= {f"eval/{name}": value for name, value in completion_metrics(latest.trajectories).items()}
        values["eval/completion_tokens"] = float(np.mean([one.response.size for one in latest.trajectories]))
        short = short_names(list(scored.components))
        values |= {
            f"eval/score/{short[name]}": float(part.mean()) for name, part in scored.components.items()
        }
        values |= _failures(scored)
        if self._gold is not None:
            completions = [completion_of(one, self._sampler.tokenizer) for one in latest.trajectories]
            gold = self._gold(completions, training=False)
            if self._step == 0:
                gold.require_scores()
            values |= _with_error("eval/gold", gold.scores, count) | _failures(gold)
        return values

    def samples(self, state: TrainState) -> list[dict[str, Any]]:
        """The first prompts with their completions and scores, for `samples.jsonl`."""
        tokenizer = self._sampler.tokenizer
        shown = min(SAMPLED_PROMPTS, len(self._prompts)) * self._sampler.options.samples
        return [
            {
                "prompt": shown_prompt(one.prompt, tokenizer),
                "completion": text_of(one, tokenizer),
                "score": one.score,
                "finish_reason": "stop" if one.ended else "length",
                "tokens": int(one.response.size),
            }
            for one in self._at(state).trajectories[:shown]
        ]


def _failures(scored: Scored) -> dict[str, float]:
    """How many held-out completions each reward function failed at; says the first error."""
    if scored.error:
        mean = scored.scores[scored.has_score].mean() if scored.has_score.any() else float("nan")
        log_on_host0(
            f"A reward function failed at {sum(scored.failures.values())} held-out completions, which count with "
            f"score.failure in the mean (without them it is {mean:.4g}); first: {scored.error}"
        )
    short = short_names(list(scored.components))
    return {f"eval/failed/{short[name]}": float(number) for name, number in scored.failures.items()}


def _with_error(name: str, scores: np.ndarray, prompts: int) -> dict[str, float]:
    by_prompt = scores.reshape(prompts, -1).mean(axis=1)
    error = by_prompt.std() / max(prompts - 1, 1) ** 0.5
    return {name: float(scores.mean()), f"{name}_standard_error": float(error)}
