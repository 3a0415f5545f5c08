"""From a row to the prompt that a model goes on from: one reading of it for generation, rollouts, evaluation, the
server and the chat, the same that training has (`formats.py`).

A row is {"prompt": text or messages}, {"messages": [...]} or {"prompt_ids": [...]}, else {"conversations": [...]} or
the columns that make up a user's turn (`instruction` and `input`, ...). `system`, `tools` and `history` are read as in
training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions, has_template
from posttrain_jax.data.formats import USER_COLUMNS, tools_of, user_text, user_turns, with_system
from posttrain_jax.data.messages import Message, describe_kind, read_messages
from posttrain_jax.data.rows import Columns, RowError
from posttrain_jax.data.spans import ChatTemplate

SOURCES = ("prompt", "messages", "prompt_ids")


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """A prompt. Exactly one of `messages`, `text` and `ids` is set.

    Attributes:
      messages: a conversation, for the chat template.
      tools: descriptions for the chat template, or None.
      text: plain text, encoded without a template.
      ids: token ids.
      unused: columns of the row that are no part of the prompt.
    """

    messages: tuple[dict[str, Any], ...] = ()
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    ids: tuple[int, ...] | None = None
    unused: tuple[str, ...] = ()


def read_prompt_row(row: Mapping[str, Any], *, text_as: str = "plain", travels: bool = False) -> PromptRow:
    """Reads a row's prompt.

    Args:
      row: its columns.
      text_as: as in `ChatOptions`.
      travels: whether the other columns go with the prompt to something that reads them (a reward function). If not,
        one that could be a part of the prompt is refused, as in training.

    Raises:
      RowError: the column and the reason.
    """
    columns = Columns(row)
    prompt = _read(columns, text_as)
    is_chat = bool(prompt.messages)
    texts = [str(message.get("content", "")) for message in prompt.messages]
    texts += [prompt.text] if prompt.text is not None else []
    anything = travels or prompt.ids is not None
    unused = columns.unused(texts, [], is_chat=is_chat, refuse_of_chats_only=anything)
    return dataclasses.replace(prompt, unused=unused)


def _read(row: Columns, text_as: str) -> PromptRow:
    given = [name for name in SOURCES if row.get(name) is not None]
    if len(given) > 1:
        raise RowError("(row)", f"needs exactly one of {', '.join(SOURCES)}, but has {' and '.join(given)}")
    if given == ["prompt_ids"]:
        return PromptRow(ids=_ids(row["prompt_ids"]))
    if given == ["prompt"] and isinstance(row["prompt"], str):
        if text_as == "plain":
            return PromptRow(text=row["prompt"])
        return _chat(user_turns(row, row["prompt"], "prompt"), row)
    if given:
        return _chat(read_messages(row[given[0]], given[0], empty_answers=True), row)
    if row.get("conversations") is not None:
        return _chat(read_messages(row["conversations"], "conversations", empty_answers=True), row)
    if not row.given.isdisjoint(USER_COLUMNS):
        return _chat(user_turns(row, *user_text(row)), row)
    columns = f"its columns: {', '.join(row) or 'none'}"
    raise RowError("(row)", f"needs exactly one of {', '.join(SOURCES)}, but has none of them ({columns})")


def is_plain_text(row: Mapping[str, Any], text_as: str = "plain") -> bool:
    """Whether a row's prompt is a text that no chat template is applied to. Of rows that were read before."""
    return text_as == "plain" and isinstance(row.get("prompt"), str)


def other_columns(row: Mapping[str, Any], *, text_as: str = "plain") -> tuple[str, ...]:
    """The columns that go with a row's prompt and are no part of it. Of rows that were read before."""
    if row.get("text") is not None and not any(row.get(name) is not None for name in SOURCES):
        return tuple(
            name for name, value in row.items() if name != "text" and value not in (None, "", [], {})
        )
    return read_prompt_row(row, text_as=text_as, travels=True).unused


def _chat(messages: list[Message], row: Mapping[str, Any]) -> PromptRow:
    with_prompt = tuple(message for message, _ in with_system(messages, row))
    return PromptRow(messages=with_prompt, tools=tools_of(row))


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise RowError("prompt_ids", f"is {describe_kind(value)}, not a list of token ids")
    if not value:
        raise RowError("prompt_ids", "is an empty list")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int):
            raise RowError("prompt_ids", f"holds {item!r}; token ids are whole numbers")
        if not 0 <= item < 2**31:
            raise RowError(
                "prompt_ids", f"holds {item if abs(item) < 2**63 else 'a number'}, which is no token id"
            )
    return tuple(value)


def encode_prompt_row(
    prompt: PromptRow, tokenizer: PreTrainedTokenizerBase, chat: ChatOptions = DEFAULT_CHAT
) -> np.ndarray:
    """int32 ids of a prompt.

    Raises:
      RowError: the chat template refuses it, or does not show its tools.
      InputError: there is no chat template, or it is none.
    """
    if prompt.ids is not None:
        return np.asarray(prompt.ids, np.int32)
    if prompt.text is not None:
        return encode_text(tokenizer, prompt.text)
    if not has_template(tokenizer, chat):
        raise InputError(
            "the model's tokenizer has no chat template (it is a base model); give plain text (prompt), or use a "
            "model that was tuned on chats."
        )
    text = ChatTemplate(tokenizer, chat, tools=bool(prompt.tools)).prompt(list(prompt.messages), prompt.tools)
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """int32 ids of plain text, with one BOS where the tokenizer adds one, and never an EOS that ends it."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()
    if bos is not None and ids[:2] == [bos, bos]:
        ids.pop(0)
    return np.asarray(ids, np.int32)
