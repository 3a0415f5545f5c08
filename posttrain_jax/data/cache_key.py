"""The key of a cache entry: a hash of everything that the tokenized result depends on.

That is the rows (for files, their names and contents; for `hf:` and `tfds:`, the rows themselves), the tokenizer, the
chat template, the options, the versions of transformers and tokenizers, and FORMAT_VERSION. Files up to 256 MiB are
hashed whole; of larger ones the size, the time of the last change (ns) and the first and last MiB stand for the rest.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions, resolve_template, shown_dates
from posttrain_jax.data.rows import AS_IN_THE_FILE, ColumnNames, Row
from posttrain_jax.data.sources import read_rows, source_files

FORMAT_VERSION = 5
"""Raise it when the same rows become other tokens, or the files another layout."""

_HASHED_WHOLE = 256 * 2**20


class SourceRows:
    """The rows of a source, which can be read twice: once for the key, once to tokenize them.

    Args:
      source: as of `read_rows`.
      columns: what its columns are called here.
    """

    def __init__(self, source: str, columns: ColumnNames = AS_IN_THE_FILE) -> None:
        self.source = source
        self.columns = columns
        self._files = source_files(source)
        # A stream is downloaded as it is read, so it is read once and held.
        streamed = self._files is None and "streaming=1" in source
        self._held = list(read_rows(source, columns)) if streamed else None

    def read(self) -> Iterator[Row]:
        """The rows, from the start."""
        return iter(self._held) if self._held is not None else read_rows(self.source, self.columns)

    def count(self) -> int | None:
        """About how many rows there are, where that is quick to say: lines of JSON Lines."""
        if self._files is None or any(path.suffix not in (".jsonl", ".ndjson") for path in self._files):
            return None
        lines = 0
        for path in self._files:
            with path.open("rb") as file:
                while block := file.read(2**20):
                    lines += block.count(b"\n")
        return lines

    def digest(self) -> str:
        """A hash of the rows, or of the files that hold them."""
        if self._files is not None:
            return _digest(part for path in self._files for part in (str(path), _file_hash(path)))
        return _digest(canonical(row.value) for row in self.read())


def cache_key(rows: SourceRows, tokenizer_key: str, options: list[Any]) -> str:
    """32 hexadecimal digits; `options` are those that change the result."""
    parts = {
        "format": FORMAT_VERSION,
        "versions": [transformers.__version__, tokenizers.__version__],
        "source": rows.source,
        "rows": rows.digest(),
        "columns": [sorted(rows.columns.renamed.items()), rows.columns.ignored],
        "tokenizer": tokenizer_key,
        "options": options,
    }
    return _digest([canonical(parts)])[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, chat: ChatOptions = DEFAULT_CHAT) -> str:
    """A hash of the vocabulary, the special tokens, and how chats become text (the date only where it is shown)."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # neither is used here, and a call may or may not have reset them
    backend.no_padding()
    own = tokenizer.chat_template or ""
    templates = [resolve_template(tokenizer, chat.template)] if chat.template else []
    templates = templates or ([own] if isinstance(own, str) else [own[name] for name in sorted(own)])
    dates = [date for template in templates for date in shown_dates(template, chat.now)]
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    rest = canonical([dict(chat.variables), chat.text_as, dates])
    return _digest([backend.to_str(), special, *templates, rest])


def canonical(value: Any) -> str:
    """JSON text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)


def _digest(parts: Iterable[str]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()


def _file_hash(path: pathlib.Path) -> str:
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= _HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        ends = file.read(2**20)
        file.seek(-(2**20), 2)
        ends += file.read()
    return _digest([str(status.st_size), str(status.st_mtime_ns), hashlib.sha256(ends).hexdigest()])
