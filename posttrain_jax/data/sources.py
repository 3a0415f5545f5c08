"""Rows from wherever people keep them: JSON Lines, JSON, Parquet, text, folders, `datasets`, TFDS.

A source is a string: the path of a .jsonl, .ndjson, .json, .parquet or .txt file; a folder of such files, or one
that `datasets.save_to_disk` wrote; `hf:NAME[?config=..&split=..&revision=..&streaming=1&max_rows=N]`, where NAME is
a Hugging Face dataset or a local folder; or `tfds:NAME[?split=..&data_dir=..]`.
A text file is one document per block between blank lines.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import Any

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.json_text import parse, parse_at, skip_space
from posttrain_jax.data.library_rows import library_rows, parquet_rows, saved_by_datasets
from posttrain_jax.data.rows import Row as Row
from posttrain_jax.data.rows import RowError as RowError
from posttrain_jax.data.rows import one_line

MIXTURE = 'write [["SOURCE", weight], ...], such as [["a.jsonl", 3], ["b.jsonl", 1]]'
Spec = str | list[tuple[str, float]]


def weighted_sources(spec: Spec) -> list[tuple[str, float]]:
    """A spec as a list of (source, weight). Raises InputError on an empty list or a weight that is not positive."""
    if isinstance(spec, str):
        return [(spec, 1.0)]
    pairs = []
    for item in spec:
        if not isinstance(item, list | tuple) or len(item) != 2 or not isinstance(item[0], str):
            raise InputError(f"a mixture of data holds {one_line(repr(item), 200)}; {MIXTURE}")
        pairs.append((item[0], _weight(*item)))
    if not pairs:
        raise InputError(f"the mixture of data is empty; {MIXTURE}")
    return pairs


def _weight(source: str, value: Any) -> float:
    try:
        weight = float(value)
    except (ValueError, TypeError, OverflowError):
        weight = math.nan
    if not (0 < weight < math.inf):
        shown = one_line(repr(value), 60)
        raise InputError(
            f"data source {_shown(source)!r} has weight {shown}; a weight must be a positive number"
        )
    return weight


def source_files(source: str) -> list[pathlib.Path] | None:
    """The files that a path source reads, in order; None for a source that the `datasets` or TFDS library reads.

    Raises InputError when there is no such file, it cannot be read, or nothing readable is in the folder.
    """
    if source.startswith(("hf:", "tfds:")):
        return None
    if not source.strip():
        raise InputError(
            "a data source is empty; give a path (. for the current folder), hf:NAME or tfds:NAME"
        )
    try:
        path = pathlib.Path(source).expanduser()
        if not path.exists():
            raise InputError(f"data file {_shown(source)} does not exist; check data.train and data.eval")
        if path.is_dir():
            return None if saved_by_datasets(path) else _files_in(path)
        if path.suffix not in _READERS:
            raise InputError(f"data file {_shown(source)} must end in one of {', '.join(_READERS)}")
        return [_readable(path)]
    except OSError as error:
        raise InputError(f"data file {_shown(source)} cannot be read: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:  # a null byte in the name; a home folder that nobody has
        raise InputError(f"data file {_shown(source)} is no path: {error}") from None


def _files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    found = [p for p in sorted(folder.rglob("*")) if p.suffix in _READERS and not _hidden(p, folder)]
    files = [_readable(path) for path in found if not path.is_dir()]
    if not files:
        raise InputError(f"data folder {folder} holds no file that ends in {', '.join(_READERS)}")
    return files


def _readable(path: pathlib.Path) -> pathlib.Path:
    """The path, of a file that can be opened. A pipe would be waited for, and cannot be read twice."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(
            f"data file {path} is no regular file (a pipe or a device); copy its contents to a file"
        )
    if not os.access(path, os.R_OK):
        raise InputError(f"data file {path} may not be read by this user; check its permissions")
    return path


def _shown(source: str) -> str:
    return one_line(source, 300)


def read_rows(source: str) -> Iterator[Row]:
    """Yields the rows of one source in order. A row that cannot be read comes as a Row with `error` set.

    Raises InputError when the source is missing, empty or unreadable as a whole.
    """
    files = source_files(source)
    if files is None:
        return library_rows(source)
    return itertools.chain.from_iterable(_file_rows(path) for path in files)


def _file_rows(path: pathlib.Path) -> Iterator[Row]:
    try:
        rows = _READERS[path.suffix](path)
        first = next(rows, None)
        if first is None:
            raise InputError(f"data file {path} is empty; it must hold at least one row")
        yield first
        yield from rows
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror or error}") from None


def _hidden(path: pathlib.Path, root: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


# ---- JSON Lines, JSON, text: bytes to lines


def _decode(data: bytes, offset: int, first: bool) -> str:
    """UTF-8 text of `data`, which starts at byte `offset` of its file; a BOM counts only at the file's start."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        hint = "; the file looks like UTF-16" if first and data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        # utf-8-sig counts from after the BOM.
        start = error.start + (3 if first and data.startswith(b"\xef\xbb\xbf") else 0)
        byte = data[start]
        raise RowError(
            "(encoding)", f"byte 0x{byte:02x} at byte offset {offset + start} of the file is not UTF-8{hint}"
        ) from None


def _jsonl(path: pathlib.Path) -> Iterator[Row]:
    offset = 0
    with path.open(
        "rb"
    ) as file:  # iterating over a binary file splits on b"\n" alone: U+2028 stays in its line
        for number, line in enumerate(file, 1):
            try:
                text = _decode(line, offset, first=number == 1)
                if text.strip():
                    yield _row(parse(text, "(json)"), path, number)
            except RowError as error:
                yield Row({}, str(path), number, error)
            offset += len(line)


def _row(value: Any, path: pathlib.Path, line: int) -> Row:
    if isinstance(value, dict):
        return Row(value, str(path), line)
    return Row(
        {}, str(path), line, RowError("(json)", f"is a {type(value).__name__}, not an object with columns")
    )


def _json(path: pathlib.Path) -> Iterator[Row]:
    """A JSON array, element by element so that each knows its line; a file that is no array is JSON Lines."""
    data = path.read_bytes()
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
        yield from _jsonl(path)
        return
    try:
        text = _decode(data, 0, first=True)
    except RowError as error:
        start = int(error.reason.split("byte offset ")[1].split()[0])
        yield Row({}, str(path), data.count(b"\n", 0, start) + 1, error)
        return
    yield from _json_array(path, text)


def _json_array(path: pathlib.Path, text: str) -> Iterator[Row]:
    at = skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            parsed = parse_at(text, at)
            at = skip_space(text, parsed.end)
            if parsed.problem:
                yield Row({}, str(path), line, RowError("(json)", parsed.problem))
            else:
                yield _row(parsed.value, path, line)
            if text[at : at + 1] == ",":
                at = skip_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except json.JSONDecodeError as error:  # what follows cannot be told apart any more
            reason = f"is broken at line {error.lineno}, column {error.colno}: {error.msg}; nothing after it was read"
            yield Row({}, str(path), error.lineno, RowError("(json)", reason))
            return
        except RecursionError:
            yield Row(
                {}, str(path), line, RowError("(json)", "is nested too deeply; nothing after it was read")
            )
            return
    rest = skip_space(text, at + 1)
    if rest < len(text):
        reason = "goes on after the array's end; nothing after it was read (write one array, or JSON Lines)"
        yield Row({}, str(path), 1 + text.count("\n", 0, rest), RowError("(json)", reason))


def _txt(path: pathlib.Path) -> Iterator[Row]:
    block: list[str] = []
    broken: Row | None = None
    start = offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(itertools.chain(file, [b""]), 1):
            text: str | None = None
            try:
                text = _decode(line, offset, first=number == 1)
            except RowError as error:  # the lines around it are no documents of their own
                broken = broken or Row({}, str(path), number, error)
            offset += len(line)
            if text is None or text.strip():
                start = start if block else number
                block.append(text or "")
            elif block:
                yield broken or Row({"text": "".join(block).rstrip("\r\n")}, str(path), start)
                block, broken = [], None


_READERS: dict[str, Callable[[pathlib.Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": parquet_rows,
    ".txt": _txt,
}
