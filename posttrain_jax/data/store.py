"""Tokenized sequences on disk: one folder of .npy files per data source, memory-mapped back.

    tokens.npy     int32 [N]   all sequences, one after another
    loss_mask.npy  bool  [N]   True where the token is trained
    offsets.npy    int64 [S+1] sequence s is tokens[offsets[s]:offsets[s + 1]]
    files.npy      int32 [S]   which of meta["files"] the sequence's row came from
    lines.npy      int64 [S]   its line (or number) in that file
    meta.json                  file names, the report, a hash of the sequences
    rejected.jsonl             bad rows with their reasons
    sha256.json                a hash of every other file, checked when the folder is read

The folder's name is a hash of everything that the result depends on: the rows (for files, their names and contents;
for `hf:` and `tfds:`, the rows themselves), what their columns are called, the tokenizer, the chat template, the
options, the versions of transformers and tokenizers, and FORMAT_VERSION. Files up to 256 MiB are hashed whole; of
larger ones the size, the time of the last change (ns) and the first and last MiB stand for the rest.

A folder is written under a temporary name and renamed when it is complete, so that a reader sees all of it or
nothing, and of two processes that build the same folder one wins and both read the winner's.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions, resolve_template, shown_dates
from posttrain_jax.data.rows import AS_IN_THE_FILE, ColumnNames, Row, RowError
from posttrain_jax.data.sources import read_rows, source_files

log = logging.getLogger(__name__)

_SUMS = "sha256.json"
_ARRAYS = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "offsets": np.int64,
    "files": np.int32,
    "lines": np.int64,
}


@dataclasses.dataclass(frozen=True)
class StoredSequences:
    """What `read_store` maps back; see the module's docstring for the arrays."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    meta: dict[str, Any]


class StoreWriter:
    """Appends sequences to the files of a folder, holding only one chunk in memory. Use it as a context manager."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._files = {name: (folder / f"{name}.npy").open("w+b") for name in _ARRAYS}
        self._counts = dict.fromkeys(_ARRAYS, 0)
        self._sha = hashlib.sha256()
        for name in _ARRAYS:
            self._header(name)
        self._append("offsets", np.zeros(1, np.int64))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, file in self._files.items():
            if kind is None:
                file.seek(0)
                self._header(name)
                file.flush()
                os.fsync(file.fileno())
            file.close()

    def append(
        self,
        tokens: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        files: Sequence[int],
        lines: Sequence[int],
    ) -> None:
        """Appends some sequences with the file index and line of each."""
        if not tokens:
            return
        for sequence, mask in zip(tokens, masks, strict=True):
            self._sha.update(len(sequence).to_bytes(8, "little"))
            self._sha.update(np.ascontiguousarray(sequence, np.int32).tobytes())
            self._sha.update(np.ascontiguousarray(mask, np.bool_).tobytes())
        ends = self._counts["tokens"] + np.cumsum([len(sequence) for sequence in tokens])
        self._append("tokens", np.concatenate(tokens))
        self._append("loss_mask", np.concatenate(masks))
        self._append("offsets", ends)
        self._append("files", np.asarray(files))
        self._append("lines", np.asarray(lines))

    def sha256(self) -> str:
        """A hash of all sequences and masks so far, in order."""
        return self._sha.hexdigest()

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, _ARRAYS[name]).tobytes())
        self._counts[name] += len(values)

    def _header(self, name: str) -> None:
        # NumPy pads the header so that a one-dimensional array can grow without moving its data.
        np.lib.format.write_array_header_1_0(
            self._files[name],
            {
                "descr": np.lib.format.dtype_to_descr(np.dtype(_ARRAYS[name])),
                "fortran_order": False,
                "shape": (self._counts[name],),
            },
        )


def read_store(folder: pathlib.Path) -> StoredSequences | None:
    """Maps a folder back into memory; None when it is not there, or (with a warning) is not as it was written."""
    if not folder.exists():
        return None
    problem = _damage(folder)
    if problem is not None:
        log.warning("The cache %s is not as it was written (%s); it is made again.", folder, problem)
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {name: _map(folder / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
    except (OSError, ValueError):
        return None
    store = StoredSequences(**arrays, meta=meta)
    sequences = len(store.lines)
    whole = (
        len(store.offsets) == sequences + 1
        and len(store.files) == sequences
        and len(store.tokens) == len(store.loss_mask) == store.offsets[-1]
    )
    return store if whole else None


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the files of a folder, in words, or None.

    Every start reads all of them for it: 0.65 GiB/s on one core, so a second for each 130 million tokens.
    """
    try:
        sums = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
        files = _sums(folder)
    except (OSError, ValueError, RecursionError) as error:
        return f"{_SUMS}: {error}"
    if not isinstance(sums, dict) or sums.keys() != files.keys():
        return "other files"
    wrong = [name for name, digest in files.items() if sums[name] != digest]
    return f"{wrong[0]} has changed" if wrong else None


def _sums(folder: pathlib.Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != _SUMS:
            with path.open("rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _map(path: pathlib.Path, dtype: type) -> np.ndarray:
    array = (
        np.lib.format.open_memmap(path, mode="r") if _holds_data(path) else np.load(path, allow_pickle=False)
    )
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{path} holds {array.dtype} of rank {array.ndim}")
    return array


def _holds_data(path: pathlib.Path) -> bool:
    """An empty array cannot be memory-mapped."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return shape != (0,)


@contextlib.contextmanager
def publish(
    folder: pathlib.Path, *, read: Callable[[pathlib.Path], object] = read_store
) -> Iterator[pathlib.Path]:
    """Gives a new folder to write into and renames it to `folder`; one that another process made first is kept, if
    `read` does not say None of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        (scratch / _SUMS).write_text(json.dumps(_sums(scratch)), encoding="utf-8")
        if folder.exists() and read(folder) is None:
            broken = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-broken-", dir=folder.parent))
            with contextlib.suppress(OSError):  # another process may have moved it away first
                os.rename(folder, broken / "was")
            shutil.rmtree(broken, ignore_errors=True)
        try:
            os.rename(scratch, folder)
        except OSError:
            if read(folder) is None:
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---- bad rows


def rejection(row: Row, error: RowError) -> str:
    """A bad row and its reason as a line of JSON."""
    record: dict[str, Any] = {
        "source": row.source,
        "line": row.line,
        "column": error.column,
        "reason": error.reason,
    }
    if row.value:
        record["row"] = row.value
    return json.dumps(record, ensure_ascii=False, default=str)


class _HasReport(Protocol):
    def __len__(self) -> int: ...
    @property
    def report(self) -> Any: ...


def check_sources(
    sources: Sequence[_HasReport],
    folders: Sequence[pathlib.Path],
    on_bad_row: str,
    rejected_path: pathlib.Path | None,
) -> None:
    """Stops on the first bad row unless bad rows are skipped, and where nothing is left; lists what was skipped.

    Args:
      sources: with the counts of their reports.
      folders: where each source's `rejected.jsonl` lies.
      on_bad_row: "stop" or "skip".
      rejected_path: a file for the bad rows of all sources that are skipped, removed where there are none.

    Raises:
      InputError: a bad row (file, line, column and reason), or a source of which no row is left.
    """
    counts = [source.report.bad for source in sources]
    bad = sum(counts)
    if bad and on_bad_row == "stop":
        folder = next(folder for count, folder in zip(counts, folders, strict=True) if count)
        with (folder / "rejected.jsonl").open(encoding="utf-8") as file:
            first = json.loads(file.readline())
            others = collections.Counter(json.loads(line)["column"] for line in file)
        more = f" ({bad - 1:,} more bad rows)" if bad > 2 else " (1 more bad row)" if bad == 2 else ""
        if len(others) > 1:
            named = ", ".join(f"{count:,} in {name}" for name, count in others.most_common(4))
            more = more[:-1] + f": {named}{', ...' if len(others) > 4 else ''})"
        raise InputError(
            f"{first['source']}, line {first['line']}, {first['column']}: {first['reason']}{more}; "
            "fix the data, or set data.on_bad_row=skip to leave bad rows out"
        )
    for source in sources:
        if not len(source):
            advice = "; raise data.max_length" if source.report.dropped else ""
            raise InputError(f"no row is left to train on: {source.report.text()}{advice}")
    if rejected_path is not None and on_bad_row == "skip":
        _write_rejected(rejected_path, bad, folders)


def _write_rejected(path: pathlib.Path, bad: int, folders: Sequence[pathlib.Path]) -> None:
    """Gathers the sources' bad rows in one file; there is none when no row is bad."""
    path.unlink(missing_ok=True)
    if not bad:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        for folder in folders:
            with (folder / "rejected.jsonl").open("rb") as file:
                shutil.copyfileobj(file, out)


# ---- the key

FORMAT_VERSION = 6
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
