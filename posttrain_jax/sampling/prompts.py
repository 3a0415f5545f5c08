"""Chats and plain text to token ids, and completions back to text as they grow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.data.messages import read_messages, read_tools
from posttrain_jax.data.prompt_rows import PromptRow, encode_prompt_row
from posttrain_jax.data.prompt_rows import encode_text as encode_text
from posttrain_jax.data.rows import RowError
from posttrain_jax.data.spans import ChatTemplate
from posttrain_jax.models.io.load import LoadedModel

RENDERINGS = ("auto", "chat", "text")
REPLACEMENT = "\ufffd"
PRIVATE_USE = range(0xE000, 0xF900)  # of Unicode


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    chat: ChatOptions = DEFAULT_CHAT,
    control_tokens: bool = True,
) -> np.ndarray:
    """int32 ids of a conversation up to where the assistant's turn starts.

    Args:
      tokenizer: its chat template is rendered.
      messages, tools: what is rendered.
      chat: how.
      control_tokens: whether the text of a special token (`<|im_end|>`) in a message becomes that token; if not, it is
        encoded as its letters, and only the template writes special tokens.

    Raises:
      InputError: there is no chat template, or it refuses these messages.
    """
    try:
        read = read_messages(list(messages), "messages", empty_answers=True)
        prompt = PromptRow(
            messages=tuple(message for message, _ in read), tools=read_tools(list(tools) if tools else None)
        )
        ids = encode_prompt_row(prompt, tokenizer, chat)
        if not control_tokens:
            _refuse_control_tokens(tokenizer, chat)
            template = ChatTemplate(tokenizer, chat, tools=bool(prompt.tools))
            spelled_out = _spelled_out(tokenizer, template, list(prompt.messages), prompt.tools, ids.tolist())
            ids = np.asarray(spelled_out, np.int32)
        return ids
    except RowError as error:
        raise InputError(f"{error.column}: {error.reason}.") from error


def need_tokenizer(loaded: LoadedModel) -> PreTrainedTokenizerFast:
    """The model's tokenizer. Raises InputError for a model without one."""
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.source.name} has no tokenizer, so text cannot be evaluated; add its tokenizer files."
        )
    return loaded.tokenizer


def is_chat(loaded: LoadedModel, render: str) -> bool:
    """Whether prompts are rendered by the chat template: "auto" does so where there is one.

    Raises:
      InputError: the model has no tokenizer, or `render` is not one of RENDERINGS.
    """
    if render not in RENDERINGS:
        raise InputError(f"data.render is {render!r}; use one of {', '.join(RENDERINGS)}.")
    tokenizer = need_tokenizer(loaded)
    return render == "chat" or (render == "auto" and bool(tokenizer.chat_template))


def encode_user_prompt(
    loaded: LoadedModel, text: str, *, chat: bool, name: str, options: ChatOptions = DEFAULT_CHAT
) -> np.ndarray:
    """int32 ids of a prompt: one user turn of the chat template, up to where the assistant starts; or plain text.

    Args:
      loaded: the model.
      text: what a user would write.
      chat: whether it is rendered by the chat template.
      name: what to call it in an error.
      options: of the rendering.

    Raises:
      InputError: names the row; there is no chat template, or it refuses the text.
    """
    tokenizer = need_tokenizer(loaded)
    if not chat:
        return encode_text(tokenizer, text)
    try:
        return encode_chat(tokenizer, [{"role": "user", "content": text}], chat=options)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, chat: ChatOptions) -> None:
    variables = json.dumps(dict(chat.variables), ensure_ascii=False)
    control = next((token for token in special_tokens(tokenizer) if token in variables), None)
    if control is not None:
        raise InputError(
            f"chat_template_kwargs holds the text of the control token {control!r}; leave it out."
        )


def _spelled_out(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    ids: list[int],
) -> list[int]:
    """The ids of the rendered messages, with the special tokens that come from the messages' own text spelled out as
    letters. A second rendering, with an unused character in place of their text, tells which ones those are.

    Raises:
      InputError: the template changes the text of a message, so that this cannot be told.
    """
    special = special_tokens(tokenizer)
    pattern = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
    texts = [str(value) for message in messages for key, value in message.items() if key != "role"]
    if not special or not any(pattern.search(text) for text in texts):
        return ids
    mark = next(chr(code) for code in PRIVATE_USE if not any(chr(code) in text for text in texts))
    marked = [
        {
            key: pattern.sub(mark, value) if key != "role" and isinstance(value, str) else value
            for key, value in message.items()
        }
        for message in messages
    ]
    controls_in_order = re.findall(f"{mark}|{pattern.pattern}", template.prompt(marked, tools))
    controls = set(special.values())
    if sum(token in controls for token in ids) != len(controls_in_order):
        raise InputError(
            "a message holds the text of a control token, and the chat template changes it; leave it out."
        )
    spelled: list[int] = []
    order = iter(controls_in_order)
    for token in ids:
        if token not in controls or next(order) != mark:
            spelled.append(token)
            continue
        text = str(tokenizer.convert_ids_to_tokens(token))
        for part in (text[:1], text[1:]):  # apart, they are no control token
            letters = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            spelled += [letter for letter in letters if letter not in controls]
    return spelled


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The text of a completion piece by piece, without special tokens; an incomplete character is held back."""
    ids: list[int] = []
    emitted = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith(REPLACEMENT) or not text.startswith(emitted):
            continue
        if len(text) > len(emitted):
            yield text[len(emitted) :]
            emitted = text
    rest = tokenizer.decode(ids, skip_special_tokens=True)
    if rest.startswith(emitted) and len(rest) > len(emitted):
        yield rest[len(emitted) :]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the added tokens that a completion's text leaves out; {} for a decoder without added tokens."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return {}
    added = tokenizer.added_tokens_decoder
    return {token.content: index for index, token in added.items() if token.special}


def split_stops(stops: Iterable[str], special: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop strings as (token ids, strings): a special token shows in no text, so as a stop string it becomes its id."""
    stops = tuple(stops)
    return (
        tuple(special[stop] for stop in stops if stop in special),
        tuple(stop for stop in stops if stop not in special),
    )
