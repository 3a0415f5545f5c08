"""The bodies of /v1/completions and /v1/chat/completions, checked field by field.

Fields of OpenAI's API that would change the completion and that this server does not support are refused unless they
have a neutral value; those that cannot change it are accepted and ignored; an unknown field is refused by name.
`top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos` and `chat_template_kwargs` are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

MOST_CHOICES = 128
MOST_STOPS = 16
GREEDY_BELOW = 1e-5
"""A temperature below it divides logits beyond float32's range; the completion is the greedy one."""

# For each field: its neutral values.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}


def _text(value: str) -> str:
    """The text, if it can be written down: JSON can spell half a character."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "text", f"holds half a character (\\u{ord(value[error.start]):04x})"
        ) from None
    return value


def _stop_strings(value: Any) -> list[str]:
    """A text, a list of texts or null, as a list."""
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be text or a list of texts")
    if len(stops) > MOST_STOPS:
        raise PydanticCustomError("stop", f"holds {len(stops)} texts; at most {MOST_STOPS} are possible")
    if "" in stops:
        raise PydanticCustomError("stop", "holds an empty text, which every completion holds")
    return list(dict.fromkeys(map(_text, stops)))


def _prompts(value: Any) -> list[str | list[int]]:
    """OpenAI's four kinds of prompt as a list of texts and lists of token ids."""
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "prompt", "must be text, a list of token ids, or a list of either, not empty"
        )
    prompts = [value] if _are_ids(value) else value
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and _are_ids(prompt)):
            raise PydanticCustomError("prompt", "must be text, a list of token ids, or a list of either")
    return [_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _are_ids(values: list[Any]) -> bool:
    """Whether all of them are whole numbers of 32 bits; a body may hold millions, and others wait meanwhile."""
    return set(map(type, values)) <= {int} and (not values or -(2**31) < min(values) <= max(values) < 2**31)


def _content(value: Any) -> str:
    """A text, or OpenAI's list of parts, all of them text."""
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be text or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", 'holds a part that is not {"type": "text", "text": "..."}')
        texts.append(_text(part["text"]))
    return "".join(texts)


class StreamOptions(pydantic.BaseModel):
    """`include_usage` adds a last chunk with the counts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(pydantic.BaseModel):
    """What both kinds of request share. None stands for the default everywhere."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stop_strings)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None

    logit_bias: Any = None

    # They cannot change the completion.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @field_validator(*UNSUPPORTED, check_fields=False)
    @classmethod
    def _is_neutral(cls, value: Any, info: pydantic.ValidationInfo) -> None:
        if value is not None and value not in UNSUPPORTED[str(info.field_name)]:
            raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")

    @pydantic.model_validator(mode="after")
    def _stream_options_need_stream(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream to be true")
        return self

    @property
    def characters(self) -> int:
        """How much there is to tokenize; a token id counts as one."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        """Most tokens of a completion; None = as many as there is room for."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None = no log-probabilities at all."""
        raise NotImplementedError


class CompletionBody(Body):
    """/v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Any = None

    @pydantic.model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise PydanticCustomError("best_of", "best_of is not supported by this server; leave it out")
        return self

    @property
    def characters(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompt))

    @property
    def limit(self) -> int | None:
        """OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """As `Body.alternatives`."""
        return self.logprobs


class Message(pydantic.BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: Annotated[str, AfterValidator(_text)] | None = None
    refusal: None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: None = None
    annotations: Any = None

    @field_validator("tool_calls", "function_call")
    @classmethod
    def _no_tools(cls, value: Any) -> None:
        if value:
            raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")

    def for_template(self) -> dict[str, str]:
        """As chat templates read it; a developer is the system where the template knows no developer (see there)."""
        named = {"name": self.name} if self.name is not None else {}
        return {"role": self.role, "content": self.content, **named}


class ChatBody(Body):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None

    # They cannot change the completion.
    parallel_tool_calls: Any = None
    prediction: Any = None

    @pydantic.model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        return self

    @property
    def characters(self) -> int:
        """Of all messages."""
        return sum(len(message.content) for message in self.messages)

    @property
    def limit(self) -> int | None:
        """`max_completion_tokens` is the newer word for `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """As `Body.alternatives`."""
        return (self.top_logprobs or 0) if self.logprobs else None
