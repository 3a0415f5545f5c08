"""The row formats that people have, turned into one internal form, or refused with the column and the reason.

A row's format is told by its columns, the first that matches:

    messages                       [{"role", "content", ...}]; a dict of equally long lists also counts
    conversations                  ShareGPT [{"from", "value"}] (or role/content), optional system, tools
    prompt + completion            both text, or both lists of messages (the completion alone is trained)
    instruction + output           Alpaca, optional input, system, history; input follows instruction on a new line
    text                           plain text

Other columns are ignored. A message's `content` is a string or a list of text blocks; an assistant's message may
carry `reasoning_content`, `tool_calls` (then `content` may be null) and `weight` or `loss_weight` (0 = not trained).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from posttrain_jax.data.sources import RowError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}

# A message as a chat template takes it, and whether it is an assistant turn that may be trained.
Message = tuple[dict[str, Any], bool]

_OPTIONAL_TEXT = ("reasoning_content", "name", "tool_call_id")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One training example. Exactly one of `messages`, `prompt` (with `completion`) and `text` is set.

    Attributes:
      messages: what the chat template is given: role, content and, where present, tool calls and reasoning.
      trained: for each message, whether it is an assistant turn that may be trained.
      tools: tool descriptions for the chat template, or None.
      prompt, completion: text, encoded without a template.
      text: plain text, trained whole.
    """

    messages: tuple[dict[str, Any], ...] = ()
    trained: tuple[bool, ...] = ()
    tools: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


def to_conversation(row: dict[str, Any]) -> Conversation:
    """Converts one row of any known format. Raises RowError with the column and the reason."""
    if "messages" in row:
        return _chat(read_messages(row["messages"], "messages"), row)
    if "conversations" in row:
        return _chat(read_sharegpt(row["conversations"]), row)
    if "prompt" in row and "completion" in row:
        return _prompt_completion(row)
    if "instruction" in row and "output" in row:
        return _alpaca(row)
    if "text" in row:
        return Conversation(text=_text(row, "text"))
    if "prompt" in row:
        raise RowError("completion", "is missing (the row has a prompt)")
    if "instruction" in row:
        raise RowError("output", "is missing (the row has an instruction)")
    columns = ", ".join(row) if row else "none"
    raise RowError(
        "(row)",
        f"has columns {columns}, but a row needs messages, conversations, prompt + completion, "
        "instruction + output, or text",
    )


def _chat(messages: list[Message], row: dict[str, Any], column: str = "messages") -> Conversation:
    messages = with_system(messages, row)
    if not any(message["role"] == "assistant" for message, _ in messages):
        raise RowError(column, "has no assistant turn, so there is nothing to train on")
    if not any(trained for _, trained in messages):
        raise RowError(column, "gives every assistant turn weight 0, so there is nothing to train on")
    return Conversation(
        messages=tuple(message for message, _ in messages),
        trained=tuple(trained for _, trained in messages),
        tools=read_tools(row.get("tools")),
    )


def with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """The messages after the row's `system` prompt, unless they have one. Raises RowError."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError("system", f"is {describe_kind(system)}, not text")
    if system and messages[0][0]["role"] != "system":
        return [({"role": "system", "content": system}, False), *messages]
    return messages


def read_messages(value: Any, column: str) -> list[Message]:
    """[{"role", "content", ...}], each with whether it may be trained. Raises RowError."""
    items = _list_of_dicts(value, column)
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(items)]


def _message(item: dict[str, Any], where: str) -> Message:
    """One message, and whether it is trained."""
    role = item.get("role")
    if role is None:
        raise RowError(f"{where}.role", "is missing" if "role" not in item else "is null")
    if role not in ROLES:
        raise RowError(f"{where}.role", f"is {role!r}; the known roles are {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": role}
    content, reasoning, calls = _content(item, where)
    if item.get("tool_calls"):
        calls = _list_of_dicts(item["tool_calls"], f"{where}.tool_calls")
    if calls and role != "assistant":
        raise RowError(f"{where}.tool_calls", f"stands in a {role} turn; only an assistant calls tools")
    if content is None and not calls:
        raise RowError(f"{where}.content", "is null" if "content" in item else "is missing")
    if role == "assistant" and not calls and not (content or "").strip():
        raise RowError(f"{where}.content", "is an empty assistant turn")
    if content is not None:
        message["content"] = content
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)]
    for key in _OPTIONAL_TEXT:
        if item.get(key) is not None:
            message[key] = _text(item, key, f"{where}.{key}")
    return message, role == "assistant" and _weight(item, where) > 0


def _content(item: dict[str, Any], where: str) -> tuple[str | None, str, list[dict[str, Any]]]:
    """Text, reasoning and tool calls of a message whose content is a string, null or a list of blocks."""
    content = item.get("content")
    if content is None or isinstance(content, str):
        return content, "", []
    if not isinstance(content, list):
        raise RowError(f"{where}.content", f"is {describe_kind(content)}, not text")
    texts, reasoning, calls = [], [], []
    for j, block in enumerate(_list_of_dicts(content, f"{where}.content") if content else []):
        column = f"{where}.content[{j}]"
        kind = block.get("type")
        value = block.get("value", block.get("text"))
        if not isinstance(value, str):
            raise RowError(column, f"holds {describe_kind(value)}, not text (block type {kind!r})")
        if kind == "text":
            texts.append(value)
        elif kind == "reasoning":
            reasoning.append(value)
        elif kind == "tool_call":
            calls.append(_parse_json(value, column))
        else:
            raise RowError(column, f"has block type {kind!r}; the known types are text, reasoning, tool_call")
    return ("".join(texts) if texts else None), "".join(reasoning), calls


def _weight(item: dict[str, Any], where: str) -> float:
    for key in ("weight", "loss_weight"):
        weight = item.get(key)
        if weight is not None:
            if isinstance(weight, bool) or weight not in (0, 1):
                raise RowError(f"{where}.{key}", f"is {weight!r}; a turn is trained (1) or not (0)")
            return weight
    return 1


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments": object}}, from that or from its inner part."""
    if not isinstance(call, dict):
        raise RowError(where, f"is {describe_kind(call)}, not an object with name and arguments")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(where, "has no function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse_json(arguments, f"{where}.arguments")
    result = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        result["id"] = call["id"]
    return result


def read_sharegpt(value: Any, column: str = "conversations") -> list[Message]:
    """ShareGPT turns [{"from", "value"}], or messages, as messages. Raises RowError."""
    items = _list_of_dicts(value, column)
    if "from" not in items[0] and "role" in items[0]:
        return read_messages(items, column)
    messages = []
    for i, item in enumerate(items):
        where = f"{column}[{i}]"
        speaker = item.get("from")
        if speaker is None:
            raise RowError(f"{where}.from", "is missing" if "from" not in item else "is null")
        if speaker not in SHAREGPT_ROLES:
            raise RowError(
                f"{where}.from", f"is {speaker!r}; the known speakers are {', '.join(SHAREGPT_ROLES)}"
            )
        text = _text(item, "value", f"{where}.value")
        message: dict[str, Any] = {"role": SHAREGPT_ROLES[speaker]}
        if speaker == "function_call":
            calls = _parse_json(text, f"{where}.value")
            calls = calls if isinstance(calls, list) else [calls]
            message["tool_calls"] = [_tool_call(call, f"{where}.value") for call in calls]
        else:
            message["content"] = text
            if message["role"] == "assistant" and not text.strip():
                raise RowError(f"{where}.value", "is an empty assistant turn")
        trained = message["role"] == "assistant" and _weight(item, where) > 0
        messages.append((message, trained))
    return messages


def _prompt_completion(row: dict[str, Any]) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    for column in ("prompt", "completion"):
        if row[column] is None:
            raise RowError(column, "is null")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt_completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [(message, False) for message, _ in read_messages(prompt, "prompt")]
        return _chat(before + _checked_completion(completion), row, "completion")
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


def _checked_completion(completion: list[Any]) -> list[Message]:
    messages = read_messages(completion, "completion")
    if not any(message["role"] == "assistant" for message, _ in messages):
        raise RowError("completion", "has no assistant turn, so there is nothing to train on")
    return messages


def _alpaca(row: dict[str, Any]) -> Conversation:
    instruction = _text(row, "instruction")
    extra = _text(row, "input") if row.get("input") is not None else ""
    question = "\n".join(part for part in (instruction, extra) if part)
    if not question:
        raise RowError("instruction", "is empty")
    answer = _text(row, "output")
    if not answer.strip():
        raise RowError("output", "is an empty assistant turn")
    messages = []
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
    messages.append(({"role": "user", "content": question}, False))
    messages.append(({"role": "assistant", "content": answer}, True))
    return _chat(messages, row)


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tool descriptions as [{"type": "function", "function": {...}}], from a list or its JSON text. Raises RowError."""
    if isinstance(value, str):
        value = _parse_json(value, "tools") if value.strip() else None
    if not value:
        return None
    tools = _list_of_dicts(value, "tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _list_of_dicts(value: Any, column: str) -> list[dict[str, Any]]:
    if value is None:
        raise RowError(column, "is null")
    if isinstance(value, dict) and _is_columns(value):
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise RowError(column, f"is {describe_kind(value)}, not a list")
    if not value:
        raise RowError(column, "is an empty list")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise RowError(f"{column}[{i}]", f"is {describe_kind(item)}, not an object")
    return value


def _is_columns(value: dict[str, Any]) -> bool:
    """A list of objects as TFDS and older `datasets` store it: a list per key, all of one length."""
    lists = [items for items in value.values() if isinstance(items, list)]
    return len(lists) == len(value) and len({len(items) for items in lists}) == 1


def _text(row: dict[str, Any], key: str, column: str = "") -> str:
    column = column or key
    value = row.get(key)
    if value is None:
        raise RowError(column, "is null" if key in row else "is missing")
    if not isinstance(value, str):
        raise RowError(column, f"is {describe_kind(value)}, not text")
    if key == "text" and not value.strip():
        raise RowError(column, "is empty")
    return value


def _parse_json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(column, f"should hold JSON, but: {error}") from None


def describe_kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
