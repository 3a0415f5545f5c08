"""Rows of files that hold text: JSON Lines, JSON and plain text; from the bytes of an open file to rows.

JSON, here and in columns, is read so that nothing of it is lost or changed without a word: Python's reader takes the
last of two equal keys, raises ValueError for integers of more than 4,300 digits, keeps halves of surrogate pairs that
no tokenizer takes, and nests as deep as the stack; here these are errors of the row.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.rows import Row, RowError, one_line

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


def unread(name: str, line: int, reason: str) -> InputError:
    """The error of a file whose rest cannot be read. That is no bad row: skipping it would lose all that follows."""
    return InputError(
        f"data file {name}, line {line} {one_line(reason, 400)}; nothing after it can be read, so repair the file "
        "(data.on_bad_row=skip leaves out single rows only)"
    )


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
    """Values of an array, or one after another; read one by one, so that each knows its line.

    Raises:
      InputError: the text is broken, so that where the next value begins is not known.
    """
    try:
        text = decode(data, 0, first=True)
    except RowError as error:
        start = int(error.reason.split("byte offset ")[1].split()[0])
        raise unread(name, data.count(b"\n", 0, start) + 1, f"has an error: {error.reason}") from None
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
        except json.JSONDecodeError as error:
            raise unread(name, error.lineno, f"is broken at column {error.colno}: {error.msg}") from None
        except RecursionError:
            raise unread(name, line, "is nested too deeply") from None
    rest = skip_space(text, at + 1)
    if rest < len(text):
        reason = "goes on after the array's end (write one array, or JSON Lines)"
        raise unread(name, 1 + text.count("\n", 0, rest), reason)


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


# ---- JSON

MAX_DEPTH = 100
"""How deep lists and objects of one row may lie in each other."""
_MAX_DIGITS = 4300


@dataclasses.dataclass(frozen=True)
class Parsed:
    """One JSON value that stands in a longer text.

    Attributes:
      value: what was read.
      end: where the text goes on.
      problem: why the value cannot be used, or "".
    """

    value: Any
    end: int
    problem: str


def parse_at(text: str, at: int) -> Parsed:
    """The JSON value that starts at character `at`. Raises json.JSONDecodeError or RecursionError, which leave the rest
    of the text unreadable."""
    problems: list[str] = []

    def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            problems.append(f"has the key {counts.most_common(1)[0][0]!r} twice in one object")
        return value

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            problems.append(f"holds an integer of {len(digits):,} digits; {_MAX_DIGITS:,} are the most")
            return 0
        return int(digits)

    decoder = json.JSONDecoder(object_pairs_hook=pairs_once, parse_int=integer)
    value, end = decoder.raw_decode(text, at)
    if text.count("[", at, end) + text.count("{", at, end) > MAX_DEPTH and is_deep(value):
        problems.append(f"is nested too deeply (more than {MAX_DEPTH} levels)")
    elif "\\ud" in text[at:end].lower():
        half = _half_a_pair(value)
        if half:
            problems.append(f"holds {half}, one half of a surrogate pair, which is no character")
    return Parsed(value, end, problems[0] if problems else "")


def parse(text: str, column: str) -> Any:
    """The one JSON value that `text` holds. Raises RowError, which names `column`."""
    try:
        if text.startswith("\ufeff"):
            raise json.JSONDecodeError("Unexpected BOM", text, 0)
        parsed = parse_at(text, skip_space(text, 0))
        rest = skip_space(text, parsed.end)
        if rest < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
    except json.JSONDecodeError as error:
        raise RowError(column, f"is broken at character {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise RowError(column, "is nested too deeply") from None
    if parsed.problem:
        raise RowError(column, parsed.problem)
    return parsed.value


def skip_space(text: str, at: int) -> int:
    """The first place from `at` on that holds no white space of JSON."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside = [item for item in level if isinstance(item, dict | list)]
        if not inside:
            return False
        level = [child for item in inside for child in (item.values() if isinstance(item, dict) else item)]
    return True


def _half_a_pair(value: Any) -> str:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return ""
