"""A row of a data source, and the error of a row that cannot be used."""

from __future__ import annotations

import dataclasses
from typing import Any

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


def without_columns(row: Row, names: str) -> Row:
    """The row without the columns "a,b"."""
    ignored = names.split(",")
    if not names or row.value.keys().isdisjoint(ignored):
        return row
    return dataclasses.replace(row, value={k: v for k, v in row.value.items() if k not in ignored})


def one_line(text: str, limit: int) -> str:
    """The text in at most about `limit` characters, control characters written as escapes."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
