"""Rows of files that hold text: JSON Lines, JSON and plain text; from the bytes of an open file to rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from posttrain_jax.data.json_text import parse, parse_at, skip_space
from posttrain_jax.data.rows import Row, RowError

_BOM = b"\xef\xbb\xbf"


def decode(data: bytes, offset: int, first: bool) -> str:
    """UTF-8 text of `data`, which starts at byte `offset` of its file; a BOM counts only at the file's start.

    Raises:
      RowError: it is not UTF-8; names the byte.
    """
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        hint = "; the file looks like UTF-16" if first and data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        # utf-8-sig counts from after the BOM.
        start = error.start + (len(_BOM) if first and data.startswith(_BOM) else 0)
        byte = data[start]
        raise RowError(
            "(encoding)", f"byte 0x{byte:02x} at byte offset {offset + start} of the file is not UTF-8{hint}"
        ) from None


def json_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    """One object a line. A first line that is `{` or `[` alone begins JSON over several lines, see `json_values`."""
    head = _head(file)
    if _stripped(head) in (b"{", b"["):
        yield from _values(b"".join([*head, file.read()]), name)
    else:
        yield from _lines(itertools.chain(head, file), name)


def json_values(file: BinaryIO, name: str) -> Iterator[Row]:
    """An array of objects, or one object after another, each over as many lines as it takes; or JSON Lines."""
    head = _head(file)
    first = _stripped(head)
    if first.startswith(b"[") or (first.startswith(b"{") and _goes_on(first)):
        yield from _values(b"".join([*head, file.read()]), name)
    else:
        yield from _lines(itertools.chain(head, file), name)


def _head(file: BinaryIO) -> list[bytes]:
    """The lines up to the first that is not blank."""
    head = []
    for line in file:
        head.append(line)
        if line.removeprefix(_BOM).strip():
            break
    return head


def _stripped(head: list[bytes]) -> bytes:
    return head[-1].removeprefix(_BOM).strip() if head else b""


def _goes_on(line: bytes) -> bool:
    """Whether an object begins in this line and does not end in it."""
    text = line.decode("utf-8", "replace")
    try:
        parse_at(text, 0)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except RecursionError:
        return False
    return False


def _row(value: Any, name: str, line: int) -> Row:
    if isinstance(value, dict):
        return Row(value, name, line)
    return Row({}, name, line, RowError("(json)", f"is a {type(value).__name__}, not an object with columns"))


def _lines(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    # A binary file is split on b"\n" alone: U+2028 stays in its line.
    offset = 0
    for number, line in enumerate(lines, 1):
        try:
            text = decode(line, offset, first=number == 1)
            if text.strip():
                yield _row(parse(text, "(json)"), name, number)
        except RowError as error:
            yield Row({}, name, number, error)
        offset += len(line)


def _values(data: bytes, name: str) -> Iterator[Row]:
    """Values of an array, or one after another; read one by one, so that each knows its line."""
    try:
        text = decode(data, 0, first=True)
    except RowError as error:
        start = int(error.reason.split("byte offset ")[1].split()[0])
        yield Row({}, name, data.count(b"\n", 0, start) + 1, error)
        return
    at = skip_space(text, 0)
    is_array = text[at] == "["
    at = skip_space(text, at + 1) if is_array else at
    line, counted = 1, 0
    while text[at : at + 1] != ("]" if is_array else ""):
        line, counted = line + text.count("\n", counted, at), at
        try:
            parsed = parse_at(text, at)
            at = skip_space(text, parsed.end)
            if parsed.problem:
                yield Row({}, name, line, RowError("(json)", parsed.problem))
            else:
                yield _row(parsed.value, name, line)
            if is_array and text[at : at + 1] == ",":
                at = skip_space(text, at + 1)
            elif is_array and text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except json.JSONDecodeError as error:  # where the next value begins is not known any more
            reason = f"is broken at line {error.lineno}, column {error.colno}: {error.msg}; nothing after it was read"
            yield Row({}, name, error.lineno, RowError("(json)", reason))
            return
        except RecursionError:
            yield Row({}, name, line, RowError("(json)", "is nested too deeply; nothing after it was read"))
            return
    rest = skip_space(text, at + 1)
    if rest < len(text):
        reason = "goes on after the array's end; nothing after it was read (write one array, or JSON Lines)"
        yield Row({}, name, 1 + text.count("\n", 0, rest), RowError("(json)", reason))


def text_blocks(file: BinaryIO, name: str) -> Iterator[Row]:
    """Plain text: one document per block between blank lines."""
    block: list[str] = []
    broken: Row | None = None
    start = offset = 0
    for number, line in enumerate(itertools.chain(file, [b""]), 1):
        text: str | None = None
        try:
            text = decode(line, offset, first=number == 1)
        except RowError as error:  # the lines around it are no documents of their own
            broken = broken or Row({}, name, number, error)
        offset += len(line)
        if text is None or text.strip():
            start = start if block else number
            block.append(text or "")
        elif block:
            yield broken or Row({"text": "".join(block).rstrip("\r\n")}, name, start)
            block, broken = [], None
