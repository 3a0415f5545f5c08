"""A file of prompts: its rows are checked, encoded, and shown before they are completed."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_jax.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from posttrain_jax.data.chat_template import ChatOptions
    from posttrain_jax.data.prompt_rows import PromptRow


@dataclasses.dataclass(frozen=True)
class PromptFileRow:
    """One row of --prompts: its id, its file and line, its columns (chats as `messages`), and the prompt in them."""

    id: str | int
    where: str
    row: dict[str, Any]
    read: PromptRow | None = None


def read_prompts(
    path: str,
    *,
    text_as: str = "plain",
    columns: str = "",
    ignore_columns: str = "",
    travels: bool = False,
) -> list[PromptFileRow]:
    """All prompts, in order.

    Args:
      path: of the file.
      text_as: "plain" or "chat", see `ChatOptions`.
      columns: what the file's columns are called here, as JSON (`data.columns`).
      ignore_columns: columns that are left out before anything reads them, "a,b".
      travels: as in `read_prompt_row`.

    Raises:
      InputError: the file is missing or empty, or a row is bad; names the file and the line.
    """
    from posttrain_jax.data.rows import ColumnNames, RowError, read_columns
    from posttrain_jax.data.sources import read_rows

    if not Path(path).is_file():
        raise InputError(f"--prompts={path}: there is no such file.")
    prompts: list[PromptFileRow] = []
    first: dict[str | int, str] = {}
    names = ColumnNames(read_columns(columns, "--columns"), ignore_columns)
    for number, row in enumerate(read_rows(path, names)):
        where = f"{row.source}:{row.line}"
        try:
            values = dict(row.columns())
            name = _row_id(values, number)
            values.pop("id", None)
            prompt = prompt_of_row(name, where, values, text_as=text_as, travels=travels)
            if first.setdefault(prompt.id, where) != where:
                raise RowError("id", f"is {prompt.id!r}, which {first[prompt.id]} has already")
            prompts.append(prompt)
        except RowError as error:
            raise InputError(f"{where}: {error.column} {error.reason}.") from error
    return prompts


def prompt_of_row(
    name: str | int, where: str, values: dict[str, Any], *, text_as: str = "plain", travels: bool = False
) -> PromptFileRow:
    """A row's columns as a prompt, its messages with role and content. Raises RowError."""
    from posttrain_jax.data.prompt_rows import read_prompt_row

    read = read_prompt_row(values, text_as=text_as, travels=travels)
    messages = {"messages": list(read.messages)} if read.messages else {}
    return PromptFileRow(name, where, values | messages, read)


def _row_id(row: dict[str, Any], number: int) -> str | int:
    from posttrain_jax.data.sources import RowError

    name = row.get("id")
    if name is None:
        return number
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise RowError("id", "must be text or a whole number")
    return name


def sampling_id(name: str | int) -> int:
    """The number below 2^31 that a prompt's random numbers depend on: its id, or a hash of any other id."""
    if isinstance(name, int) and 0 <= name < 1 << 31:
        return name
    return int.from_bytes(hashlib.sha256(json.dumps(name).encode()).digest()[:4]) >> 1


def encode(
    prompt: PromptFileRow, tokenizer: PreTrainedTokenizerBase | None, chat: ChatOptions, *, model: str
) -> np.ndarray:
    """The prompt's token ids; `model` is whose tokenizer it is, for errors.

    Raises:
      InputError: names the row; the model has no tokenizer or chat template, or the template refuses the row.
    """
    import numpy as np

    from posttrain_jax.data.prompt_rows import encode_prompt_row
    from posttrain_jax.data.rows import RowError

    assert prompt.read is not None
    if prompt.read.ids is not None:
        return np.asarray(prompt.read.ids, np.int64)
    if tokenizer is None:
        raise InputError(f"{prompt.where}: {model} has no tokenizer; give prompt_ids.")
    try:
        return encode_prompt_row(prompt.read, tokenizer, chat)
    except RowError as error:
        raise InputError(f"{prompt.where}: {error.column} {error.reason}.") from error
    except InputError as error:
        raise InputError(f"{prompt.where}: {error}") from error


def log_prompts(
    prompts: list[PromptFileRow], encoded: list[np.ndarray], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Shows the first prompt as the model reads it, and counts the columns that it does not read."""
    from posttrain_jax.data.rows import unused_text
    from posttrain_jax.data.shown_row import plain_text_warning, shown_row

    if tokenizer is None:
        return
    print(f"first prompt ({prompts[0].where}): {shown_row(tokenizer, encoded[0])}", file=sys.stderr)
    rows = [prompt.read for prompt in prompts if prompt.read is not None]
    unused = collections.Counter(name for read in rows for name in read.unused)
    if unused:
        print(f"columns not used: {unused_text(unused)}", file=sys.stderr)
    plain = sum(read.text is not None for read in rows)
    if plain and tokenizer.chat_template:
        print(plain_text_warning(plain, len(prompts), "--text_as=chat"), file=sys.stderr)
