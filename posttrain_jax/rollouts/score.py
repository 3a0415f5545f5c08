"""From answers to one float32 score each: reward models, Python functions in worker processes, joined."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError, StepNotTaken
from posttrain_jax.core.masking import whiten_biased
from posttrain_jax.core.sharding import batch_sharding, jit_step, replicated
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.core.updates import map_micro_batches
from posttrain_jax.losses.reward import combine_scores_mean, combine_scores_min, combine_scores_uncertainty
from posttrain_jax.models.io.load import LoadedModel, load_members
from posttrain_jax.models.reward_head import scores
from posttrain_jax.models.transformer import Model
from posttrain_jax.rewards import combine
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.thoughts import prompt_opens_thought
from posttrain_jax.rewards.workers import PythonReward, RewardWorkers
from posttrain_jax.rollouts.draw import RolloutBatch, Rollouts, put_rollouts, shown_prompt

AGGREGATES = ("sum", "piecewise")
MISSING_EOS = ("keep", "replace", "penalize")


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """How the parts of a score become one number, in this order (the gain of `Scorer.normalize` after `aggregate`).

    Attributes:
      weights: of each component, by its name.
      aggregate: "sum" = the weighted sum; "piecewise" = Llama 2's choice between two reward models, the first for
        safety, the second for helpfulness (`combine.piecewise_safety`; a prompt is one of safety where its row's
        `is_safety` is true), which is whitened over an iteration's answers.
      safety_threshold: of "piecewise", a probability.
      free_tokens, per_token: this much is taken off for each token of an answer beyond so many (0 = off).
      clip: the score is brought into [-clip, clip] (0 = off).
      missing_eos: an answer without an end token "keep"s its score, has it "replace"d by `missing_eos_value`
        (Ziegler et al., Huang et al.: -1), or is "penalize"d by that much.
      missing_eos_value: see there.
    """

    weights: Mapping[str, float]
    aggregate: str = "sum"
    safety_threshold: float = 0.15
    free_tokens: int = 0
    per_token: float = 0.0
    clip: float = 0.0
    missing_eos: str = "keep"
    missing_eos_value: float = -1.0

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            raise InputError(f"score.aggregate is {self.aggregate!r}; use one of {', '.join(AGGREGATES)}.")
        if self.aggregate == "piecewise" and len(self.weights) != 2:
            raise InputError(
                "score.aggregate=piecewise chooses between a safety and a helpfulness reward, in this order; there are "
                f"{len(self.weights)}: {', '.join(self.weights) or 'none'}."
            )
        if self.aggregate == "piecewise" and not 0.0 < self.safety_threshold < 1.0:
            raise InputError(
                f"score.safety_threshold is {self.safety_threshold}; it is a probability between 0 and 1."
            )
        if self.missing_eos not in MISSING_EOS:
            raise InputError(
                f"score.missing_eos is {self.missing_eos!r}; use one of {', '.join(MISSING_EOS)}."
            )
        for name, value in self.weights.items():
            if not math.isfinite(value):
                raise InputError(f"score.weights gives {name} the weight {value}; write a finite number.")
        if not math.isfinite(self.missing_eos_value):
            raise InputError(f"score.missing_eos_value is {self.missing_eos_value}; write a finite number.")


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model, or an ensemble whose scores are joined by `combine_scores` (`[E, N]` to `[N]`)."""

    members: Sequence[LoadedModel]
    combine_scores: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What was made of N answers.

    Attributes:
      scores: float32 `[N]`.
      has_score: bool `[N]`, False where a function failed, so that the score stands for nothing: the answer is not
        learnt from. (An answer without an end whose score `missing_eos` replaces needs no function.)
      components: float32 `[N]` each, by name; `PythonReward.failure_score` where it failed.
      failed: bool `[N]` of each reward function, by name.
      errors: the first error of each function that failed, by name (in process 0).
    """

    scores: np.ndarray
    has_score: np.ndarray
    components: dict[str, np.ndarray]
    failed: dict[str, np.ndarray]
    errors: dict[str, str]

    @property
    def failures(self) -> dict[str, int]:
        """How many answers each reward function failed at, by name."""
        return {name: int(failed_N.sum()) for name, failed_N in self.failed.items()}

    @property
    def error(self) -> str:
        """The first of `errors`, or ""."""
        return next(iter(self.errors.values()), "")

    def require_scores(self) -> None:
        """Refuses scores of a reward function that gave none.

        Raises:
          StepNotTaken: a function failed at every answer; says the first error and its place.
        """
        for name, failed_N in self.failed.items():
            if failed_N.all():
                raise StepNotTaken(
                    f"The reward function {name} failed at all {failed_N.size} answers, the first time by: "
                    f"{self.errors.get(name, 'an error that process 0 names')}. Correct it, then start the run again; "
                    "it goes on where it stopped."
                )


class Scorer:
    """Scores rollouts; use `close` at the end.

    Args:
      tokenizer: the policy's.
      functions: Python rewards by name.
      models: reward models by name.
      options: how they are joined.
      mesh: where the models' parameters are.
      rows: how many a model scores at once, in `micro_batches` parts.
      micro_batches: see there.
      workers: processes for the functions.

    Raises:
      InputError: nothing that scores, or a reward model that reads other tokens than the policy writes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        functions: Mapping[str, PythonReward],
        models: Mapping[str, RewardModel],
        options: ScoreOptions,
        mesh: Mesh,
        rows: int,
        micro_batches: int,
        workers: int = 2,
    ) -> None:
        if not functions and not models:
            raise InputError("Nothing scores the answers; set score.functions or score.models.")
        for model in models.values():
            check_tokenizer(model.members[0], tokenizer)
        self._tokenizer = tokenizer
        self._functions = list(functions)
        self._models = dict(models)
        self._options = options
        self._mesh = mesh
        self._rows = rows
        self._micro_batches = micro_batches
        self._workers = RewardWorkers(functions, workers=workers) if functions else None
        self._gain, self._bias = 1.0, 0.0
        self.is_normalized = False

    def normalize(self, rollouts: Rollouts) -> tuple[float, float]:
        """From now on joined scores are gain * score + bias, so that these answers' have mean 0 and variance 1 (Ziegler
        et al., arXiv:1909.08593, section 2.1: samples of the policy at the start); says (gain, bias). Answers that a
        function failed at are left out.

        Raises:
          InputError: they all have the same score, or none has one.
        """
        components, failed, errors = self._components(rollouts)
        joined = np.asarray(self._joined(components, rollouts), np.float64)[~_any(failed, rollouts)]
        if not joined.size:
            raise InputError(
                f"score.normalize cannot be used: a reward function failed at every answer of the policy at the start; "
                f"first: {next(iter(errors.values()), '')}"
            )
        if not joined.std() > 0:
            raise InputError(
                f"score.normalize cannot be used: {joined.size} answers of the policy at the start all have the score "
                f"{joined.mean():g}."
            )
        self.normalization = (float(1.0 / joined.std()), float(-joined.mean() / joined.std()))
        return self.normalization

    @property
    def normalization(self) -> tuple[float, float]:
        """Gain and bias, 1 and 0 until `normalize` finds them; set again where a run goes on (then `is_normalized`)."""
        return self._gain, self._bias

    @normalization.setter
    def normalization(self, gain_and_bias: Sequence[float]) -> None:
        self._gain, self._bias = gain_and_bias
        self.is_normalized = True

    def __call__(self, rollouts: Rollouts, *, training: bool) -> Scored:
        """Every answer's score; what is relative to the other answers (whitening) is done for `training` alone.

        Raises:
          InputError: a reward model whose scores are not finite.
        """
        components, failed, errors = self._components(rollouts)
        score = jnp.float32(self._gain) * self._joined(components, rollouts) + jnp.float32(self._bias)
        has_score = ~_any(failed, rollouts)
        if training and self._options.aggregate == "piecewise":
            score = whiten_biased(score, jnp.asarray(has_score), shift_mean=True)
        if self._options.missing_eos == "replace":
            has_score = has_score | ~rollouts.ended
        return Scored(self._shaped(score, rollouts), has_score, components, failed, errors)

    def _components(
        self, rollouts: Rollouts
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
        """Scores by name, where functions failed by name, and the first error of each."""
        components: dict[str, np.ndarray] = {}
        failed: dict[str, np.ndarray] = {}
        errors: dict[str, str] = {}
        if self._workers is not None:
            components, failed, errors = self._by_functions(self._workers, rollouts)
        for name, reward in self._models.items():
            found_EN = np.stack([self._by_model(member, rollouts) for member in reward.members])
            found_N = np.asarray(reward.combine_scores(jnp.asarray(found_EN)), np.float32)
            lost = int(np.sum(~np.isfinite(found_N)))
            if lost:
                raise InputError(
                    f"The reward model {name} gave {lost} of {found_N.size} answers a score that is not finite; was it "
                    "trained well?"
                )
            components[name] = found_N
        return components, failed, errors

    def _by_functions(
        self, workers: RewardWorkers, rollouts: Rollouts
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
        """Scores and failures by name, and (in process 0) first errors. Process 0 alone asks the functions and tells
        the others: asked twice, one that is short of time or that draws need not say the same, and processes that
        learn from unlike scores, or of which one stops, wait for each other for ever."""
        names = self._functions
        scores_FN = np.zeros((len(names), len(rollouts.answers)), np.float32)
        failed_FN = np.zeros(scores_FN.shape, bool)
        errors: dict[str, str] = {}
        if jax.process_index() == 0:
            found = workers.score(self._answers(rollouts))
            for place, name in enumerate(names):
                scores_FN[place] = found[name].scores_N
                failed_FN[place] = [failure is not None for failure in found[name].failures]
                if found[name].errors:
                    errors[name] = next(iter(found[name].errors.values()))
        if jax.process_count() > 1:
            scores_FN, failed_FN = multihost_utils.broadcast_one_to_all((scores_FN, failed_FN))
        return (
            {name: np.asarray(scores_N) for name, scores_N in zip(names, scores_FN, strict=True)},
            {name: np.asarray(failed_N) for name, failed_N in zip(names, failed_FN, strict=True)},
            errors,
        )

    def _by_model(self, member: LoadedModel, rollouts: Rollouts) -> np.ndarray:
        """Its score of every answer, `[N]`; the last rows are filled up, so that one program does them all."""
        found = []
        score = _scores(member.model, self._mesh)
        count = len(rollouts.answers)
        for first in range(0, count, self._rows):
            places = np.minimum(np.arange(first, first + self._rows), count - 1)
            part = rollouts.select(places)
            batch = put_rollouts(part, np.zeros(self._rows, np.float32), self._mesh, self._micro_batches)
            found.append(np.asarray(score(member.params, batch)))
        return np.concatenate(found)[:count]

    def _joined(self, components: Mapping[str, np.ndarray], rollouts: Rollouts) -> Array:
        options = self._options
        if options.aggregate == "sum":
            return combine.weighted_sum(components, options.weights)
        safety, helpfulness = (components[name] for name in options.weights)
        is_safety = np.asarray([prompt.row.get("is_safety") is True for prompt in rollouts.prompts])
        return combine.piecewise_safety(safety, helpfulness, is_safety, threshold=options.safety_threshold)

    def _shaped(self, score: Array, rollouts: Rollouts) -> np.ndarray:
        """Less the price of length, clipped, and with what a missing end costs."""
        options = self._options
        if options.per_token:
            lengths = np.asarray([answer.size for answer in rollouts.answers], np.float32)
            score = score + combine.length_penalty(
                lengths, free=options.free_tokens, per_token=options.per_token
            )
        if options.clip:
            score = combine.clip(score, low=-options.clip, high=options.clip)
        if options.missing_eos == "replace":
            score = combine.replace_unfinished(score, rollouts.ended, value=options.missing_eos_value)
        elif options.missing_eos == "penalize":
            score = combine.penalize_unfinished(score, rollouts.ended, penalty=options.missing_eos_value)
        return np.asarray(score, np.float32)

    def _answers(self, rollouts: Rollouts) -> list[Completion]:
        return [
            Completion(
                prompt=shown_prompt(prompt, self._tokenizer),
                prompt_ids=tuple(prompt.tokens.tolist()),
                text=text,
                token_ids=tuple(answer.tolist()),
                finish_reason="stop" if ended else "length",
                row=prompt.row,
                in_thought=prompt_opens_thought(self._tokenizer, prompt.tokens.tolist()),
            )
            for prompt, text, answer, ended in zip(
                rollouts.prompts,
                rollouts.texts(self._tokenizer),
                rollouts.answers,
                rollouts.ended.tolist(),
                strict=True,
            )
        ]

    def close(self) -> None:
        """Ends the worker processes."""
        if self._workers is not None:
            self._workers.close()


def _any(failed: Mapping[str, np.ndarray], rollouts: Rollouts) -> np.ndarray:
    """Where some function failed, bool `[N]`."""
    return np.any([np.zeros(len(rollouts.answers), bool), *failed.values()], axis=0)


def load_reward_model(
    name: str, *, combination: str, coefficient: float, mesh: Mesh, dtype: str, attention: str = "auto"
) -> RewardModel:
    """A reward model or an ensemble from a MODEL.

    Args:
      name: the MODEL.
      combination: of an ensemble: "mean", "min" or "uncertainty" (mean - coefficient * variance; arXiv:2310.02743).
      coefficient: of "uncertainty".
      mesh: where the parameters go.
      dtype: compute dtype.
      attention: as of `make_model`.

    Raises:
      InputError: no such model, one without a score head, an unknown combination.
    """
    combinations: dict[str, Callable[[Array], Array]] = {
        "mean": combine_scores_mean,
        "min": combine_scores_min,
        "uncertainty": functools.partial(combine_scores_uncertainty, coefficient=coefficient),
    }
    if combination not in combinations:
        raise InputError(f"score.ensemble is {combination!r}; use one of {', '.join(combinations)}.")
    return RewardModel(
        load_members(name, dtype=dtype, mesh=mesh, attention=attention), combinations[combination]
    )


def check_tokenizer(reward: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a reward model whose token ids mean other texts than the policy's.

    Raises:
      InputError: names both.
    """
    theirs = reward.tokenizer
    if theirs is None or theirs.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"The reward model {reward.source.name} has another tokenizer ({_name(theirs)}) than the policy "
            f"({_name(tokenizer)}): the same ids are other texts; use one that was trained with the policy's tokenizer."
        )


def _name(tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return "none"
    return f"{tokenizer.name_or_path or type(tokenizer).__name__}, {len(tokenizer):,} tokens"


@functools.lru_cache(maxsize=8)
def _scores(model: Model, mesh: Mesh) -> Callable[[PyTree, RolloutBatch], Array]:
    return jit_step(
        functools.partial(_score_step, model=model),
        mesh,
        in_shardings=(None, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def _score_step(params: PyTree, batch: RolloutBatch, *, model: Model) -> Array:
    """The score at the last token of every row, `[N]`."""

    def of_rows(rows: RolloutBatch) -> Array:
        places = jnp.broadcast_to(jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None], rows.tokens.shape)
        output = model.apply(
            params, rows.tokens, segment_ids_BT=rows.segment_ids, positions_BT=places, logits=False
        )
        return scores(params["score_head"], output.hidden_BTD, rows.last_token_index)[:, 0]

    return map_micro_batches(of_rows, batch, jnp.int32(batch.tokens.shape[0])).reshape(-1)
