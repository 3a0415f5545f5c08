"""Rows from wherever people keep them: JSON Lines, JSON, CSV, Parquet, text, folders, `datasets`, TFDS.

A source is a string: the path of a .jsonl, .ndjson, .json, .csv, .tsv or .txt file (each also with .gz) or of a
.parquet file; a folder of such files, or one that `datasets.save_to_disk` wrote;
`hf:NAME[?config=..&split=..&revision=..&streaming=1&max_rows=N]`, where NAME is a Hugging Face dataset or a local
folder; or `tfds:NAME[?split=..&data_dir=..]`. How the text files are read say `text_rows.py` and `csv_rows.py`.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.installed import find_file
from posttrain_jax.data.csv_rows import csv_rows, tsv_rows, typed
from posttrain_jax.data.library_rows import library_rows, parquet_rows, saved_by_datasets
from posttrain_jax.data.rows import AS_IN_THE_FILE, ColumnNames, one_line
from posttrain_jax.data.rows import Row as Row
from posttrain_jax.data.rows import RowError as RowError
from posttrain_jax.data.text_rows import json_lines, json_values, text_blocks

MIXTURE = 'write [["SOURCE", weight], ...], such as [["a.jsonl", 3], ["b.jsonl", 1]]'
Spec = str | list[tuple[str, float]]
_FIRST_ROWS = 100
"""So many are looked at for the columns that `data.columns` names."""


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
        path = find_file(source)
        if not path.exists():
            raise InputError(f"data file {_shown(source)} does not exist; check data.train and data.eval")
        if path.is_dir():
            return None if saved_by_datasets(path) else _files_in(path)
        if not _suffix(path):
            raise InputError(f"data file {_shown(source)} must end in one of {_KINDS}")
        return [_readable(path)]
    except OSError as error:
        raise InputError(f"data file {_shown(source)} cannot be read: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:  # a null byte in the name; a home folder that nobody has
        raise InputError(f"data file {_shown(source)} is no path: {error}") from None


def _files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = [p for p in sorted(folder.rglob("*")) if _suffix(p) and not _hidden(p, folder)]
    files = [_readable(path) for path in paths if not path.is_dir()]
    if not files:
        raise InputError(f"data folder {folder} holds no file that ends in {_KINDS}")
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


def read_rows(source: str, columns: ColumnNames = AS_IN_THE_FILE) -> Iterator[Row]:
    """Yields the rows of one source in order. A row that cannot be read comes as a Row with `error` set.

    Args:
      source: see the top of this file.
      columns: what its columns are called here.

    Raises:
      InputError: the source is missing, empty or unreadable as a whole, or has none of the columns that are renamed.
    """
    files = source_files(source)
    if files is None:
        return map(columns.row, _checked(library_rows(source), source, columns))
    return itertools.chain.from_iterable(_file_rows(path, columns) for path in files)


def _checked(rows: Iterator[Row], source: str, columns: ColumnNames) -> Iterator[Row]:
    """The same rows, after a look at the first ones for the columns that are renamed."""
    first = list(itertools.islice(rows, _FIRST_ROWS if columns.renamed else 0))
    columns.check(first, source)
    return itertools.chain(first, rows)


def _file_rows(path: pathlib.Path, columns: ColumnNames) -> Iterator[Row]:
    try:
        rows = _checked(_rows_of(path), str(path), columns)
        first = next(rows, None)
        if first is None:
            raise InputError(f"data file {path} is empty; it must hold at least one row")
        is_csv = _suffix(path) in (".csv", ".tsv")
        for row in itertools.chain([first], rows):
            named = columns.row(row)
            yield typed(named) if is_csv else named
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:  # of gzip
        raise InputError(f"data file {path} is cut off or damaged ({error}); pack it again") from None


def _rows_of(path: pathlib.Path) -> Iterator[Row]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from parquet_rows(path)
        return
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        yield from _OPENED[suffix](cast("BinaryIO", file), str(path))


def _suffix(path: pathlib.Path) -> str:
    """What says how a file is read, ".csv" of "rows.CSV" and of "rows.csv.gz"; "" where nothing does."""
    suffix = pathlib.PurePath(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in _OPENED or path.suffix.lower() == ".parquet" else ""


def _hidden(path: pathlib.Path, root: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


_OPENED: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_values,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".txt": text_blocks,
}
_KINDS = f"{', '.join([*_OPENED, '.parquet'])} (all but the last also with .gz)"
