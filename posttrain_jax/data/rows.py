"""A row of a data source, what its columns are called, and the error of a row that cannot be used."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.core.errors import InputError

_COLUMN_CHARACTERS, _REASON_CHARACTERS = 120, 400


class RowError(Exception):
    """A row that cannot be used: the column (a path such as `messages[1].content`) and the reason.

    Both are kept to one line of bounded length, whatever the row holds; a long reason loses its middle, for its end
    says what to do.
    """

    def __init__(self, column: str, reason: str) -> None:
        self.column = one_line(column, _COLUMN_CHARACTERS)
        self.reason = one_line(reason, _REASON_CHARACTERS)
        super().__init__(self.column, self.reason)

    def __str__(self) -> str:
        return f"{self.column}: {self.reason}"


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

    def columns(self) -> dict[str, Any]:
        """The columns. Raises the row's error where there is one."""
        if self.error is not None:
            raise self.error
        return self.value


@dataclasses.dataclass(frozen=True)
class ColumnNames:
    """What the columns of a file are called here.

    Attributes:
      renamed: our name -> the name in the file (`data.columns`).
      ignored: names in the file of columns that are left out, "a,b" (`data.ignore_columns`); they go first.
    """

    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: str = ""

    def row(self, row: Row) -> Row:
        """The row under our names. A column that stands there under both names is an error of the row."""
        left_out = self.ignored.split(",")
        if (not self.renamed or row.error) and row.value.keys().isdisjoint(left_out):
            return row
        kept = {name: value for name, value in row.value.items() if name not in left_out}
        ours = {old: new for new, old in self.renamed.items() if old in kept}
        for old, new in ours.items():
            if kept.get(new) is not None and new not in ours:
                reason = (
                    f"stands in the row beside {old!r}, which data.columns calls {new}; leave one of the two out with "
                    f"data.ignore_columns={new} or without the entry in data.columns"
                )
                return dataclasses.replace(row, value={}, error=RowError(new, reason))
        kept = {name: value for name, value in kept.items() if name in ours or name not in ours.values()}
        return dataclasses.replace(row, value={ours.get(name, name): value for name, value in kept.items()})

    def check(self, rows: Sequence[Row], source: str) -> None:
        """Refuses names that none of a source's first rows has, neither in the file's words nor in ours.

        Raises:
          InputError: with the nearest name that there is.
        """
        there = dict.fromkeys(name for row in rows for name in row.value)
        for new, old in self.renamed.items():
            if there and old not in there and new not in there:
                near = difflib.get_close_matches(old, there, n=1, cutoff=0.0)[0]
                raise InputError(
                    f"data.columns calls a column {old!r} {new}, and {one_line(source, 300)} has none of that name in "
                    f"its first {len(rows)} rows; the nearest is {one_line(near, 60)!r}"
                )


AS_IN_THE_FILE = ColumnNames()


def read_columns(value: str | Mapping[str, str], name: str) -> dict[str, str]:
    """`data.columns`, a mapping or its JSON text, as a mapping.

    Raises:
      InputError: it is no object of texts, or calls one column by two names; `name` is what to call it.
    """
    given: Any = value
    if isinstance(value, str):
        try:
            given = json.loads(value) if value.strip() else {}
        except ValueError:
            given = None
    renamed = dict(given) if isinstance(given, Mapping) else {"": ""}
    if not all(isinstance(text, str) and text for pair in renamed.items() for text in pair):
        raise InputError(
            f"{name} is {one_line(repr(value), 200)}; write our name and the one in the file, such as "
            '{"prompt": "question", "completion": "best_answer"}'
        )
    twice = next((old for old in renamed.values() if list(renamed.values()).count(old) > 1), None)
    if twice is not None:
        raise InputError(f"{name} calls the column {one_line(twice, 60)!r} by two names; keep one")
    return renamed


def one_line(text: str, limit: int) -> str:
    """The text in at most about `limit` characters, control characters written as escapes."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
