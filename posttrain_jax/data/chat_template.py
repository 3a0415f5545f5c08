"""Chat templates, rendered: messages in, text out, within limits. Every entry point renders here.

The environment is that of transformers' `apply_chat_template` (sandbox, `{% generation %}`, `tojson`, `strftime_now`,
`raise_exception`, loop controls), with four differences: the date is an argument, so that a run can fix it; code that
does not end, or grows without bound, is stopped; whatever the template's code raises is told in one sentence; a
`developer` is the `system` where the template does not know the role.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.installed import find_file
from posttrain_jax.data.template_sandbox import (
    MOST_CHARACTERS,
    LimitError,
    compile_template,
    one_sentence,
    running,
)

TEXT_AS = ("plain", "chat")
MOST_SECONDS = 5.0
"""Of a thread's processor time for one rendering; a chat takes milliseconds."""
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_GIVEN = ("messages", "tools", "add_generation_prompt", "strftime_now")


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How the rows of a run become text.

    Attributes:
      template: a template's text, the path of a file with it, the name of one of the tokenizer's, or "" for its own.
      variables: further variables of the template, such as {"enable_thinking": False} (`chat_template_kwargs` in
        transformers and vLLM).
      now: the date that the template sees; None = the time of rendering.
      text_as: what a text prompt and its completion are: "plain" text, or "chat", a user's and an assistant's turn.
    """

    template: str = ""
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    now: datetime.datetime | None = None
    text_as: str = "plain"

    def __post_init__(self) -> None:
        if self.text_as not in TEXT_AS:
            raise InputError(f"data.text_as is {self.text_as!r}; it must be one of {', '.join(TEXT_AS)}")


DEFAULT_CHAT = ChatOptions()


class TemplateRefusalError(InputError):
    """A template does not render these messages; the text says why."""


class TemplateLimitError(TemplateRefusalError):
    """A template takes too long, or writes too much, for these messages."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the (start, stop) of each `{% generation %}` block in it."""

    text: str
    generated: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Span:
    """One assistant turn in the rendered text.

    Attributes:
      start: first character that the model writes.
      stop: end of the trained text before the end-of-turn token, or -1 when the turn runs up to that token.
    """

    start: int
    stop: int = -1


@dataclasses.dataclass(frozen=True)
class Turns:
    """A rendered conversation.

    Attributes:
      text: all of it.
      spans: of each assistant message, by its index.
      untrainable: messages that are not shown as the model would write them, with the reason: the template drops their
        thought, or puts something else before them than the generation prompt.
    """

    text: str
    spans: dict[int, list[Span]]
    untrainable: dict[int, str]


@dataclasses.dataclass(frozen=True)
class EndOfTurn:
    """The special tokens, nearly always one, that end a turn; `texts` and `token_ids` belong together."""

    texts: tuple[str, ...]
    token_ids: tuple[int, ...]

    @property
    def text(self) -> str:
        """The tokens' text, joined."""
        return "".join(self.texts)


@dataclasses.dataclass(frozen=True)
class TurnShape:
    """How a template surrounds an assistant's turn.

    Attributes:
      end: what ends a turn.
      tool_end: what ends a turn that calls tools (Llama 3.1 may end those differently).
      between_turns: `end` also ends turns that others follow, not only the last.
      header: text that the template puts before an assistant's content, when it has no generation prompt.
      prompt: the generation prompt.
    """

    end: EndOfTurn
    tool_end: EndOfTurn
    between_turns: bool
    header: str
    prompt: str


class Template:
    """A compiled template, bound to a tokenizer's special tokens.

    Args:
      source: the template's text.
      tokenizer: its special tokens are variables of the template.
      variables: as in `ChatOptions`.
      now: as in `ChatOptions`.
      seconds: most processor time of a rendering.

    Raises:
      InputError: the text is no template, or has no variable of a given name.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        variables: Mapping[str, Any] | None = None,
        now: datetime.datetime | None = None,
        seconds: float = MOST_SECONDS,
    ) -> None:
        self.source = source
        self._compiled = compile_template(source)
        self._seconds = seconds
        self._now = now
        special = {name: _plain(token) for name, token in tokenizer.special_tokens_map.items()}
        variables = dict(variables or {})
        known = self._compiled.variables - special.keys() - set(_GIVEN)
        for name in variables:
            if name not in known:
                has = f"has {', '.join(sorted(known))}" if known else "has none"
                raise InputError(
                    f"chat_template_kwargs: the chat template has no variable {name!r}; it {has}."
                )
        self._has_developer = re.search(r"""['"]developer['"]""", source) is not None
        self._variables = {"documents": None, **special, **variables}

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> Rendered:
        """The conversation; with `prompt`, up to where the assistant starts to write. Raises TemplateRefusalError.

        Where a template cannot do without the content of a message that only calls tools, that content is empty.
        """
        if not messages:
            raise TemplateRefusalError("there are no messages")
        try:
            return self._render(messages, tools, prompt)
        except TemplateLimitError:
            raise
        except TemplateRefusalError:
            if all(message.get("content") is not None for message in messages):
                raise
        filled = [
            message if message.get("content") is not None else {**message, "content": ""}
            for message in messages
        ]
        return self._render(filled, tools, prompt)

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool
    ) -> Rendered:
        running.begin(time.thread_time() + self._seconds)
        blocks = []
        try:
            for block in self._compiled.template.generate(
                **self._variables,
                messages=[self._message(message) for message in messages],
                tools=tools,
                add_generation_prompt=prompt,
                strftime_now=(self._now or datetime.datetime.now()).strftime,
            ):
                blocks.append(block)
                running.count(block)
        except LimitError:
            raise TemplateLimitError(
                f"it takes more than {self._seconds:g} s or {MOST_CHARACTERS:,} characters to render"
            ) from None
        except jinja2.TemplateError as error:
            raise TemplateRefusalError(one_sentence(str(error))) from None
        except Exception as error:  # the template's own code: it can raise anything
            raise TemplateRefusalError(one_sentence(f"{type(error).__name__}: {error}")) from None
        finally:
            running.begin(float("inf"))
        return Rendered("".join(blocks), list(running.generated))

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """As transformers gives it to a template: no null keys, and the reasoning under the two names that are read. A
        developer is the system where the template knows no developer (OpenAI's newer word for the same)."""
        given = {key: value for key, value in message.items() if value is not None}
        if given.get("role") == "developer" and not self._has_developer:
            given["role"] = "system"
        reasoning = next((given[key] for key in _REASONING_KEYS if key in given), None)
        return (
            given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}
        )


def has_template(tokenizer: PreTrainedTokenizerBase, options: ChatOptions = DEFAULT_CHAT) -> bool:
    """Whether chats can be rendered at all."""
    return bool(options.template or tokenizer.chat_template)


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: str = "", *, tools: bool = False) -> str:
    """A template's text. Of a tokenizer with several the one named `template`, else "tool_use" for rows with tools,
    else "default".

    Args:
      tokenizer: whose templates these are.
      template: as `ChatOptions.template`.
      tools: whether the row has tools.

    Raises:
      InputError: there is none.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict) and template in own:
        return str(own[template])
    if template:
        if "{{" in template or "{%" in template:
            return template
        try:
            return find_file(template).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"data.chat_template {template!r} is not UTF-8 text") from None
        except (OSError, ValueError, RuntimeError):  # no such file, a folder, no name of a file at all
            shown = template if len(template) <= 100 else template[:100] + " ..."
            raise InputError(
                f"data.chat_template {shown!r} is neither a file nor a template's text"
            ) from None
    if not own:
        raise InputError(
            "the data holds chats, but the model's tokenizer has no chat template (it is a base model); "
            "set data.chat_template to a template's text or the path of a .jinja file"
        )
    if isinstance(own, str):
        return own
    for name in ("tool_use", "default") if tools else ("default",):
        if name in own:
            return str(own[name])
    raise InputError(
        f"the tokenizer has the chat templates {', '.join(sorted(own))} and none named default; set "
        "data.chat_template to one of these names"
    )


def shown_dates(source: str, now: datetime.datetime | None = None) -> list[str]:
    """What a template shows of the date, in texts that change whenever that does; [] for one that shows none, and for
    text that is no template (whoever renders it is told)."""
    now = now or datetime.datetime.now()
    try:
        formats = compile_template(source).date_formats
        return [now.isoformat() if how is None else now.strftime(how) for how in formats]
    except InputError:
        return []
    except ValueError:  # a format that is none
        return [now.isoformat()]


def read_variables(text: str, name: str) -> dict[str, Any]:
    """`chat_template_kwargs` as a flag or a config key gives them: a JSON object, or "".

    Raises:
      InputError: it is something else; `name` says where.
    """
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(
            f'{name} is {text!r}; it must be a JSON object such as {{"enable_thinking": false}}.'
        )
    return value


def _plain(token: Any) -> Any:
    return [str(item) for item in token] if isinstance(token, list | tuple) else str(token)
