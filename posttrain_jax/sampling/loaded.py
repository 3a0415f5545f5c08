"""A model for use from Python: it chats, generates and scores. `posttrain_jax.load` returns one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast, overload

import jax
import numpy as np
from transformers import PreTrainedTokenizerFast

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.memory_maps import make_room
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.data.chat import Encoded, Encoder
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.data.formats import to_conversation
from posttrain_jax.data.sources import RowError
from posttrain_jax.data.tokenized_preferences import until_the_end
from posttrain_jax.models.io.load import LoadedModel, require_language_model, require_score_head
from posttrain_jax.models.reward_head import scores
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate
from posttrain_jax.sampling.prompts import encode_chat, encode_text
from posttrain_jax.sampling.shapes import bucket

Message = dict[str, Any]
PromptInput = str | Sequence[int] | np.ndarray | Sequence[Message]  # a text, token ids, or a conversation


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote.

    Attributes:
      text: without special tokens, and without the stop string that ended it; None where the model has no tokenizer.
      token_ids: with the stop token that ended it.
      logprobs: the model's own log-probability of each of them, nats; temperature and filters do not enter.
      finish_reason: "stop", or "length" (`max_new_tokens`, or the model's context is full).
      prompt: the index of its prompt in the list.
      sample: which of the prompt's `num_samples` it is.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt: int = 0
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class Loaded(LoadedModel):
    """A `LoadedModel` with methods that take texts and conversations, and stop at the model's own stop tokens."""

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Completion:
        """The assistant's next turn: `generate` for one conversation.

        Args:
          messages: objects with role and content, the last one the user's (or a tool's), for the chat template.
          tools, chat_template_kwargs: as in `generate`.

        Raises:
          InputError: as `generate`.
        """
        if not _is_conversation(messages):
            raise InputError(
                'messages must be a list of messages; write [{"role": "user", "content": "..."}], or use generate.'
            )
        (completion,) = self.generate(
            [messages],
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
        )
        return completion

    def generate(
        self,
        prompts: Sequence[PromptInput],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        num_samples: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        ignore_eos: bool = False,
        batch_size: int = 8,
    ) -> list[Completion]:
        """Completions, in the order of the prompts and then of their samples.

        Args:
          prompts: each a text (taken as it is, without the chat template), token ids, or the messages of a
            conversation (with the chat template).
          tools: descriptions of functions, for the chat template.
          chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}.
          max_new_tokens: most tokens of a completion; 0 gives empty ones.
          min_new_tokens: a stop token cannot be drawn before so many.
          num_samples: completions of each prompt.
          temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: how tokens are
            drawn, see `sampling.choose.Sampling`; temperature 0 takes the likeliest.
          stop: texts that end a completion, beside the model's own stop tokens (its EOS and its end of turn).
          seed: two calls with one seed draw the same; a completion depends on the seed, its prompt, the prompt's index
            and the number of the sample alone.
          ignore_eos: the model's own stop tokens do not end a completion.
          batch_size: completions decoded side by side.

        Raises:
          InputError: a reward model; a bad prompt or option; no chat template.
        """
        require_language_model(self)
        options = GenerateOptions(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop_token_ids=self.stop_token_ids,
            stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
            sampling=Sampling(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
            ),
            num_samples=num_samples,
            seed=seed,
            ignore_eos=ignore_eos,
            batch_size=batch_size,
        )
        if not _is_list(prompts) or not all(
            isinstance(prompt, str) or _is_list(prompt) for prompt in prompts
        ):
            raise InputError(
                "prompts must be a list of prompts, each a text, a list of token ids, or a list of messages."
            )
        chat = ChatOptions(variables=chat_template_kwargs or {})
        encoded = [self._encoded(prompt, f"prompt {n}", tools, chat) for n, prompt in enumerate(prompts)]
        samples = generate(self.model, self.params, encoded, options, tokenizer=self.tokenizer)
        return [self._completion(sample) for sample in samples]

    @overload
    def score(
        self,
        conversations: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 8,
    ) -> float: ...

    @overload
    def score(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 8,
    ) -> list[float]: ...

    def score(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 8,
    ) -> float | list[float]:
        """A reward model's score of the assistant's last turn, read at the token that ends it, as in training.

        Args:
          conversations: messages, the last one the assistant's; or a list of such conversations.
          tools, chat_template_kwargs: as in `generate`, for all of them.
          batch_size: conversations scored together.

        Returns:
          The score of the conversation, or one score for each conversation of the list.

        Raises:
          InputError: a language model; no chat template; something that is no conversation, a conversation that does
            not end with an assistant's turn, or one that is too long for the model.
        """
        require_score_head(self)
        chat = ChatOptions(variables=chat_template_kwargs or {})
        encoder = Encoder(self._chat_tokenizer(), train_on="last_turn", chat=chat)
        tool_list = None if tools is None else list(tools)
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
        if _is_conversation(conversations):
            rows = [_encoded_conversation(conversations, "the conversation", tool_list, self, encoder)]
            return self._scores(rows, 1)[0]
        if not _is_list(conversations):
            raise InputError("conversations must be a list of messages, or a list of such lists.")
        rows = [
            _encoded_conversation(messages, f"conversation {n}", tool_list, self, encoder)
            for n, messages in enumerate(conversations)
        ]
        return self._scores(rows, batch_size)

    def _scores(self, rows: Sequence[np.ndarray], batch_size: int) -> list[float]:
        all_scores: list[float] = []
        make_room()
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            shape = (batch_size, bucket(max(row.size for row in part)))
            tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            for index, row in enumerate(part):
                tokens[index, : row.size], segments[index, : row.size] = row, 1
            last_token_index = np.maximum(segments.sum(axis=1, keepdims=True) - 1, 0)
            all_scores += _score(self.params, tokens, segments, last_token_index, model=self.model)[
                : len(part)
            ].tolist()
        return all_scores

    def _encoded(
        self, prompt: PromptInput, name: str, tools: Sequence[dict[str, Any]] | None, chat: ChatOptions
    ) -> np.ndarray:
        try:
            if isinstance(prompt, str):
                return encode_text(self._tokenizer(), prompt)
            if _is_conversation(prompt):
                return encode_chat(self._chat_tokenizer(), cast(Any, prompt), tools=tools, chat=chat)
            return np.asarray(prompt)  # `generate` checks it
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        except ValueError as error:
            raise InputError(f"{name} holds lists of unlike lengths; token ids are whole numbers.") from error

    def _completion(self, sample: Sample) -> Completion:
        sample.check_finite(f"prompt {sample.prompt}")
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(sample.tokens, skip_special_tokens=True)[: sample.stop_at]
        return Completion(
            text=text,
            token_ids=sample.tokens.tolist(),
            logprobs=sample.logprobs.tolist(),
            finish_reason=sample.finish_reason,
            prompt=sample.prompt,
            sample=sample.sample,
        )

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        if self.tokenizer is None:
            raise InputError(f"{self.source.name} has no tokenizer; give token ids.")
        return self.tokenizer

    def _chat_tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise InputError(
                f"{self.source.name} has no chat template (it is a base model), so it takes no conversations; give "
                "texts to generate, or set loaded.tokenizer.chat_template."
            )
        return tokenizer


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _is_conversation(value: Any) -> bool:
    return _is_list(value) and len(value) > 0 and all(isinstance(message, dict) for message in value)


def _encoded_conversation(
    messages: Any, name: str, tools: list[dict[str, Any]] | None, loaded: LoadedModel, encoder: Encoder
) -> np.ndarray:
    """A conversation's tokens up to the one that ends the assistant's last turn.

    Raises:
      InputError: names the conversation.
    """
    try:
        if not _is_conversation(messages):
            raise RowError("messages", "is no list of messages")
        conversation = to_conversation({"messages": list(messages), "tools": tools})
        if conversation.messages[-1]["role"] != "assistant":
            raise RowError("the last message", "is not the assistant's, and it is what is scored")
        encoded = encoder.encode([conversation])[0]
        if not isinstance(encoded, Encoded):
            raise encoded
    except RowError as error:
        raise InputError(f"{name}: {error.column} {error.reason}.") from error
    tokens = until_the_end(encoded).tokens
    if tokens.size > loaded.config.max_length:
        raise InputError(
            f"{name} has {tokens.size} tokens, more than the {loaded.config.max_length} that {loaded.source.name} was "
            "made for."
        )
    return tokens


@functools.partial(jax.jit, static_argnames=("model",))
def _score(
    params: PyTree, tokens_BT: Array, segments_BT: Array, last_token_index_B1: Array, *, model: Model
) -> Array:
    output = model.apply(params, tokens_BT, segment_ids_BT=segments_BT, logits=False)
    return scores(params["score_head"], output.hidden_BTD, last_token_index_B1)[:, 0]
