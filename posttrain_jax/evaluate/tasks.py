"""What every task evaluation is made of: rows read from a source, prompts encoded, and a result to write down."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import jax
from ml_collections import ConfigDict as Config

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.data.sources import Row, RowError, read_rows
from posttrain_jax.demo.assets import fetch
from posttrain_jax.evaluate.statistics import Estimate, ratio_estimates

Item = TypeVar("Item")
Progress = Callable[[int, int], None]
"""Called with (how many are done, how many there are)."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The result of an evaluation.

    Attributes:
      metrics: by name, each with its interval.
      counts: how much was looked at, and what went wrong.
      rows: one JSON object per row; each holds "id" and "metrics" (name -> (sum, count), which `comparison` pairs),
        and for a task "prompt" (the text of the prompt).
      by_type: kind of row or check -> its counts.
      data: what was evaluated on, as `print_data` printed it.
    """

    metrics: dict[str, Estimate]
    counts: dict[str, int]
    rows: list[dict[str, Any]]
    by_type: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    data: str = ""


def summarize(
    rows: list[dict[str, Any]],
    *,
    counts: dict[str, int],
    by_type: dict[str, dict[str, int]],
    bootstrap: int,
    seed: int,
    shares: bool = False,
) -> TaskResult:
    """The result of rows that carry their "metrics" (which are `shares`, or not); `counts` come after the number of
    rows."""
    metrics = ratio_estimates([row["metrics"] for row in rows], resamples=bootstrap, seed=seed, shares=shares)
    return TaskResult(metrics, {"rows": len(rows), **counts}, rows, by_type)


def print_data(count: int, source: str, *, first: int = 0, skipped: int = 0) -> str:
    """Prints what is evaluated on, before that takes its time, and returns it.

    Args:
      count: rows, prompts or sequences that are used.
      source: where they come from, in words.
      first: `data.first`.
      skipped: rows that could not be used.
    """
    text = f"{count:,} of {source}"
    text += f", the first of them (data.first={first})" if first else ""
    text += f"; {skipped:,} rows could not be used and are left out" if skipped else ""
    if jax.process_index() == 0:
        print(f"data: {text}", flush=True)
    return text


@dataclasses.dataclass(frozen=True)
class Items(Generic[Item]):
    """What the rows of a source were made into, and how many rows could not be used."""

    items: list[Item]
    skipped: int


def local_source(source: str) -> str:
    """`asset:NAME` as the path of the fetched file; any other source as it is.

    Raises:
      InputError: there is no such asset, or it cannot be fetched.
    """
    return str(fetch(source.removeprefix("asset:"))) if source.startswith("asset:") else source


def task_rows(source: str) -> Iterator[Row]:
    """The rows of `asset:NAME` or of any source of `data.sources`.

    Raises:
      InputError: there is no such source, or it is empty.
    """
    if not source:
        raise InputError("data.eval is empty; give a path, a data set, or asset:NAME.")
    return read_rows(local_source(source))


def read_items(
    rows: Iterable[Row],
    convert: Callable[[Row, str | int], Item],
    *,
    key: str = "id",
    first: int = 0,
    on_bad_row: str = "stop",
) -> Items[Item]:
    """Makes an item of every row.

    Args:
      rows: from `task_rows`, or made otherwise.
      convert: takes a row and its id: what the column `key` holds, or the row's number, from 0. Raises RowError for a
        row that it cannot use.
      key: the column of the rows' own ids.
      first: only so many items; 0 = all.
      on_bad_row: "stop" or "skip", for rows that cannot be used.

    Raises:
      InputError: (with "stop") a row that cannot be used, by file and line; or no row that can.
    """
    if on_bad_row not in ("stop", "skip"):
        raise InputError(f"data.on_bad_row is {on_bad_row!r}; use stop or skip.")
    check_first(first)
    items: list[Item] = []
    ids: set[str | int] = set()
    skipped = 0
    for number, row in enumerate(rows):
        own = row.value.get(key)
        row_id = own if isinstance(own, str | int) and not isinstance(own, bool) else number
        try:
            if row.error is not None:
                raise row.error
            if row_id in ids:
                raise RowError(key, f"is {row_id!r}, which an earlier row has")
            items.append(convert(row, row_id))
        except RowError as error:
            if on_bad_row == "stop":
                raise InputError(
                    f"{row.source}, line {row.line}, {error.column}: {error.reason}; correct the row (or leave such "
                    "rows out with --config.data.on_bad_row=skip)."
                ) from error
            skipped += 1
        ids.add(row_id)
        if first and len(items) == first:
            break
    if not items:
        raise InputError(f"There is nothing to evaluate: none of the {skipped} rows can be used.")
    return Items(items, skipped)


def check_first(first: int) -> None:
    """Raises InputError where `data.first` is no number of rows."""
    if first < 0:
        raise InputError(f"data.first is {first}; it must be 0 (all rows) or more.")


def column(row: dict[str, Any], name: str) -> Any:
    """The value in a column.

    Raises:
      RowError: it is not there, or null.
    """
    value = row.get(name)
    if value is None:
        raise RowError(name, f"is missing (the columns are {', '.join(row) or 'none'})")
    return value


def text_column(row: dict[str, Any], name: str) -> str:
    """A column's text; a number is written out.

    Raises:
      RowError: it is not there, is not text, or is empty.
    """
    value = column(row, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value) if isinstance(value, int) else f"{value:.15g}"
    if not isinstance(value, str):
        raise RowError(name, f"is a {type(value).__name__}, not text")
    if not value.strip():
        raise RowError(name, "is empty")
    return value


class PromptTemplate:
    """A text in which `{column}` stands for a row's column; `{{` and `}}` are braces.

    Raises:
      InputError: the text is not such a template, or names no column.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise InputError(f"data.prompt is {text!r}, which is no template: {error}.") from error
        names = [name for _, name, _, _ in parts if name is not None]
        odd = [name for _, name, how, as_what in parts if name is not None and (not name or how or as_what)]
        if not names or odd or any(character in name for name in names for character in ".["):
            raise InputError(
                f"data.prompt is {text!r}; it must name columns as {{question}}, at least one, and nothing else."
            )
        self._parts = parts

    def fill(self, row: dict[str, Any]) -> str:
        """The prompt of a row.

        Raises:
          RowError: a column that the template names is not there, is not text, or is empty.
        """
        return "".join(
            literal + (text_column(row, name) if name is not None else "")
            for literal, name, _, _ in self._parts
        )


def chat_options(config: Config) -> ChatOptions:
    """How a task's prompts are rendered, where they are chats."""
    return ChatOptions(variables=dict(config.data.chat_template_kwargs))
