"""From prompts to trajectories: rows become token ids, and the engine completes them."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import check, setting
from posttrain_jax.core.types import PyTree
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.data.messages import describe_kind
from posttrain_jax.data.prompt_rows import SOURCES, encode_prompt_row, encode_text, read_prompt_row
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.data.rows import RowError
from posttrain_jax.models.transformer import Model
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.thoughts import answer_text, prompt_opens_thought
from posttrain_jax.rollouts.trajectory import Trajectory
from posttrain_jax.sampling.choose import Sampling, StaticSamplingOptions
from posttrain_jax.sampling.engine import Engine
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """The section `rollout` of a config: how completions are sampled.

    Attributes:
      stop_token_ids: a completion ends with one of these; no key, for it is the model's.
    """

    max_new_tokens: int = setting(64, "of a completion, the stop token included", unit="tokens", minimum=1)
    temperature: float = setting(
        1.0, "logits are divided by it wherever log-probabilities are computed", above=0
    )
    samples: int = setting(1, "completions per prompt", minimum=1)
    batch_size: int = setting(0, "completions sampled side by side; 0 = all")
    truncate_token: int = setting(
        -1,
        "a completion ends after the first of these (Ziegler et al.: 13, a full stop); -1 = off",
        minimum=-1,
    )
    truncate_after: int = setting(0, "but not within its first so many", unit="tokens")
    max_logp_difference: float = setting(
        0.0, "engine to trainer, at a token; more stops the run; 0 = off", unit="nats"
    )
    reference: str = setting(
        "auto",
        "what the KL is measured to: auto (where it is charged or watched, the policy at the start; else none), none, "
        "frozen (a second copy of the policy), adapter (LoRA off), ema (optim.ema's weights), or a MODEL",
    )
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(self, "rollout")
        if self.truncate_after and self.truncate_token < 0:
            raise InputError(
                f"rollout.truncate_after is {self.truncate_after}, but rollout.truncate_token names no token."
            )


def encode_prompt(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    text_tokens: int = 0,
    chat: ChatOptions = DEFAULT_CHAT,
) -> np.ndarray:
    """int32 ids of a row's prompt (`data.prompt_rows`), or of the beginning of its `text`, which is to be continued.

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
                "text", "is continued after its first data.prompt_tokens tokens, and that is not set"
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


class Sampler:
    """Samples completions with one engine for a whole run, greedy evaluations included: every call brings it the
    parameters, and nothing is compiled for it twice. Between two calls it holds no parameters and no cache.

    Args:
      model: the policy.
      tokenizer: the policy's.
      options: how completions are drawn.
      length: most tokens of a prompt with its completion.
      mesh: of the devices.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        options: RolloutOptions,
        *,
        length: int,
        mesh: Mesh,
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self._model = model
        self._engine = Engine(
            model,
            None,
            slots=options.batch_size,
            max_length=length,
            max_new_tokens=options.max_new_tokens,
            static_options=StaticSamplingOptions(draw=True),
            max_stop_tokens=len(options.stop_token_ids),
            mesh=mesh,
        )

    def sample(
        self,
        params: PyTree,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        policy_step: int,
        temperature: float | None = None,
    ) -> list[Trajectory]:
        """`options.samples` trajectories of every prompt, side by side. The same arguments give the same trajectories.

        Args:
          params: of the policy.
          prompts: what is completed.
          seed: of the random numbers.
          policy_step: the step of the training that `params` are of.
          temperature: None = that of the options; 0 = greedy.
        """
        options = self.options
        self._engine.load(params)
        samples = generate(
            self._model,
            params,
            [prompt.tokens for prompt in prompts],
            GenerateOptions(
                options.max_new_tokens,
                stop_token_ids=options.stop_token_ids,
                sampling=Sampling(temperature=options.temperature if temperature is None else temperature),
                num_samples=options.samples,
                seed=seed,
                batch_size=options.batch_size,
            ),
            names=[prompt.row_id for prompt in prompts],
            engine=self._engine,
        )
        self._engine.unload()
        _give_back_memory()
        return [
            trajectory_of(prompts[sample.prompt], sample, options, policy_step=policy_step)
            for sample in samples
        ]


def _give_back_memory() -> None:
    """Gives the heap's free memory back to the system. Arrays of a few megabytes, such as the engine's copy of the
    weights on a CPU, lie in glibc's heap, which keeps what they leave; what learning needs then comes on top. Does
    nothing with another C library or system."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def trajectory_of(prompt: Prompt, sample: Sample, options: RolloutOptions, *, policy_step: int) -> Trajectory:
    """What a sample of the engine is as a trajectory: truncated, its prompt before it."""
    completion, ended = truncate(
        sample.tokens,
        sample.finish_reason == "stop",
        token=options.truncate_token if options.truncate_token >= 0 else None,
        after=options.truncate_after,
    )
    before = np.zeros(prompt.tokens.size, np.int32)
    return Trajectory(
        prompt=prompt,
        tokens=np.concatenate([prompt.tokens, completion]),
        response_mask=np.concatenate([before, np.ones(completion.size, np.int32)]),
        sampler_logps=np.concatenate(
            [before.astype(np.float32), sample.sample_logprobs[: completion.size].astype(np.float32)]
        ),
        ended=ended,
        group=sample.prompt,
        policy_step=policy_step,
    )


def truncate(tokens: np.ndarray, ended: bool, *, token: int | None, after: int) -> tuple[np.ndarray, bool]:
    """The completion up to and with the first `token` that is not among its first `after` tokens, and whether it has
    one (Ziegler et al., arXiv:1909.08593: "." after 16 of 24); with `token` None the completion as it is."""
    if token is None:
        return tokens, ended
    indices = np.flatnonzero(tokens[after:] == token)
    return (tokens[: after + indices[0] + 1], True) if indices.size else (tokens, False)


def text_of(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> str:
    """The completion as text, without special tokens but those of a thought."""
    return answer_text(tokenizer, trajectory.response)


def completion_of(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Completion:
    """A trajectory as a reward sees it."""
    prompt = trajectory.prompt
    return Completion(
        prompt=shown_prompt(prompt, tokenizer),
        prompt_ids=tuple(prompt.tokens.tolist()),
        text=text_of(trajectory, tokenizer),
        token_ids=tuple(trajectory.response.tolist()),
        finish_reason="stop" if trajectory.ended else "length",
        row=prompt.row,
        in_thought=prompt_opens_thought(tokenizer, prompt.tokens.tolist()),
    )
