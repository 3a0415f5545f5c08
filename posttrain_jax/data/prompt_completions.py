"""One prompt and K completions of it, from the columns that hold them.

The prompt is never doubled: a completion that is a chat is taken without the turns of the prompt that it repeats; texts
that all begin with the prompt, as one text of several words, are taken without it. Where only some of several plain
texts begin with the prompt the row is refused, for training would compare that and not what they say.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from posttrain_jax.data.formats import (
    USER_COLUMNS,
    Conversation,
    after_prompt,
    is_phrase,
    prompt_completion,
    text_after,
    tools_of,
    user_text,
    user_turns,
    with_system,
)
from posttrain_jax.data.messages import SPEAKERS, Message, is_same_turn, read_messages
from posttrain_jax.data.rows import Columns, RowError

Prompt = str | list[Message]
_PROMPT_COLUMNS = ("prompt", "conversations", "messages", *USER_COLUMNS)
_DIALOGUE_START, _DIALOGUE_TURN = "Human:", "\n\nAssistant:"


@dataclasses.dataclass(frozen=True)
class PromptCompletions:
    """The completions, each with the prompt before it, and whether they repeated it in the row."""

    completions: tuple[Conversation, ...]
    repeated: bool


def read_completions(row: Columns, sides: Mapping[str, Any], text_as: str) -> PromptCompletions:
    """Reads the completions `sides` (by what they are called in errors) of the row's prompt. Raises RowError.

    Two completions need no prompt beside them: it is what they begin with.
    """
    if len(sides) > 1 and all(_is_whole(value) for value in sides.values()):
        return PromptCompletions(_whole(row, sides), False)
    has_prompt = any(name in row for name in _PROMPT_COLUMNS)
    if not has_prompt and len(sides) == 2 and set(sides) <= row.keys():
        return PromptCompletions(_whole(row, sides), False)
    prompt = _prompt(row, text_as)
    own, repeated = _own_texts(prompt, sides)
    if isinstance(prompt, str) and all(isinstance(value, str) for value in own.values()):
        texts = tuple(prompt_completion(prompt, value, column) for column, value in own.items())
        return PromptCompletions(texts, repeated)
    turns = user_turns(row, prompt, "prompt") if isinstance(prompt, str) else prompt
    before = [(message, False) for message, _ in turns]
    after = {column: _turns(value, column) for column, value in own.items()}
    kept = {column: after_prompt(before, messages) for column, messages in after.items()}
    repeated |= any(len(kept[column]) < len(messages) for column, messages in after.items())
    return PromptCompletions(
        tuple(_chat(row, before, messages, column) for column, messages in kept.items()), repeated
    )


def last_turn(row: Columns, messages: list[Message], column: str) -> PromptCompletions:
    """A whole chat, whose last assistant turn is the completion. Raises RowError."""
    if messages[-1][0]["role"] != "assistant" or len(messages) < 2:
        raise RowError(column, "must end with the assistant's turn that is labeled")
    before = [(message, False) for message, _ in messages[:-1]]
    return PromptCompletions((_chat(row, before, [messages[-1]], column),), False)


def _is_whole(value: Any) -> bool:
    """Whether a completion repeats its prompt: a chat that another than the assistant opens (as in UltraFeedback's
    files), or a dialogue in one text (as in Anthropic's)."""
    if isinstance(value, str):
        return value.lstrip().startswith(_DIALOGUE_START) and _DIALOGUE_TURN in value
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return False
    speaker = value[0].get("role", value[0].get("from"))
    return not isinstance(speaker, str) or SPEAKERS.get(speaker.lower()) != "assistant"


def _prompt(row: Columns, text_as: str) -> Prompt:
    """The prompt as text or as messages."""
    for column in ("prompt", "conversations", "messages", "context"):
        value = row.get(column)
        if column == "context" and not isinstance(value, list):
            break
        if isinstance(value, str) and column == "prompt":
            return value if text_as == "plain" else user_turns(row, value, column)
        if value is not None:
            return _turns(value, column)
    there = [name for name in _PROMPT_COLUMNS if name in row]
    if not there:
        raise RowError("prompt", "is missing; a row without whole chats needs the prompt of its completions")
    if row.given.isdisjoint(USER_COLUMNS):
        raise RowError(there[0], "is null")
    return user_turns(row, *user_text(row))


def _turns(value: Any, column: str) -> list[Message]:
    """A text as one assistant turn, or messages, or one message."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError(column, "is empty")
        return [({"role": "assistant", "content": value}, True)]
    items = [value] if isinstance(value, dict) and ("role" in value or "from" in value) else value
    return read_messages(items, column)


def _own_texts(prompt: Prompt, sides: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The completions, texts without the prompt that they begin with, and whether they did."""
    is_plain = isinstance(prompt, str)
    prompt_text = prompt if isinstance(prompt, str) else str(prompt[-1][0].get("content", ""))
    rests = {name: text_after(prompt_text, value) for name, value in sides.items() if isinstance(value, str)}
    repeating = [name for name, rest in rests.items() if rest]
    # One answer may take up its question's words; several that do repeat it, and plain text goes on from its prompt.
    if len(repeating) == len(sides) and (len(sides) > 1 or (is_plain and is_phrase(prompt_text))):
        return {name: rest if is_plain else rest.lstrip() for name, rest in rests.items()}, True
    if repeating and is_plain and is_phrase(prompt_text) and len(sides) > 1:
        raise RowError(
            repeating[0],
            "begins with the prompt, and not all completions of the row do; write them without their prompt",
        )
    return dict(sides), False


def _chat(row: Columns, prompt: list[Message], messages: list[Message], column: str) -> Conversation:
    """The prompt, after the row's system prompt, with one completion."""
    if not messages or not any(message["role"] == "assistant" for message, _ in messages):
        raise RowError(column, "has no assistant turn")
    if messages[0][0]["role"] != "assistant":
        raise RowError(column, "begins with another prompt than the row's; the completions answer one prompt")
    if is_same_turn(prompt[-1][0], messages[0][0]):
        raise RowError(column, "repeats the last turn of the prompt; keep one of them")
    if not any(trained for _, trained in messages):
        raise RowError(
            column, "gives every assistant turn weight 0 (train: false), so there is nothing to train"
        )
    whole = [*with_system(prompt, row), *messages]
    return Conversation(
        messages=tuple(message for message, _ in whole),
        trained=tuple(trained for _, trained in whole),
        tools=tools_of(row),
    )


def _whole(row: Columns, sides: Mapping[str, Any]) -> tuple[Conversation, ...]:
    """Completions with their prompt inside; it is what they have in common."""
    columns, values = list(sides), list(sides.values())
    if all(isinstance(value, str) for value in values):
        at = min(_common_prompt(values[0], value) for value in values[1:])
        return tuple(prompt_completion(text[:at], text[at:], c) for c, text in sides.items())
    turns = [_turns(value, column) for column, value in sides.items()]
    same = [
        sum(
            1
            for _ in itertools.takewhile(
                lambda pair: pair[0][0] == pair[1][0], zip(turns[0], other, strict=False)
            )
        )
        for other in turns[1:]
    ]
    shared = min(same)
    if shared == 0:
        raise RowError(columns[1 + same.index(0)], f"does not begin with the same prompt as {columns[0]}")
    for column, messages in zip(columns, turns, strict=True):
        if len(messages) == shared:
            raise RowError(column, "ends where the other side goes on, so it has no completion of its own")
        if messages[shared][0]["role"] != "assistant":
            raise RowError(
                column, "has another prompt than the other side; the two answer different questions"
            )
    prompt = [(message, False) for message, _ in turns[0][:shared]]
    return tuple(
        _chat(row, prompt, messages[shared:], column) for column, messages in zip(columns, turns, strict=True)
    )


def _common_prompt(chosen: str, rejected: str) -> int:
    """How many characters of two texts are the prompt: up to the last "Assistant:" that both have, else up to the last
    blank before they part (as Anthropic's HH files and TRL's implicit prompts are read)."""
    pairs = zip(chosen, rejected, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    turn = chosen.rfind(_DIALOGUE_TURN, 0, same)
    if turn >= 0:
        return turn + len(_DIALOGUE_TURN)
    return max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same), 0)
