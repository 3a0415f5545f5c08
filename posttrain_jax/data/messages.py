"""Messages as people write them (OpenAI's, ShareGPT's, blocks of content), as a chat template takes them.

A message has `role`, and `content`: text or a list of blocks (text, reasoning or thinking, tool_call). In ShareGPT's
form it has `from`, one of SPEAKERS, and its text under `value`, `content` or `text`. An assistant's message may carry
its thoughts under `reasoning_content`, `reasoning` or `thinking`; calls under `tool_calls` or OpenAI's older
`function_call` (then `content` may be null), with arguments as an object or as JSON text; and whether it is trained:
`weight` or `loss_weight` 0 or 1, `train` or `training` true or false. A role `function` is a `tool`; what a `developer`
is to a template says `chat_template.py`. `name` and `tool_call_id` go to the template. A key that would change the
training and is not known is refused; others that hold something are counted (`rows.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_jax.data.rows import MESSAGE_KEYS, RowError, may_be_prompt, same_text
from posttrain_jax.data.text_rows import parse

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of who speaks, in lower case; what follows a slash is the role.
_SPEAKERS = """
    system/system developer/developer
    human/user user/user prompter/user input/user
    gpt/assistant assistant/assistant chatgpt/assistant bing/assistant bard/assistant claude/assistant model/assistant
    output/assistant
    tool/tool function/tool observation/tool tool_response/tool function_response/tool ipython/tool
    function_call/assistant tool_call/assistant"""
SPEAKERS = dict(pair.split("/") for pair in _SPEAKERS.split())
_CALLS = ("function_call", "tool_call")
_TEXTS = ("value", "content", "text")

# A message as a chat template takes it, and whether it is an assistant turn that may be trained.
Message = tuple[dict[str, Any], bool]

_OPTIONAL_TEXT = ("name", "tool_call_id")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TRAINED = ("weight", "loss_weight", "train", "training")
# Keys that say something about the training that is not understood, and what to write.
_UNCLEAR = {
    "mask": "does not say whether a masked turn is trained; write train: true or train: false",
    "train_detail": "trains parts of a turn, which is not supported; write train: true or train: false",
}


def read_messages(value: Any, column: str, *, empty_answers: bool = False) -> list[Message]:
    """[{"role", "content", ...}] or [{"from", "value", ...}], each with whether it may be trained. Raises RowError.

    `empty_answers`: an assistant's turn may be empty, as in a prompt, which is not trained.
    """
    items = read_list(value, column)
    return [_message(item, f"{column}[{i}]", empty_answers=empty_answers) for i, item in enumerate(items)]


def _message(item: dict[str, Any], where: str, *, empty_answers: bool) -> Message:
    """One message, and whether it is trained."""
    text_key = "content"
    if is_sharegpt(item):
        item, text_key = _from_sharegpt(item, where)
    role = "tool" if item.get("role") == "function" else item.get("role")
    if role is None:
        raise RowError(f"{where}.role", "is missing" if "role" not in item else "is null")
    if role not in ROLES:
        raise RowError(f"{where}.role", f"is {role!r}; the known roles are {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": role}
    content, reasoning, calls = _content(item, where)
    if item.get("tool_calls"):
        calls = read_list(item["tool_calls"], f"{where}.tool_calls")
    if item.get("function_call"):
        if calls:
            raise RowError(f"{where}.function_call", "stands beside other tool calls; keep one of them")
        calls = read_list([item["function_call"]], f"{where}.function_call")
    if calls and role != "assistant":
        raise RowError(f"{where}.tool_calls", f"stands in a {role} turn; only an assistant calls tools")
    if content is None and not calls:
        raise RowError(f"{where}.{text_key}", "is null" if "content" in item else "is missing")
    if role == "assistant" and not calls and not empty_answers and not (content or "").strip():
        raise RowError(f"{where}.{text_key}", "is an empty assistant turn")
    if content is not None:
        message["content"] = content
    reasoning = _reasoning(item, role, reasoning, where)
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)]
    for key in _OPTIONAL_TEXT:
        if item.get(key) is not None:
            message[key] = read_text(item, key, f"{where}.{key}")
    return message, _is_trained(item, role, where)


def _content(item: dict[str, Any], where: str) -> tuple[str | None, str, list[dict[str, Any]]]:
    """Text, reasoning and tool calls of a message whose content is a string, null or a list of blocks."""
    content = item.get("content")
    if content is None or isinstance(content, str):
        return content, "", []
    if not isinstance(content, list):
        raise RowError(f"{where}.content", f"is {describe_kind(content)}, not text")
    texts, reasoning, calls = [], [], []
    for j, block in enumerate(read_list(content, f"{where}.content") if content else []):
        column = f"{where}.content[{j}]"
        kind = block.get("type")
        value = block.get("value")
        if value is None:
            value = block.get("thinking" if kind == "thinking" else "text")
        if not isinstance(value, str):
            raise RowError(column, f"holds {describe_kind(value)}, not text (block type {kind!r})")
        if kind == "text":
            texts.append(value)
        elif kind in ("reasoning", "thinking"):
            reasoning.append(value)
        elif kind == "tool_call":
            calls.append(parse_json(value, column))
        else:
            raise RowError(
                column, f"has block type {kind!r}; the known types are text, reasoning, thinking, tool_call"
            )
    return ("".join(texts) if texts else None), "".join(reasoning), calls


def _reasoning(item: dict[str, Any], role: str, reasoning: str, where: str) -> str:
    """The thoughts of a turn, wherever they stand; `reasoning`: those of its blocks."""
    for key in _REASONING:
        if item.get(key) in (None, ""):
            continue
        text = read_text(item, key, f"{where}.{key}")
        if role != "assistant":
            raise RowError(
                f"{where}.{key}", f"stands in a {role} turn; only an assistant's thoughts are known"
            )
        if reasoning and same_text(text) != same_text(reasoning):
            raise RowError(f"{where}.{key}", "says something else than the turn's other thoughts; keep one")
        reasoning = reasoning or text
    return reasoning


def _is_trained(item: dict[str, Any], role: str, where: str) -> bool:
    """Whether a turn is an assistant's that may be trained. Refuses keys that this cannot honor."""
    flags: dict[str, bool] = {}
    for key in _TRAINED:
        value = item.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"{where}.{key}", f"is {value!r}; a turn is trained (1) or not (0)")
        if value and role != "assistant" and key in ("train", "training"):
            raise RowError(f"{where}.{key}", f"asks for a {role} turn to be trained; only an assistant's is")
        flags[key] = bool(value)
    if len(set(flags.values())) > 1:
        raise RowError(f"{where}.{list(flags)[-1]}", f"says the opposite of {next(iter(flags))}; keep one")
    for key, value in item.items():
        if key in _UNCLEAR and value not in (None, []):
            raise RowError(f"{where}.{key}", _UNCLEAR[key])
        if key not in MESSAGE_KEYS and value not in (None, "", [], {}, False) and may_be_prompt(key):
            raise RowError(
                f"{where}.{key}",
                "could be part of what the model reads and is not known; put it into content, or remove it",
            )
    return role == "assistant" and all(flags.values())


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments": object}}, from that or from its inner part."""
    if not isinstance(call, dict):
        raise RowError(where, f"is {describe_kind(call)}, not an object with name and arguments")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(where, "has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}.arguments")
    elif arguments is None:
        for name in ("parameters", "args", "input", "kwargs"):
            if function.get(name):
                raise RowError(
                    f"{where}.{name}", "is not known; the arguments of a call stand under arguments"
                )
        arguments = {}
    result = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        result["id"] = call["id"]
    return result


def is_sharegpt(item: Mapping[str, Any]) -> bool:
    """Whether a message has ShareGPT's keys or ShareGPT's name of who speaks."""
    role = item.get("role")
    speaks = isinstance(role, str) and role not in (*ROLES, "function") and role.lower() in SPEAKERS
    return item.get("from") is not None or speaks or ("content" not in item and "value" in item)


def _from_sharegpt(item: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """A turn in ShareGPT's form with `role` and `content` (or `tool_calls`), and the key that its text stands under."""
    key = "role" if item.get("role") is not None and item.get("from") is None else "from"
    speaker = item.get(key)
    if speaker is None:
        raise RowError(f"{where}.{key}", "is null" if key in item else "is missing")
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise RowError(f"{where}.{key}", f"is {speaker!r}; the known speakers are {', '.join(SPEAKERS)}")
    for other in ("tool_calls", "function_call"):
        if item.get(other):
            raise RowError(f"{where}.{other}", "stands beside from and value; write role and content")
    if key == "from" and item.get("role") is not None:
        raise RowError(f"{where}.role", "stands beside from; keep one of them")
    given = [name for name in _TEXTS if item.get(name) is not None]
    if len(given) > 1:
        raise RowError(f"{where}.{given[1]}", f"stands beside {given[0]}; keep one of them")
    text_key = given[0] if given else next((name for name in _TEXTS if name in item), "value")
    text = read_text(item, text_key, f"{where}.{text_key}")
    rest = {name: value for name, value in item.items() if name not in ("from", "role", *_TEXTS)}
    if speaker.lower() in _CALLS:
        calls = parse_json(text, f"{where}.{text_key}")
        calls = calls if isinstance(calls, list) else [calls]
        calls = [_tool_call(call, f"{where}.{text_key}") for call in calls]
        return {"role": "assistant", "tool_calls": calls, **rest}, text_key
    return {"role": SPEAKERS[speaker.lower()], "content": text, **rest}, text_key


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tool descriptions as [{"type": "function", "function": {...}}], from a list or its JSON text. Raises RowError."""
    if isinstance(value, str):
        value = parse_json(value, "tools") if value.strip() else None
    if not value:
        return None
    tools = read_list(value, "tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def is_same_turn(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two messages are the same but for white space in their content."""
    same_content = same_text(one.get("content", "")) == same_text(other.get("content", ""))
    return same_content and {**one, "content": ""} == {**other, "content": ""}


def read_list(value: Any, column: str) -> list[dict[str, Any]]:
    """A list of objects, not empty; lists of one length under the keys of an object are one, too. Raises RowError."""
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


def read_text(row: Any, key: str, column: str = "") -> str:
    """The text under a key of a row or a message. Raises RowError: it is missing, null, or no text."""
    column = column or key
    value = row.get(key)
    if value is None:
        raise RowError(column, "is null" if key in row else "is missing")
    if not isinstance(value, str):
        raise RowError(column, f"is {describe_kind(value)}, not text")
    if key == "text" and not value.strip():
        raise RowError(column, "is empty")
    return value


def parse_json(text: str, column: str) -> Any:
    """The value of JSON text in a column. Raises RowError."""
    try:
        return parse(text, column)
    except RowError as error:
        raise RowError(column, f"should hold JSON, but it {error.reason}") from None


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
        bytes: "bytes that are not UTF-8",
    }
    return names.get(type(value), f"a {type(value).__name__}")
