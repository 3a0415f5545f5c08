"""Answers drawn from the policy, and the rows they make: what PPO and its relatives learn from.

A rollout's row is the prompt and the answer, padded on the right, so that the position of a token is its place. All
that belongs to a token of the answer (its log-probability, its value, its reward) stands at the place that predicts it,
one to the left of the token: there the hidden state is the state, and the token the action.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.sharding import batch_sharding
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.data.messages import describe_kind
from posttrain_jax.data.prompt_rows import SOURCES, encode_prompt_row, encode_text, read_prompt_row
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.data.rows import RowError
from posttrain_jax.models.transformer import Model
from posttrain_jax.rewards.thoughts import answer_text
from posttrain_jax.sampling.choose import Needs, Sampling
from posttrain_jax.sampling.engine import Engine
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How answers are drawn.

    Attributes:
      max_new_tokens: most tokens of an answer, the stop token included.
      temperature: logits are divided by it, here and wherever log-probabilities are computed.
      samples: answers per prompt.
      batch_size: answers written side by side.
      stop_token_ids: an answer ends with one of these.
      truncate_token: an answer is cut after the first of these (Ziegler et al.: 13, "."); None = off.
      truncate_after: but not within this many of its first tokens (16).
    """

    max_new_tokens: int
    temperature: float
    samples: int
    batch_size: int
    stop_token_ids: tuple[int, ...]
    truncate_token: int | None = None
    truncate_after: int = 0


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """N answers as rows of T tokens, on the host; the answers to one prompt lie side by side.

    Attributes:
      prompts: what each row answers.
      answers: its token ids, stop token included, after truncation.
      ended: `[N]` bool: by a stop token (or by the token that it is truncated at), not by the limit.
      tokens: `[N, T]` int32.
      segment_ids: `[N, T]` int32, 1 where there is a token.
      response_mask: `[N, T]` int32, 1 at the places that predict a token of the answer.
      sampler_logps: `[N, T]` float32 at these places: under the distribution that the token was drawn from.
      last_token_index: `[N]` int32, the place of the last token.
    """

    prompts: list[Prompt]
    answers: list[np.ndarray]
    ended: np.ndarray
    tokens: np.ndarray
    segment_ids: np.ndarray
    response_mask: np.ndarray
    sampler_logps: np.ndarray
    last_token_index: np.ndarray

    def select(self, rows: np.ndarray) -> Rollouts:
        """Some of the rows."""
        return Rollouts(
            prompts=[self.prompts[row] for row in rows.tolist()],
            answers=[self.answers[row] for row in rows.tolist()],
            ended=self.ended[rows],
            tokens=self.tokens[rows],
            segment_ids=self.segment_ids[rows],
            response_mask=self.response_mask[rows],
            sampler_logps=self.sampler_logps[rows],
            last_token_index=self.last_token_index[rows],
        )

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The answers as text, without special tokens but those of a thought."""
        return [answer_text(tokenizer, answer) for answer in self.answers]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Rollouts on the devices: `[M, B, T]`, and `[M, B, 1]` for what a row has one of. See `Rollouts`; `has_score` is 0
    where a reward function failed, so that `scores` says nothing."""

    tokens: Array
    segment_ids: Array
    response_mask: Array
    sampler_logps: Array
    last_token_index: Array
    scores: Array
    has_score: Array


def encode_prompt(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    text_tokens: int = 0,
    chat: ChatOptions = DEFAULT_CHAT,
) -> np.ndarray:
    """int32 ids of a row's prompt (`data.prompt_rows`), or of the beginning of its `text`, which is to be gone on from.

    Args:
      row: its columns.
      tokenizer: the policy's.
      vocab_size: of the policy: ids are below it.
      text_tokens: how many tokens of a `text` are the prompt (0 = such rows are refused).
      chat: how chats become text.

    Raises:
      RowError: it has none of them, or more than one (a `text` beside a prompt is a column like others).
      InputError: no chat template.
    """
    if row.get("text") is not None and not any(row.get(name) is not None for name in SOURCES):
        if not isinstance(row["text"], str):
            raise RowError("text", f"is {describe_kind(row['text'])}, not text")
        if not text_tokens:
            raise RowError(
                "text", "is gone on from after its first data.prompt_tokens tokens, and that is not set"
            )
        return encode_text(tokenizer, row["text"])[:text_tokens]
    tokens = encode_prompt_row(read_prompt_row(row, text_as=chat.text_as, travels=True), tokenizer, chat)
    unknown = tokens[tokens >= vocab_size]
    if unknown.size:
        raise RowError("prompt_ids", f"has the token {unknown[0]}, and the policy has {vocab_size:,}")
    return tokens


def shown_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A prompt as rewards and readers see it: its messages, or its text."""
    return prompt.row.get("messages") or prompt.row.get("prompt") or tokenizer.decode(prompt.tokens)


def rollout_engine(model: Model, options: RolloutOptions, *, row_length: int, mesh: Mesh) -> Engine:
    """The engine of a whole run, greedy evaluation included: `roll_out` brings it each step's parameters, and nothing
    is compiled for it twice."""
    return Engine(
        model,
        None,
        slots=options.batch_size,
        places=row_length,
        new_tokens=options.max_new_tokens,
        needs=Needs(draw=True),
        stop_width=len(options.stop_token_ids),
        mesh=mesh,
    )


def roll_out(
    engine: Engine,
    model: Model,
    params: PyTree,
    prompts: Sequence[Prompt],
    options: RolloutOptions,
    *,
    row_length: int,
    seed: int,
) -> Rollouts:
    """Draws `options.samples` answers to every prompt. The same arguments give the same answers.

    Args:
      engine: see `rollout_engine`. Between two calls it holds no parameters and no cache.
      model, params: the policy.
      prompts: what is answered.
      options: how.
      row_length: T, at least the longest prompt and `max_new_tokens` together.
      seed: of the draws.
    """
    engine.load(params)
    samples = generate(
        model,
        params,
        [prompt.tokens for prompt in prompts],
        GenerateOptions(
            options.max_new_tokens,
            stop_token_ids=options.stop_token_ids,
            sampling=Sampling(temperature=options.temperature),
            num_samples=options.samples,
            seed=seed,
            batch_size=options.batch_size,
        ),
        names=[prompt.row_id for prompt in prompts],
        engine=engine,
    )
    engine.unload()
    _give_back_memory()
    return as_rows([prompts[sample.prompt] for sample in samples], samples, options, row_length)


def _give_back_memory() -> None:
    """Gives the heap's free memory back to the system. Arrays of a few megabytes, such as the engine's copy of the
    weights on a CPU, lie in glibc's heap, which keeps what they leave; what learning needs then comes on top. Does
    nothing with another C library or system."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def as_rows(
    prompts: list[Prompt], samples: Sequence[Sample], options: RolloutOptions, row_length: int
) -> Rollouts:
    """Samples (and the prompt of each) as rows."""
    shape = (len(samples), row_length)
    tokens, segments, response_mask = (np.zeros(shape, np.int32) for _ in range(3))
    sampler_logps = np.zeros(shape, np.float32)
    answers, ended = [], []
    for n, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        answer, end = truncate(
            sample.tokens,
            sample.finish_reason == "stop",
            token=options.truncate_token,
            after=options.truncate_after,
        )
        first, last = prompt.tokens.size, prompt.tokens.size + answer.size
        tokens[n, :first], tokens[n, first:last] = prompt.tokens, answer
        segments[n, :last] = 1
        response_mask[n, first - 1 : last - 1] = 1
        sampler_logps[n, first - 1 : last - 1] = sample.sample_logprobs[: answer.size]
        answers.append(answer)
        ended.append(end)
    return Rollouts(
        prompts=prompts,
        answers=answers,
        ended=np.asarray(ended),
        tokens=tokens,
        segment_ids=segments,
        response_mask=response_mask,
        sampler_logps=sampler_logps,
        last_token_index=segments.sum(axis=1, dtype=np.int32) - 1,
    )


def truncate(tokens: np.ndarray, ended: bool, *, token: int | None, after: int) -> tuple[np.ndarray, bool]:
    """The answer up to and with the first `token` that is not among its first `after` tokens, and whether it has one
    (Ziegler et al., arXiv:1909.08593: "." after 16 of 24); with `token` None the answer as it is."""
    if token is None:
        return tokens, ended
    places = np.flatnonzero(tokens[after:] == token)
    return (tokens[: after + places[0] + 1], True) if places.size else (tokens, False)


def put_rollouts(
    rollouts: Rollouts,
    scores: np.ndarray,
    mesh: Mesh,
    micro_batches: int,
    *,
    has_score: np.ndarray | None = None,
) -> RolloutBatch:
    """The rows on the devices, in their order over the whole mesh, wherever it has a process's devices (on a TPU slice
    they are not neighbors). Every process has all of them and gives what its devices hold.

    Args:
      rollouts: N rows; `micro_batches` times the devices that split rows divides N.
      scores: float32 `[N]`.
      mesh: of the devices.
      micro_batches: M.
      has_score: bool `[N]`; None = all have one.
    """
    if has_score is None:
        has_score = np.ones(len(scores), bool)
    sharding = batch_sharding(mesh)

    def put(rows: np.ndarray) -> Array:
        rows = rows[:, None] if rows.ndim == 1 else rows
        whole = rows.reshape(micro_batches, -1, rows.shape[-1])
        return jax.make_array_from_callback(whole.shape, sharding, lambda place: whole[place])

    return RolloutBatch(
        tokens=put(rollouts.tokens),
        segment_ids=put(rollouts.segment_ids),
        response_mask=put(rollouts.response_mask),
        sampler_logps=put(rollouts.sampler_logps),
        last_token_index=put(rollouts.last_token_index),
        scores=put(scores.astype(np.float32)),
        has_score=put(has_score.astype(np.int32)),
    )
