"""From a checked body to requests for the engine: prompts as tokens, limits, seeds and sampling options."""

from __future__ import annotations

import dataclasses
import secrets

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.sampling.choose import Sampling, StaticSamplingOptions
from posttrain_jax.sampling.prompts import encode_chat, encode_text, split_stops
from posttrain_jax.sampling.requests import Request
from posttrain_jax.serving.bodies import GREEDY_BELOW, Body, ChatBody, CompletionBody
from posttrain_jax.serving.token_text import Vocabulary


@dataclasses.dataclass(frozen=True)
class Limits:
    """What this server can do.

    Attributes:
      max_length: most tokens of prompt and completion together.
      vocab_size: token ids are below it.
      alternatives: most log-probabilities beside each token.
      completions: most completions of one HTTP request, scored prompts included.
      stop_token_ids: the model's own stop tokens.
      characters: a longer text has more than `max_length` tokens.
      control_tokens: whether a control token's text in a message becomes that token.
    """

    max_length: int
    vocab_size: int
    alternatives: int
    completions: int
    stop_token_ids: tuple[int, ...]
    characters: int
    control_tokens: bool = False


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's token ids, and with `echo` its text.

    `silent` is how many of the first tokens are not in the text (a BOS that the tokenizer added).
    """

    tokens: np.ndarray
    text: str = ""
    silent: int = 0


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """One HTTP request as requests for the engine.

    Attributes:
      prompts: at least one.
      requests: one for each completion, prompt by prompt; `max_new_tokens` may be 0 (nothing to generate).
      n: completions of each prompt.
      echo: whether each completion begins with its prompt.
      alternatives: as `Body.alternatives`.
    """

    prompts: list[EncodedPrompt]
    requests: list[Request]
    n: int
    echo: bool
    alternatives: int | None

    @property
    def scores_prompts(self) -> bool:
        """Whether the log-probabilities of the prompts' own tokens are reported."""
        return self.echo and self.alternatives is not None

    @property
    def scorings(self) -> int:
        """How many prompts are scored."""
        return len(self.prompts) if self.scores_prompts else 0

    @property
    def generated(self) -> list[int]:
        """The indices of the requests that the engine generates."""
        return [number for number, request in enumerate(self.requests) if self.is_generated(request)]

    def is_scored(self, request: Request) -> bool:
        """Whether the scores of the prompt already hold the completion: one token, the likeliest one."""
        one = request.max_new_tokens == 1 and not request.stop_strings
        plain = (
            StaticSamplingOptions.of(request.sampling, min_tokens=request.min_new_tokens)
            == StaticSamplingOptions()
        )
        return self.scores_prompts and one and plain

    def is_generated(self, request: Request) -> bool:
        """Whether the engine generates the completion."""
        return request.max_new_tokens > 0 and not self.is_scored(request)


def parse_request(
    body: Body, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, limits: Limits
) -> ParsedRequest:
    """The requests in a body.

    Raises:
      InputError: a prompt, or a number of completions, tokens or log-probabilities, that this server or model cannot
        take.
    """
    n, alternatives = body.n or 1, body.alternatives
    if alternatives is not None and alternatives > limits.alternatives:
        field = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
        raise InputError(
            f"{field} is {alternatives}; this server reports at most {limits.alternatives} (--max_logprobs)."
        )
    echo = isinstance(body, CompletionBody) and bool(body.echo)
    _check_lengths(body, limits)
    prompts = _prompts(body, tokenizer, limits, echo)
    if n * len(prompts) > limits.completions:
        raise InputError(
            f"the request asks for {n * len(prompts)} completions (prompts times n); this server takes at most "
            f"{limits.completions} at a time (--slots and --max_waiting)."
        )
    requests = []
    for index, prompt in enumerate(prompts):
        name = f"prompt {index}" if len(prompts) > 1 else "the prompt"
        limit = _limit(body, prompt, name, limits)
        # With a seed, a completion does not depend on its prompt's index in the list.
        seed = secrets.randbits(32) if body.seed is None else body.seed
        requests += [_request(body, prompt, limit, vocabulary, limits, seed, sample) for sample in range(n)]
    parsed = ParsedRequest(prompts, requests, n, echo, alternatives)
    jobs = len(parsed.generated) + parsed.scorings
    if jobs > limits.completions:
        raise InputError(
            f"the request asks for {len(parsed.generated)} completions and the scores of {parsed.scorings} prompts, "
            f"together {jobs}; this server takes at most {limits.completions} at a time (--slots and --max_waiting)."
        )
    return parsed


def _check_lengths(body: Body, limits: Limits) -> None:
    """Refuses a text that cannot fit before it is tokenized, which takes a second for one or two million characters.

    Raises:
      InputError: names the text.
    """
    if isinstance(body, ChatBody):
        sizes = {"the conversation": body.characters}
    else:
        assert isinstance(body, CompletionBody)
        name = "prompt {}" if len(body.prompt) > 1 else "the prompt"
        texts = [prompt if isinstance(prompt, str) else "" for prompt in body.prompt]
        sizes = {name.format(index): len(text) for index, text in enumerate(texts)}
    for name, size in sizes.items():
        if size > limits.characters:
            raise InputError(
                f"{name} has {size:,} characters, and this model's maximum context length here, "
                f"{limits.max_length} tokens (--max_model_len), holds {limits.characters:,} at most; shorten it."
            )


def _prompts(
    body: Body, tokenizer: PreTrainedTokenizerBase, limits: Limits, echo: bool
) -> list[EncodedPrompt]:
    if isinstance(body, ChatBody):
        messages = [message.for_template() for message in body.messages]
        chat = ChatOptions(variables=body.chat_template_kwargs or {})
        return [
            EncodedPrompt(encode_chat(tokenizer, messages, chat=chat, control_tokens=limits.control_tokens))
        ]
    assert isinstance(body, CompletionBody)
    prompts = []
    for given in body.prompt:
        if isinstance(given, str):
            tokens = encode_text(tokenizer, given)
            bos = tokenizer.bos_token_id
            added = len(tokens) > 0 and bos is not None and tokens[0] == bos
            silent = int(added and not given.startswith(tokenizer.bos_token))
            prompts.append(EncodedPrompt(tokens, given if echo else "", silent))
        else:
            is_shown = echo and len(given) <= limits.max_length and _decodable(given, tokenizer)
            text = tokenizer.decode(given) if is_shown else ""
            prompts.append(EncodedPrompt(np.asarray(given, np.int64), text))
    return prompts


def _decodable(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    return all(0 <= index < len(tokenizer) for index in ids)


def _limit(body: Body, prompt: EncodedPrompt, name: str, limits: Limits) -> int:
    """Most new tokens after this prompt, checked."""
    tokens, length = prompt.tokens, len(prompt.tokens)
    if length == 0:
        raise InputError(f"{name} has no tokens; a model needs at least one token to go on from.")
    wrong = tokens[(tokens < 0) | (tokens >= limits.vocab_size)]
    if wrong.size:
        raise InputError(
            f"{name} holds the token id {int(wrong[0])}; the model knows 0 to {limits.vocab_size - 1}."
        )
    limit = max(limits.max_length - length, 1) if body.limit is None else body.limit
    if length + limit > limits.max_length:
        raise InputError(
            f"{name} has {length} tokens and {limit} are requested, together {length + limit}; this model's maximum "
            f"context length here is {limits.max_length} tokens (--max_model_len)."
        )
    if (body.min_tokens or 0) > limit:
        raise InputError(f"min_tokens is {body.min_tokens}, more than the {limit} tokens that are possible.")
    return limit


def _request(
    body: Body,
    prompt: EncodedPrompt,
    limit: int,
    vocabulary: Vocabulary,
    limits: Limits,
    seed: int,
    sample: int,
) -> Request:
    as_tokens, as_strings = split_stops(body.stop, vocabulary.special)
    own = () if body.ignore_eos else limits.stop_token_ids
    temperature = 1.0 if body.temperature is None else body.temperature
    return Request(
        tokens=prompt.tokens.astype(np.int32),
        max_new_tokens=limit,
        min_new_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys([*own, *as_tokens])),
        stop_strings=as_strings,
        sampling=Sampling(
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_k=max(body.top_k or 0, 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
        ),
        seed=seed,
        sample=sample,
    )
