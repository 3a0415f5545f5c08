"""Rows from wherever people keep them: JSON Lines, JSON, Parquet, text, folders, `datasets`, TFDS.

A source is a string: the path of a .jsonl, .ndjson, .json, .parquet or .txt file; a folder of such files, or one
that `datasets.save_to_disk` wrote; `hf:NAME[?config=..&split=..&revision=..&streaming=1&max_rows=N]`, where NAME is
a Hugging Face dataset or a local folder; or `tfds:NAME[?split=..&data_dir=..]`.
A text file is one document per block between blank lines.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from posttrain_jax.errors import InputError

Spec = str | list[tuple[str, float]]


class RowError(Exception):
    """A row that cannot be used: the column (a path such as `messages[1].content`) and the reason."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"{column}: {reason}")
        self.column = column
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Row:
    """One row and where it came from.

    Attributes:
      value: the columns; empty when `error` is set.
      source: the file, or the spec of a dataset.
      line: 1-based line on which the row starts (JSON Lines, JSON, text) or 1-based row number (the others).
      error: why the row could not be read, or None.
    """

    value: dict[str, Any]
    source: str
    line: int
    error: RowError | None = None


def weighted_sources(spec: Spec) -> list[tuple[str, float]]:
    """A spec as a list of (source, weight). Raises InputError on an empty list or a weight that is not positive."""
    if isinstance(spec, str):
        return [(spec, 1.0)]
    pairs = []
    for item in spec:
        if isinstance(item, str) or len(item) != 2 or not isinstance(item[0], str):
            raise InputError(f"a mixture of data is a list of (source, weight), but it holds {item!r}")
        pairs.append((item[0], float(item[1])))
    if not pairs:
        raise InputError("the list of data sources is empty; give a path, or a list of (source, weight)")
    for source, weight in pairs:
        if not (0 < weight < float("inf")):
            raise InputError(
                f"data source {source!r} has weight {weight:g}; a weight must be a positive number"
            )
    return pairs


def source_files(source: str) -> list[pathlib.Path] | None:
    """The files that a path source reads, in order; None for a source that the `datasets` or TFDS library reads.

    Raises InputError when there is no such file, or nothing readable in the folder.
    """
    if source.startswith(("hf:", "tfds:")):
        return None
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        if _saved_by_datasets(path):
            return None
        files = [
            p
            for p in sorted(path.rglob("*"))
            if p.suffix in _READERS and p.is_file() and not _hidden(p, path)
        ]
        if not files:
            raise InputError(f"data folder {source} holds no file that ends in {', '.join(_READERS)}")
        return files
    if not path.exists():
        raise InputError(f"data file {source} does not exist; check data.train and data.eval")
    if path.suffix not in _READERS:
        raise InputError(f"data file {source} must end in one of {', '.join(_READERS)}")
    return [path]


def read_rows(source: str) -> Iterator[Row]:
    """Yields the rows of one source in order. A row that cannot be read comes as a Row with `error` set.

    Raises InputError when the source is missing, empty or unreadable as a whole.
    """
    files = source_files(source)
    if files is None:
        return _library_rows(source)
    return itertools.chain.from_iterable(_file_rows(path) for path in files)


def _file_rows(path: pathlib.Path) -> Iterator[Row]:
    rows = _READERS[path.suffix](path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"data file {path} is empty; it must hold at least one row")
    yield first
    yield from rows


def _saved_by_datasets(path: pathlib.Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


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
                    yield Row(_object(json.loads(text), text), str(path), number)
            except RowError as error:
                yield Row({}, str(path), number, error)
            except json.JSONDecodeError as error:
                reason = f"is broken at character {error.pos + 1}: {error.msg}"
                yield Row({}, str(path), number, RowError("(json)", reason))
            except RecursionError:
                yield Row({}, str(path), number, RowError("(json)", "is nested too deeply"))
            offset += len(line)


def _object(value: Any, text: str) -> dict[str, Any]:
    """`value`, which was parsed from `text`, if it can be a row."""
    if not isinstance(value, dict):
        raise RowError("(json)", f"is a {type(value).__name__}, not an object with columns")
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise RowError(
                "(json)", f"holds {half}, one half of a surrogate pair, which is no character"
            ) from None
    return value


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
    decode = json.JSONDecoder().raw_decode
    at = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            start = at
            value, at = decode(text, at)
            yield Row(_object(value, text[start:at]), str(path), line)
            at = _skip_space(text, at)
            if text[at : at + 1] == ",":
                at = _skip_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except RowError as error:
            yield Row({}, str(path), line, error)
            at = _skip_space(text, at)
            at = _skip_space(text, at + 1) if text[at : at + 1] == "," else at
        except json.JSONDecodeError as error:  # what follows cannot be told apart any more
            reason = f"is broken at line {error.lineno}, column {error.colno}: {error.msg}; nothing after it was read"
            yield Row({}, str(path), error.lineno, RowError("(json)", reason))
            return
        except RecursionError:
            yield Row(
                {}, str(path), line, RowError("(json)", "is nested too deeply; nothing after it was read")
            )
            return
    rest = _skip_space(text, at + 1)
    if rest < len(text):
        reason = "goes on after the array's end; nothing after it was read (write one array, or JSON Lines)"
        yield Row({}, str(path), 1 + text.count("\n", 0, rest), RowError("(json)", reason))


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


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


def _parquet(path: pathlib.Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, str(path), number)
    except pa.ArrowException as error:
        raise InputError(f"data file {path} is not a readable Parquet file: {_one_line(error)}") from None


_READERS: dict[str, Callable[[pathlib.Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _txt,
}


# ---- rows that a library reads


def _library_rows(source: str) -> Iterator[Row]:
    if source.startswith("tfds:"):
        values = _tfds_values(source)
    else:
        values = _hf_values(source)
    rows = (_library_row(value, source, number) for number, value in enumerate(values, 1))
    first = next(rows, None)
    if first is None:
        raise InputError(f"data source {source} is empty; it must hold at least one row")
    return itertools.chain([first], rows)


def _library_row(value: dict[str, Any], source: str, number: int) -> Row:
    try:
        return Row({key: _plain(item, key) for key, item in value.items()}, source, number)
    except RowError as error:
        return Row({}, source, number, error)


def _parse_spec(source: str, prefix: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    name, _, query = source.removeprefix(prefix).partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in known:
            raise InputError(
                f"data source {source} has the unknown option {key!r}; the known are {', '.join(known)}"
            )
    if not name:
        raise InputError(f"data source {source!r} names no dataset; write {prefix}NAME")
    return name, options


def _hf_values(source: str) -> Iterator[dict[str, Any]]:
    import datasets

    name, options = _parse_spec(source, "hf:", ("config", "split", "revision", "streaming", "max_rows"))
    split = options.get("split", "train")
    streaming = options.get("streaming", "0")
    max_rows = options.get("max_rows", "")
    if streaming not in ("0", "1"):
        raise InputError(f"data source {source}: streaming is 0 or 1, not {streaming!r}")
    if max_rows and not (max_rows.isdigit() and int(max_rows) > 0):
        raise InputError(f"data source {source}: max_rows is a positive whole number, not {max_rows!r}")
    path = pathlib.Path(name).expanduser()
    try:
        if path.is_dir() and _saved_by_datasets(path):
            dataset = datasets.load_from_disk(str(path))
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[split]
        else:
            dataset = datasets.load_dataset(
                name,
                options.get("config"),
                split=split,
                streaming=streaming == "1",
                revision=options.get("revision"),
            )
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data source {source} could not be opened: {_one_line(error)}") from None
    return itertools.islice(iter(dataset), int(max_rows) if max_rows else None)


def _tfds_values(source: str) -> Iterator[dict[str, Any]]:
    name, options = _parse_spec(source, "tfds:", ("split", "data_dir"))
    try:
        import tensorflow_datasets as tfds

        rows = tfds.data_source(name, split=options.get("split", "train"), data_dir=options.get("data_dir"))
    except ImportError as error:
        raise InputError(
            f"data source {source} needs a package: {_one_line(error)}; pip install it"
        ) from None
    except (OSError, ValueError, NotImplementedError, AttributeError) as error:
        raise InputError(f"data source {source} could not be opened: {_one_line(error)}") from None
    return (rows[i] for i in range(len(rows)))


def _plain(value: Any, column: str) -> Any:
    """NumPy values and bytes, as TFDS gives them, to Python values. Raises RowError for bytes that are not UTF-8."""
    if isinstance(value, dict):
        return {key: _plain(item, f"{column}.{key}") for key, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(column, f"is not UTF-8 at its byte {error.start}") from None
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), column)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{column}[{i}]") for i, item in enumerate(value)]
    return value


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
