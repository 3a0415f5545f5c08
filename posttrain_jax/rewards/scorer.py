"""From completions to one float32 score each: reward models and Python functions in worker processes, aggregated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError, StepNotTaken, shown
from posttrain_jax.core.masking import whiten_biased
from posttrain_jax.core.sharding import jit_step, replicated
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.data.rows import as_boolean
from posttrain_jax.forward.packed_rows import PackedRows, every_index, hidden_states, map_rows, pack_indices
from posttrain_jax.models.io.load import LoadedModel, load_members
from posttrain_jax.models.reward_head import scores
from posttrain_jax.models.transformer import Model
from posttrain_jax.rewards import combine
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.ensemble import Ensemble
from posttrain_jax.rewards.score_options import ScoreOptions
from posttrain_jax.rewards.workers import PythonReward, RewardWorkers


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model (an ensemble of one), or an ensemble."""

    members: Sequence[LoadedModel]
    ensemble: Ensemble


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of N completions.

    Attributes:
      scores: float32 `[N]`.
      has_score: bool `[N]`, False where a function failed, so that the score means nothing: the completion is
        not learned from. (A completion without EOS whose score `missing_eos` replaces needs no function.)
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
        """How many completions each reward function failed at, by name."""
        return {name: int(failed_N.sum()) for name, failed_N in self.failed.items()}

    @property
    def error(self) -> str:
        """The first of `errors`, or ""."""
        return next(iter(self.errors.values()), "")

    def require_scores(self) -> None:
        """Refuses scores of a reward function that gave none.

        Raises:
          StepNotTaken: a function failed at every completion, or no completion has a score of all functions; says the
            first error and its place.
        """
        for name, failed_N in self.failed.items():
            if failed_N.all():
                raise StepNotTaken(
                    f"The reward function {name} failed at all {failed_N.size} completions, the first time by: "
                    f"{self.errors.get(name, 'an error that process 0 names')}. Correct it, then start the run again; "
                    "it goes on where it stopped."
                )
        if self.has_score.size and not self.has_score.any():
            raise StepNotTaken(
                f"Some reward function failed at every one of {self.has_score.size} completions, the first time by: "
                f"{self.error or 'an error that process 0 names'}. Correct it, then start the run again; it goes on "
                "where it stopped."
            )


class Scorer:
    """Scores completions; use `close` at the end.

    Args:
      tokenizer: the policy's.
      functions: Python rewards by name.
      models: reward models by name.
      options: how they are joined.
      mesh: where the models' parameters are.
      micro_rows, row_length: packed rows that a model reads at once, and their tokens.

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
        micro_rows: int,
        row_length: int,
    ) -> None:
        if not functions and not models:
            raise InputError("Nothing scores the completions; set score.functions or score.models.")
        for model in models.values():
            check_tokenizer(model.members[0], tokenizer)
        self._functions = list(functions)
        self._models = dict(models)
        self._options = options
        self._mesh = mesh
        self._micro_rows = micro_rows
        self._row_length = row_length
        self._workers = RewardWorkers(functions, workers=options.workers) if functions else None
        self._gain, self._bias = 1.0, 0.0
        self.is_normalized = False

    def normalize(self, completions: Sequence[Completion]) -> tuple[float, float]:
        """From now on joined scores are gain * score + bias, so that these completions' have mean 0 and variance 1
        (Ziegler et al., arXiv:1909.08593, section 2.1: samples of the policy at the start); returns (gain, bias).
        Completions that a function failed at are left out.

        Raises:
          InputError: they all have the same score, or none has one.
        """
        components, failed, errors = self._components(completions)
        joined = np.asarray(self._joined(components, completions), np.float64)[
            ~_any(failed, len(completions))
        ]
        if not joined.size:
            raise InputError(
                "score.normalize cannot be used: a reward function failed at every completion of the policy at the "
                f"start; first: {next(iter(errors.values()), '')}"
            )
        if not joined.std() > 0:
            raise InputError(
                f"score.normalize cannot be used: {joined.size} completions of the policy at the start all have the "
                f"score {joined.mean():g}."
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

    def __call__(self, completions: Sequence[Completion], *, training: bool) -> Scored:
        """Every completion's score; what is relative to the other completions (whitening) is done for `training` alone.

        Raises:
          InputError: a reward model whose scores are not finite.
        """
        components, failed, errors = self._components(completions)
        score = jnp.float32(self._gain) * self._joined(components, completions) + jnp.float32(self._bias)
        has_score = ~_any(failed, len(completions))
        if training and self._options.aggregate == "piecewise":
            score = whiten_biased(score, jnp.asarray(has_score), shift_mean=True)
        if self._options.missing_eos == "replace":
            has_score = has_score | ~_ended(completions)
        return Scored(self._shaped(score, completions), has_score, components, failed, errors)

    def _components(
        self, completions: Sequence[Completion]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
        """Scores by name, where functions failed by name, and the first error of each."""
        components: dict[str, np.ndarray] = {}
        failed: dict[str, np.ndarray] = {}
        errors: dict[str, str] = {}
        if self._workers is not None:
            components, failed, errors = self._by_functions(self._workers, completions)
        for name, reward in self._models.items():
            members = [self._by_model(member, completions) for member in reward.members]
            scores_N = np.asarray(reward.ensemble(np.stack(members, axis=-1)), np.float32)
            lost = int(np.sum(~np.isfinite(scores_N)))
            if lost:
                raise InputError(
                    f"The reward model {name} gave {lost} of {scores_N.size} completions a score that is not "
                    "finite; was it trained well?"
                )
            components[name] = scores_N
        return components, failed, errors

    def _by_functions(
        self, workers: RewardWorkers, completions: Sequence[Completion]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
        """Scores and failures by name, and (in process 0) first errors. Process 0 alone asks the functions and tells
        the others: asked twice, one that is short of time or that draws need not say the same, and processes that
        learn from unlike scores, or of which one stops, wait for each other for ever."""
        names = self._functions
        scores_FN = np.zeros((len(names), len(completions)), np.float32)
        failed_FN = np.zeros(scores_FN.shape, bool)
        errors: dict[str, str] = {}
        if jax.process_index() == 0:
            results = workers.score(list(completions))
            for place, name in enumerate(names):
                scores_FN[place] = results[name].scores_N
                failed_FN[place] = [failure is not None for failure in results[name].failures]
                if results[name].errors:
                    errors[name] = next(iter(results[name].errors.values()))
        if jax.process_count() > 1:
            scores_FN, failed_FN = multihost_utils.broadcast_one_to_all((scores_FN, failed_FN))
        return (
            {name: np.asarray(scores_N) for name, scores_N in zip(names, scores_FN, strict=True)},
            {name: np.asarray(failed_N) for name, failed_N in zip(names, failed_FN, strict=True)},
            errors,
        )

    def _by_model(self, member: LoadedModel, completions: Sequence[Completion]) -> np.ndarray:
        """Its score of every completion, `[N]`: at its last token.

        Equal completions are scored once: what bfloat16 gives depends on the place in a row, and RLOO compares them.
        """
        texts = [np.asarray([*one.prompt_ids, *one.token_ids], np.int32) for one in completions]
        lengths_N = np.asarray([text.size for text in texts])
        tokens_NS = np.zeros((len(texts), int(lengths_N.max())), np.int32)
        for number, text in enumerate(texts):
            tokens_NS[number, : text.size] = text
        first: dict[bytes, int] = {}
        scored_N = np.asarray([first.setdefault(text.tobytes(), number) for number, text in enumerate(texts)])
        indices_MRT = pack_indices(
            lengths_N,
            np.unique(scored_N),
            length=tokens_NS.shape[1],
            row_length=self._row_length,
            micro_batches=-(-len(texts) // self._micro_rows),
            micro_rows=self._micro_rows,
        )
        scores_NS = map_rows(
            _score_rows(member.model, self._mesh),
            member.params,
            tokens_NS,
            np.zeros_like(tokens_NS),
            indices_MRT,
            self._mesh,
        )
        return scores_NS[scored_N, lengths_N - 1]

    def _joined(self, components: Mapping[str, np.ndarray], completions: Sequence[Completion]) -> Array:
        options = self._options
        if options.aggregate == "sum":
            return combine.weighted_sum(components, options.weight_of)
        safety, helpfulness = (components[name] for name in options.names)
        is_safety = np.asarray([is_safety_prompt(one.row) for one in completions])
        return combine.piecewise_safety(safety, helpfulness, is_safety, threshold=options.safety_threshold)

    def _shaped(self, score: Array, completions: Sequence[Completion]) -> np.ndarray:
        """Less the penalty of length, clipped, and with what a missing EOS costs."""
        options = self._options
        if options.per_token:
            lengths = np.asarray([len(one.token_ids) for one in completions], np.float32)
            score = score + combine.length_penalty(
                lengths, free=options.free_tokens, per_token=options.per_token
            )
        if options.clip:
            score = combine.clip(score, low=-options.clip, high=options.clip)
        if options.missing_eos == "replace":
            score = combine.replace_unfinished(score, _ended(completions), value=options.missing_eos_value)
        elif options.missing_eos == "penalize":
            score = combine.penalize_unfinished(score, _ended(completions), penalty=options.missing_eos_value)
        return np.asarray(score, np.float32)

    def close(self) -> None:
        """Ends the worker processes."""
        if self._workers is not None:
            self._workers.close()


def _any(failed: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Where some function failed, bool `[N]`."""
    return np.any([np.zeros(count, bool), *failed.values()], axis=0)


def _ended(completions: Sequence[Completion]) -> np.ndarray:
    """Where a completion ended by itself, bool `[N]`."""
    return np.asarray([one.finish_reason == "stop" for one in completions])


def is_safety_prompt(row: Mapping[str, Any]) -> bool:
    """Whether the column `is_safety` says that the prompt is one of safety; null and no column say that it is none.

    Raises:
      InputError: the column holds something else than true or false, 1 or 0, or their text.
    """
    value = row.get("is_safety")
    is_safety = False if value is None else as_boolean(value)
    if is_safety is None:
        raise InputError(
            f"the column is_safety of the row {shown(row, 200)} holds {shown(value)}; write true or false there."
        )
    return is_safety


def load_reward_model(
    name: str, options: ScoreOptions, *, mesh: Mesh, dtype: str, attention: str = "auto"
) -> RewardModel:
    """A reward model or an ensemble from a MODEL.

    Args:
      name: the MODEL.
      options: how the scores of an ensemble's members become one.
      mesh: where the parameters go.
      dtype: compute dtype.
      attention: as of `make_model`.

    Raises:
      InputError: no such model, or one without a score head.
    """
    members = load_members(name, dtype=dtype, mesh=mesh, attention=attention)
    return RewardModel(members, Ensemble(options.ensemble, options.coefficient))


def check_tokenizer(model: LoadedModel, tokenizer: PreTrainedTokenizerBase, *, what: str = "") -> None:
    """Refuses a model beside the policy whose token ids mean other texts than the policy's.

    Args:
      model: a reward model, a value network, a reference.
      tokenizer: the policy's.
      what: it is, for the message; "" = a reward model.

    Raises:
      InputError: names both.
    """
    theirs = model.tokenizer
    if theirs is None or theirs.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{what or f'The reward model {model.source.name}'} has another tokenizer ({_name(theirs)}) than the "
            f"policy ({_name(tokenizer)}): the same ids are other texts; use one that was trained with the policy's "
            "tokenizer."
        )


def _name(tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return "none"
    return f"{tokenizer.name_or_path or type(tokenizer).__name__}, {len(tokenizer):,} tokens"


@functools.lru_cache(maxsize=8)
def _score_rows(model: Model, mesh: Mesh) -> Callable[[PyTree, PackedRows], Array]:
    def step(params: PyTree, rows: PackedRows) -> Array:
        hidden_RTD = hidden_states(params, rows, model)
        return scores(params["score_head"], hidden_RTD, every_index(rows.tokens))

    return jit_step(step, mesh, in_shardings=None, out_shardings=replicated(mesh))
