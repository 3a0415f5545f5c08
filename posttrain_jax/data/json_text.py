"""JSON in data files and in columns, read so that nothing of it is lost or changed without a word.

Python's reader takes the last of two equal keys, raises ValueError for integers of more than 4,300 digits, keeps halves
of surrogate pairs that no tokenizer takes, and nests as deep as the stack; here these are errors of the row.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any

from posttrain_jax.data.rows import RowError

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
