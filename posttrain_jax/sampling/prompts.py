"""Prompts as people write them (chats, plain text) to token ids, and answers back to text as they grow."""

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
    """int32 ids of a conversation up to where the assistant starts to write.

    Args:
      tokenizer, messages, tools, chat: whose template is rendered, of what, and how.
      control_tokens: whether the text of a special token (`<|im_end|>`) in a message is that token; if not, it is read
        as its letters, and the template alone writes special tokens.

    Raises:
      InputError: there is no chat template, or it refuses these messages.
    """
    try:
        said = read_messages(list(messages), "messages", empty_answers=True)
        prompt = PromptRow(
            messages=tuple(message for message, _ in said), tools=read_tools(list(tools) if tools else None)
        )
        ids = encode_prompt_row(prompt, tokenizer, chat)
        if not control_tokens:
            _refuse_control_tokens(tokenizer, chat)
            template = ChatTemplate(tokenizer, chat, tools=bool(prompt.tools))
            given = list(prompt.messages), prompt.tools
            ids = np.asarray(_spelled_out(tokenizer, template, *given, ids.tolist()), np.int32)
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
    given = json.dumps(dict(chat.variables), ensure_ascii=False)
    found = next((token for token in special_tokens(tokenizer) if token in given), None)
    if found is not None:
        raise InputError(f"chat_template_kwargs holds the text of the control token {found!r}; leave it out.")


def _spelled_out(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    ids: list[int],
) -> list[int]:
    """The ids of the rendered messages, with the special tokens that stand in what was written in them spelled out.
    Which ones do is seen from a second rendering, in which a character that nobody uses stands in their place.

    Raises:
      InputError: the template changes what was written, so that this cannot be told.
    """
    special = special_tokens(tokenizer)
    pattern = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
    written = [str(value) for message in messages for key, value in message.items() if key != "role"]
    if not special or not any(pattern.search(text) for text in written):
        return ids
    mark = next(chr(code) for code in PRIVATE_USE if not any(chr(code) in text for text in written))
    marked = [
        {
            key: pattern.sub(mark, value) if key != "role" and isinstance(value, str) else value
            for key, value in message.items()
        }
        for message in messages
    ]
    found = re.findall(f"{mark}|{pattern.pattern}", template.prompt(marked, tools))
    controls = set(special.values())
    if sum(token in controls for token in ids) != len(found):
        raise InputError(
            "a message holds the text of a control token, and the chat template changes it; leave it out."
        )
    spelled: list[int] = []
    order = iter(found)
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
    """The text of an answer piece by piece, without special tokens; a character is held until it is whole."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith(REPLACEMENT) or not text.startswith(shown):
            continue
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(ids, skip_special_tokens=True)
    if rest.startswith(shown) and len(rest) > len(shown):
        yield rest[len(shown) :]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The added tokens that an answer's text leaves out, by their text; {} for a decoder that knows of none."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: index for index, token in added.items() if token.special}


def split_stops(stops: Iterable[str], special: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop strings as (token ids, strings): one that is a special token shows in no text, so it stops as that token."""
    stops = tuple(stops)
    return (
        tuple(special[stop] for stop in stops if stop in special),
        tuple(stop for stop in stops if stop not in special),
    )
