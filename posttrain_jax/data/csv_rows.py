"""Rows of a CSV file (RFC 4180): a header with the columns' names, and cells, which are text.

A cell's quotes, commas and line breaks stand between double quotes, where a quote is written twice. An empty cell is
null. Cells stay text, so that `007` is no 7, but for columns that hold something else in every format that is read
here: NUMBERS (with true and false), LISTS (as JSON), and TEXTS_OR_CHATS, where a JSON list of messages is a chat.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from posttrain_jax.data.rows import Row, RowError
from posttrain_jax.data.text_rows import decode, parse

_NUMBERS = """
    label rating margin weight probability chosen_score rejected_score score_chosen score_rejected is_safety"""
_LISTS = """
    messages conversations history completions ranks scores ratings chosen_messages rejected_messages prompt_ids
    instruction_id_list kwargs"""
NUMBERS, LISTS = frozenset(_NUMBERS.split()), frozenset(_LISTS.split())
TEXTS_OR_CHATS = frozenset(["prompt", "completion", "chosen", "rejected", "context"])
_MESSAGES = re.compile(r"""\[?\s*\{\s*["'](?:role|content|from|value)["']\s*:""")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_BROKEN = "nothing after it was read (a quote inside a quoted cell is written twice)"


def csv_rows(file: BinaryIO, name: str, *, delimiter: str = ",") -> Iterator[Row]:
    """The rows, whose line is the one that they begin in; a row with too many or too few cells has an error."""
    csv.field_size_limit(sys.maxsize)  # of the process; Python's own limit is 128 KiB
    reader = csv.reader(_text_lines(file), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Row({}, name, line, RowError("(csv)", f"is broken ({error}); {_BROKEN}"))
            return
        except RowError as error:
            yield Row({}, name, line, error)
            return
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = [cell.strip() or "index" for cell in cells]  # pandas writes its index without a name
            problem = _header_problem(header)
            if problem:
                yield Row({}, name, line, RowError("(csv)", problem))
                return
            continue
        yield _row(header, cells, name, line)


def _text_lines(file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        yield decode(line, 0, first=True) if number == 1 else line.decode("utf-8", "surrogateescape")


def _header_problem(header: list[str]) -> str:
    twice = next((cell for cell in header if header.count(cell) > 1), None)
    if twice is not None:
        return f"has the column {twice!r} twice in its header"
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        return f"has the header {header[0]!r}: the cells are separated by something else than commas; write commas"
    return ""


def _row(header: list[str], cells: list[str], name: str, line: int) -> Row:
    if len(cells) != len(header):
        return Row(
            {},
            name,
            line,
            RowError(
                "(csv)", f"has {len(cells)} cells, and the header has {len(header)}: {', '.join(header)}"
            ),
        )
    for column, cell in zip(header, cells, strict=True):
        wrong = _NOT_UTF8.search(cell)
        if wrong:
            return Row(
                {}, name, line, RowError(column, f"holds the byte 0x{ord(wrong[0]) - 0xDC00:02x}, not UTF-8")
            )
    return Row({column: cell or None for column, cell in zip(header, cells, strict=True)}, name, line)


def typed(row: Row) -> Row:
    """The row with its cells as numbers, lists and chats where their column says so."""
    values: dict[str, Any] = {}
    for column, cell in row.value.items():
        try:
            values[column] = _typed(column, cell)
        except RowError as error:
            return Row({}, row.source, row.line, error)
    return Row(values, row.source, row.line, row.error)


def _typed(column: str, cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    text = cell.strip()
    if column in NUMBERS:
        try:
            value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
        except ValueError:
            return cell  # a margin may be a word; what may not is refused by whoever reads it
        return value if isinstance(value, int | float) else cell
    if column in LISTS:
        try:
            return parse(text, column)
        except RowError as error:
            raise RowError(column, f"should hold JSON, but it {error.reason}") from None
    if column in TEXTS_OR_CHATS and _MESSAGES.match(text):
        try:
            return parse(text, column)
        except RowError as error:
            raise RowError(column, f"begins like JSON messages, but it {error.reason}") from None
    return cell
