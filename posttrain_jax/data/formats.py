"""The row formats that people have, turned into one internal form, or refused with the column and the reason.

A row's format follows from its columns (a null column counts as absent), the first that matches:

    messages                       [{"role", "content", ...}]; a dict of equally long lists also counts
    conversations                  ShareGPT [{"from", "value"}] (or role/content)
    prompt + completion            both text, or both lists of messages (the completion alone is trained)
    instruction + output           Alpaca; USER_COLUMNS that are there are joined to the user's turn
    text                           plain text
    a column of USER_COLUMNS + output, response or answer   as Alpaca

Chats may have `system` (or `system_prompt`), `tools` (or `functions`) and, where the user's turn is a column,
`history`, pairs of texts. `text_as="chat"` makes a chat of a text prompt and its completion: a user's turn and an
assistant's. What becomes of other columns says `rows.py`; how a message is read says `messages.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from posttrain_jax.data.messages import Message, describe_kind, is_same_turn, read_text
from posttrain_jax.data.messages import read_messages as read_messages
from posttrain_jax.data.messages import read_tools as read_tools
from posttrain_jax.data.rows import Columns, RowError, same_text

# The user's turn where columns make it up: those that are there, in this order, on lines of their own.
USER_COLUMNS = ("instruction", "context", "input", "question", "query")
_ANSWER_COLUMNS = ("output", "response", "answer")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One training example. Exactly one of `messages`, `prompt` (with `completion`) and `text` is set.

    Attributes:
      messages: what the chat template is given: role, content and, where present, tool calls and reasoning.
      trained: for each message, whether it is an assistant turn that may be trained.
      tools: tool descriptions for the chat template, or None.
      prompt, completion: text, encoded without a template.
      text: plain text, trained whole.
      repeated: whether the completion repeated the prompt, which is taken once.
      unused: columns of the row that were not used, see `rows.py`.
    """

    messages: tuple[dict[str, Any], ...] = ()
    trained: tuple[bool, ...] = ()
    tools: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    repeated: bool = False
    unused: tuple[str, ...] = ()


def to_conversation(row: Mapping[str, Any], *, text_as: str = "plain") -> Conversation:
    """Converts one row of any known format. Raises RowError with the column and the reason."""
    columns = Columns(row)
    conversation = _read(columns, text_as)
    prompt, trained = texts_of(conversation)
    unused = columns.unused(prompt, trained, is_chat=bool(conversation.messages))
    return dataclasses.replace(conversation, unused=unused) if unused else conversation


def texts_of(conversation: Conversation) -> tuple[list[str], list[str]]:
    """The texts of a conversation's prompt, and those that are trained."""
    if conversation.messages:
        contents = [
            (message.get("content", ""), is_trained)
            for message, is_trained in zip(conversation.messages, conversation.trained, strict=True)
        ]
        prompt = [text for text, trained in contents if not trained]
        return prompt, [text for text, trained in contents if trained]
    if conversation.text is not None:
        return [], [conversation.text]
    return [conversation.prompt or ""], [conversation.completion or ""]


def _read(row: Columns, text_as: str) -> Conversation:
    # A row that only a null column makes one of a format is refused for the null.
    kind = _format(row.given) or _format(set(row))
    if kind in ("messages", "conversations"):
        return _chat(read_messages(row[kind], kind), row)
    if kind == "prompt":
        return _prompt_completion(row, text_as)
    if kind == "text":
        return Conversation(text=read_text(row, "text"))
    if kind:
        return _question_answer(row, kind)
    if "prompt" in row:
        raise RowError("completion", "is missing (the row has a prompt)")
    if "instruction" in row:
        raise RowError("output", "is missing (the row has an instruction)")
    raise RowError(
        "(row)",
        f"has columns {', '.join(row) if row else 'none'}, but a row needs messages, conversations, prompt + "
        "completion, instruction + output, question + answer, or text; rename its columns",
    )


def _format(names: set[str]) -> str:
    """What tells the format of a row with these columns: a column's name (of the answer, where columns make up the
    chat), or "" for no format."""
    if "messages" in names or "conversations" in names:
        return "messages" if "messages" in names else "conversations"
    if {"prompt", "completion"} <= names:
        return "prompt"
    if {"instruction", "output"} <= names:
        return "output"
    if "text" in names:
        return "text"
    if not names.isdisjoint(USER_COLUMNS):
        return next((name for name in _ANSWER_COLUMNS if name in names), "")
    return ""


def _chat(messages: list[Message], row: Mapping[str, Any], column: str = "messages") -> Conversation:
    messages = with_system(messages, row)
    if not any(message["role"] == "assistant" for message, _ in messages):
        raise RowError(column, "has no assistant turn, so there is nothing to train on")
    if not any(trained for _, trained in messages):
        raise RowError(
            column, "gives every assistant turn weight 0 (train: false), so there is nothing to train on"
        )
    return Conversation(
        messages=tuple(message for message, _ in messages),
        trained=tuple(trained for _, trained in messages),
        tools=tools_of(row),
    )


def with_system(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """The messages after the row's `system` (or `system_prompt`), unless they begin with it. Raises RowError, also
    where they begin with another one."""
    column = (
        "system" if row.get("system") is not None or row.get("system_prompt") is None else "system_prompt"
    )
    system = row.get(column)
    if system is not None and not isinstance(system, str):
        raise RowError(column, f"is {describe_kind(system)}, not text")
    if not system:
        return messages
    first = messages[0][0]
    if first["role"] not in ("system", "developer"):
        return [({"role": "system", "content": system}, False), *messages]
    if same_text(system) != same_text(first.get("content", "")):
        raise RowError(column, "is another system prompt than the one that the messages begin with; keep one")
    return messages


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The descriptions of the row's `tools` (or `functions`), or None. Raises RowError."""
    return read_tools(row.get("tools")) or read_tools(row.get("functions"))


def after_prompt(prompt: list[Message], completion: list[Message]) -> list[Message]:
    """The completion without the turns of the prompt that it repeats: the most that end the prompt and begin it."""
    if completion[0][0]["role"] == "assistant":
        return completion
    for count in range(min(len(prompt), len(completion)), 0, -1):
        pairs = zip(prompt[-count:], completion[:count], strict=True)
        if all(is_same_turn(one, other) for (one, _), (other, _) in pairs):
            return completion[count:]
    return completion


def _prompt_completion(row: Columns, text_as: str) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    for column in ("prompt", "completion"):
        if row[column] is None:
            raise RowError(column, "is null")
    if isinstance(prompt, str) and isinstance(completion, str):
        if text_as == "chat":
            return _chat([*user_turns(row, prompt, "prompt"), answer_turn(completion, "completion")], row)
        rest = text_after(prompt, completion) if is_phrase(prompt) else ""
        return dataclasses.replace(prompt_completion(prompt, rest or completion), repeated=bool(rest))
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [(message, False) for message, _ in read_messages(prompt, "prompt")]
        given = read_messages(completion, "completion")
        turns = after_prompt(before, given)
        if not any(message["role"] == "assistant" for message, _ in turns):
            raise RowError("completion", "has no assistant turn, so there is nothing to train on")
        chat = _chat(before + turns, row, "completion")
        return dataclasses.replace(chat, repeated=len(turns) < len(given))
    for column in ("prompt", "completion"):
        if not isinstance(row[column], str | list):
            raise RowError(column, f"is {describe_kind(row[column])}, not text or a list of messages")
    raise RowError(
        "completion",
        f"is {describe_kind(completion)} but the prompt is {describe_kind(prompt)}; both must be the same",
    )


def prompt_completion(prompt: str, completion: str, column: str = "completion") -> Conversation:
    """Text after text, without a chat template. Raises RowError when there is no completion."""
    if not completion:
        raise RowError(column, "is empty, so there is nothing to train on")
    return Conversation(prompt=prompt, completion=completion)


def text_after(prompt: str, text: str) -> str:
    """What follows the prompt in a text that begins with it; "" where it does not, or nothing follows."""
    start, text = prompt.strip(), text.lstrip()
    rest = text[len(start) :]
    if not start or not text.startswith(start) or not rest.strip():
        return ""
    inside_a_word = f"{start[-1]}{rest[0]}".isascii() and start[-1].isalnum() and rest[0].isalnum()
    return "" if inside_a_word else rest


def is_phrase(text: str) -> bool:
    """Whether a text is too long for another to begin with it by chance: three words, or 20 characters."""
    return len(text.split()) >= 3 or len(text.strip()) >= 20


def _question_answer(row: Columns, answer: str) -> Conversation:
    messages = [*user_turns(row, *user_text(row)), answer_turn(read_text(row, answer), answer)]
    return _chat(messages, row)


def user_text(row: Mapping[str, Any]) -> tuple[str, str]:
    """The user's turn that the columns of USER_COLUMNS make up, and the first of them. Raises RowError."""
    there = [name for name in USER_COLUMNS if row.get(name) is not None]
    there = there or [name for name in USER_COLUMNS if name in row]
    parts: list[str] = []
    for name in there:
        part = read_text(row, name)
        if part and part not in parts:
            parts.append(part)
    return "\n".join(parts), there[0]


def user_turns(row: Mapping[str, Any], text: str, column: str) -> list[Message]:
    """The turns of the row's `history`, then the user's. Raises RowError."""
    if not text:
        raise RowError(column, "is empty")
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("history", f"is {describe_kind(history)}, not a list of [question, answer] pairs")
    for i, pair in enumerate(history):
        if not (
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        ):
            raise RowError(f"history[{i}]", "is not a [question, answer] pair of texts")
        if not pair[1].strip():
            raise RowError(f"history[{i}]", "holds an empty assistant turn")
        messages.append(({"role": "user", "content": pair[0]}, False))
        messages.append(({"role": "assistant", "content": pair[1]}, True))
    return [*messages, ({"role": "user", "content": text}, False)]


def answer_turn(text: str, column: str) -> Message:
    """An assistant's turn. Raises RowError where it is empty."""
    if not text.strip():
        raise RowError(column, "is an empty assistant turn")
    return {"role": "assistant", "content": text}, True
