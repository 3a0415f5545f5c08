"""Rows of a CSV file (RFC 4180) or a tab-separated one: a header with the columns' names, and cells, which are text.

In CSV a cell's quotes, commas and line breaks stand between double quotes, where a quote is written twice. In a
tab-separated file a tab or a line end always ends the cell; quotes around a cell are taken off where they close in it,
and are text elsewhere. An empty cell is null.
Cells stay text, so that `007` is no 7, and who needs a number reads it from the text; but JSON lists and objects are
read in LISTS, and in TEXTS_OR_CHATS a JSON list of messages, which is a chat.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from posttrain_jax.data.rows import Row, RowError
from posttrain_jax.data.text_rows import decode, parse, unread

_LISTS = """
    messages conversations history completions ranks scores ratings chosen_messages rejected_messages prompt_ids
    instruction_id_list kwargs"""
LISTS = frozenset(_LISTS.split())
TEXTS_OR_CHATS = frozenset(["prompt", "completion", "chosen", "rejected", "context"])
_MESSAGES = re.compile(r"""\[\s*\{.*?["'](?:role|from)["']\s*:""", re.DOTALL)
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_Record = tuple[int, list[str]]
"""The line that a row begins in, and its cells."""


def csv_rows(file: BinaryIO, name: str) -> Iterator[Row]:
    """The rows, whose line is the one that they begin in; a row with too many or too few cells has an error.

    Raises:
      InputError: the header or a cell's quotes are broken, so that the rest cannot be read.
    """
    return _rows(_csv_records(file, name), name)


def tsv_rows(file: BinaryIO, name: str) -> Iterator[Row]:
    """The same of a tab-separated file, where every line is a row. Raises InputError: the header is broken."""
    return _rows(_tsv_records(file, name), name)


def _csv_records(file: BinaryIO, name: str) -> Iterator[_Record]:
    csv.field_size_limit(sys.maxsize)  # of the process; Python's own limit is 128 KiB
    reader = csv.reader(_text_lines(file, name), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = f"is broken ({error}; a quote inside a quoted cell is written twice)"
            raise unread(name, line, reason) from None
        if cells is None:
            return
        yield line, cells


def _tsv_records(file: BinaryIO, name: str) -> Iterator[_Record]:
    for number, line in enumerate(_text_lines(file, name), 1):
        text = line.removesuffix("\n").removesuffix("\r")
        yield number, [_unquoted(cell) for cell in text.split("\t")] if text else []


def _unquoted(cell: str) -> str:
    quoted = _QUOTED.fullmatch(cell)
    return quoted[1].replace('""', '"') if quoted else cell


def _text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if number > 1:
            yield line.decode("utf-8", "surrogateescape")
            continue
        try:
            yield decode(line, 0, first=True)
        except RowError as error:
            raise unread(name, 1, f"has an error: {error.reason}") from None


def _rows(records: Iterator[_Record], name: str) -> Iterator[Row]:
    header: list[str] = []
    for line, cells in records:
        if header and cells:
            yield _row(header, cells, name, line)
        elif cells:
            header = [cell.strip() for cell in cells]
            header[0] = header[0] or "index"  # pandas writes its index without a name
            problem = _header_problem(header)
            if problem:
                raise unread(name, line, problem)


def _header_problem(header: list[str]) -> str:
    twice = next((cell for cell in header if cell and header.count(cell) > 1), None)
    if twice is not None:
        return f"has the column {twice!r} twice in its header"
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        return f"has the header {header[0]!r}: the cells are separated by something else than commas; write commas"
    return ""


def _row(header: list[str], cells: list[str], name: str, line: int) -> Row:
    if len(cells) != len(header):
        reason = f"has {len(cells)} cells, and the header has {len(header)}: {', '.join(header)}"
        return Row({}, name, line, RowError("(csv)", reason))
    for place, (column, cell) in enumerate(zip(header, cells, strict=True), 1):
        wrong = _NOT_UTF8.search(cell)
        if wrong:
            reason = f"holds the byte 0x{ord(wrong[0]) - 0xDC00:02x}, not UTF-8"
            return Row({}, name, line, RowError(column, reason))
        if cell and not column:
            reason = f"holds {cell!r} in cell {place}, and the header has no name there; name the column"
            return Row({}, name, line, RowError("(csv)", reason))
    named = {column: cell or None for column, cell in zip(header, cells, strict=True) if column}
    return Row(named, name, line)


def typed(row: Row) -> Row:
    """The row with its cells as lists and chats where their column says so."""
    values: dict[str, Any] = {}
    for column, cell in row.value.items():
        try:
            values[column] = _typed(column, cell) if isinstance(cell, str) else cell
        except RowError as error:
            return Row({}, row.source, row.line, error)
    return Row(values, row.source, row.line, row.error)


def _typed(column: str, cell: str) -> Any:
    """What the cell holds. Raises RowError: it begins like messages and is no JSON, such as Python's own spelling."""
    text = cell.strip()
    if column not in LISTS | TEXTS_OR_CHATS or not text.startswith(("[", "{")):
        return cell
    try:
        value = parse(text, column)
    except RowError as error:
        if _MESSAGES.match(text):
            raise RowError(column, f"begins like JSON messages, but it {error.reason}") from None
        return cell
    return value if column in LISTS or _is_chat(value) else cell


def _is_chat(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not first.keys().isdisjoint(("role", "from"))
