"""Rows that a library reads: Parquet (Arrow), `datasets` (Arrow, too), TFDS.

Arrow gives every object of a column the same keys: where two rows call tools with other arguments, each gets the
other's arguments, null. So a null key of an object inside a column is taken for one that is not there, at any depth,
and the rows are those of the same data as JSON Lines. Which nulls somebody wrote cannot be told any more; an argument
that is null on purpose survives in JSON Lines, or in Parquet where `arguments` (or `tools`) is JSON text. So does what
else Arrow makes the same in a column's objects when it is written: the order of keys, and whole numbers beside others.
Columns that are null, and nulls in lists, stay.
"""

from __future__ import annotations

import itertools
import pathlib
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.rows import Row, one_line

# What libraries say of damaged bytes is whatever their decoders stumbled over: Arrow's own errors have ValueError,
# KeyError, OSError or MemoryError as a base, and there is text that is not UTF-8, and dates that do not exist.
_UNREADABLE = (ValueError, LookupError, OSError, ArithmeticError, MemoryError, TypeError, RuntimeError)


def parquet_rows(path: pathlib.Path) -> Iterator[Row]:
    """The rows of a Parquet file. Raises InputError when it is damaged, at the row where that shows."""
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield _row(value, str(path), number)
    except _UNREADABLE as error:
        place = f" after row {number:,}" if number else ""
        raise InputError(
            f"data file {path} is not a readable Parquet file{place}: {_reason(error)}; it is damaged, or no Parquet"
        ) from None


def library_rows(source: str) -> Iterator[Row]:
    """The rows of `hf:NAME`, `tfds:NAME` or a folder that `datasets` saved. Raises InputError."""
    values = _tfds_values(source) if source.startswith("tfds:") else _hf_values(source)
    rows = _rows(values, source)
    first = next(rows, None)
    if first is None:
        raise InputError(f"data source {source} is empty; it must hold at least one row")
    return itertools.chain([first], rows)


def _rows(values: Iterator[dict[str, Any]], source: str) -> Iterator[Row]:
    for number in itertools.count(1):
        try:
            value = next(values, None)
        except _UNREADABLE as error:
            raise InputError(
                f"data source {source} cannot be read at row {number:,}: {_reason(error)}"
            ) from None
        if value is None:
            return
        yield _row(value, source, number)


def saved_by_datasets(path: pathlib.Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _row(value: dict[str, Any], source: str, number: int) -> Row:
    return Row({key: _plain(item) for key, item in value.items()}, source, number)


def _plain(value: Any) -> Any:
    """A column's value as JSON has it: lists, objects without their null keys, text, numbers. Bytes that are no text
    (an image's) stay bytes."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


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
    if max_rows and not (max_rows.isascii() and max_rows.isdigit() and 0 < len(max_rows.lstrip("0")) < 19):
        raise InputError(f"data source {source}: max_rows is a positive whole number, not {max_rows!r}")
    path = pathlib.Path(name).expanduser()
    try:
        if path.is_dir() and saved_by_datasets(path):
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
        raise InputError(f"data source {source} could not be opened: {_reason(error)}") from None
    return itertools.islice(iter(dataset), int(max_rows) if max_rows else None)


def _tfds_values(source: str) -> Iterator[dict[str, Any]]:
    name, options = _parse_spec(source, "tfds:", ("split", "data_dir"))
    try:
        import tensorflow_datasets as tfds

        rows = tfds.data_source(name, split=options.get("split", "train"), data_dir=options.get("data_dir"))
    except ImportError as error:
        raise InputError(f"data source {source} needs a package: {_reason(error)}; pip install it") from None
    except (OSError, ValueError, NotImplementedError, AttributeError) as error:
        raise InputError(f"data source {source} could not be opened: {_reason(error)}") from None
    return (rows[i] for i in range(len(rows)))


def _reason(error: Exception) -> str:
    return one_line(" ".join(str(error).split()) or type(error).__name__, 300)
