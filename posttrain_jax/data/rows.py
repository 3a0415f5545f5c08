"""A row of a data source: what its columns are called, what becomes of each, and why a row cannot be used.

Every column of a row is read, or it is left unused and counted, or the row is refused.

Refused is a text that could be part of the prompt, for a model trained without it answers another question: a column
whose name holds one of PROMPT_WORDS (`question`, `input_text`) and none of ABOUT_WORDS (`prompt_id`, `question_type`);
of preferences without a prompt, any column whose name holds none of ABOUT_WORDS.
Two kinds are let through, and counted: one whose texts all stand in what was read (the `prompt` that UltraChat repeats
beside its `messages`), and one that holds all that was read (Alpaca's rendered `text`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
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


_BOOLEANS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def as_boolean(value: Any) -> bool | None:
    """What a column says that holds true or false, 1 or 0, or one of these as text; None for anything else."""
    known = isinstance(value, bool | int | float | str)
    return _BOOLEANS.get(str(value).strip().lower()) if known else None


# ---- what becomes of every column

_PROMPT_WORDS = """
    prompt prompts question questions instruction instructions input inputs context contexts system history query
    queries conversation conversations message messages dialogue dialog chat turns passage passages paragraph
    article document documents background premise problem post user human request persona tool tools function
    functions image images audio video videos body scenario hint hints examples demonstrations evidence choices
    options"""
_ABOUT_WORDS = """
    id ids uid uuid idx index key hash fingerprint type types kind category class style level format version split
    source sources origin dataset model language lang license author url date time timestamp created name names meta
    metadata info length len tokens count num number score scores rating ratings label labels quality difficulty
    perplexity embedding embeddings topic domain subject tag tags config configs window labeling labelling template"""
PROMPT_WORDS, ABOUT_WORDS = frozenset(_PROMPT_WORDS.split()), frozenset(_ABOUT_WORDS.split())
# Columns that only a chat has a place for; `data.text_as=chat` makes chats of text rows.
_OF_CHATS = ("system", "system_prompt", "history", "tools", "functions")
# Keys of a message that `formats.py` reads.
_MESSAGE_KEYS = """
    role content from value name tool_call_id tool_calls function_call reasoning_content reasoning thinking weight
    loss_weight train training"""
MESSAGE_KEYS = frozenset(_MESSAGE_KEYS.split())


class Columns(Mapping[str, Any]):
    """A row that remembers which of its columns were read (with [] or get; `in` reads nothing)."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = row
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._row[name]
        self._read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    @property
    def given(self) -> set[str]:
        """The columns that are not null."""
        return {name for name, value in self._row.items() if value is not None}

    def unused(
        self,
        prompt: Sequence[str],
        trained: Sequence[str],
        *,
        is_chat: bool,
        needs_prompt: bool = False,
        refuse_of_chats_only: bool = False,
    ) -> tuple[str, ...]:
        """The columns (and keys of messages, `messages[].time`) that hold something and were not read.

        Args:
          prompt: the texts of the prompt, as the row was read.
          trained: those that are trained.
          is_chat: whether the row was read as a chat.
          needs_prompt: whether completions without a prompt make no sense.
          refuse_of_chats_only: whether other columns go elsewhere, so that only those are refused that a chat would
            have shown.

        Raises:
          RowError: one of them could be part of the prompt.
        """
        unused = []
        is_missing = needs_prompt and not any(text.strip() for text in prompt)
        for name, value in self._row.items():
            if name in self._read:
                unused += [f"{name}[].{key}" for key in _unknown_keys(value)]
            elif value not in (None, "", [], {}):
                is_suspect = may_be_prompt(name) or (is_missing and _words(name).isdisjoint(ABOUT_WORDS))
                is_lost = not is_chat and name in _OF_CHATS if refuse_of_chats_only else is_suspect
                if is_lost and any(texts_in(value)) and not _repeats(value, prompt, trained):
                    raise RowError(name, _refusal(name, self._read, is_chat))
                unused.append(name)
        return tuple(unused)


def may_be_prompt(name: str) -> bool:
    """Whether a column (or a key of a message) of this name could hold a part of the prompt."""
    words = _words(name)
    return name.lower() == "text" or bool(words & PROMPT_WORDS and not words & ABOUT_WORDS)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()))


def texts_in(value: Any) -> Iterator[str]:
    """The texts that a value holds; of messages, their content; of an image or another object, its kind."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        is_message = "role" in value or "from" in value
        keys = ("content", "value", "text") if is_message else ("content", "value")
        contents = [value[key] for key in keys if key in value]
        for item in contents or value.values():
            yield from texts_in(item)
    elif value is not None and not isinstance(value, bool | int | float):
        yield type(value).__name__


def same_text(text: str) -> str:
    """The text with single spaces: what two texts that say the same have in common."""
    return " ".join(text.split())


def _repeats(value: Any, prompt: Sequence[str], trained: Sequence[str]) -> bool:
    lines = [same_text(line) for text in prompt for line in text.splitlines()]
    prompt, trained = [same_text(text) for text in prompt], [same_text(text) for text in trained]
    if all(any(same_text(text) in read for read in (*prompt, *trained)) for text in texts_in(value)):
        return True
    whole = same_text(value) if isinstance(value, str) else ""
    return any(lines) and all(line in whole for line in lines) and any(text in whole for text in trained)


def _refusal(name: str, read: set[str], is_chat: bool) -> str:
    used = ", ".join(sorted(read)[:8])
    if not is_chat and name in _OF_CHATS:
        return (
            f"has no place before plain text ({used}); set data.text_as=chat, write the row as messages, or leave the "
            f"column out with data.ignore_columns={name}"
        )
    return (
        f"could be part of the prompt, and has no place beside {used}; put it into the prompt, or leave the column out "
        f"with data.ignore_columns={name}"
    )


def _unknown_keys(value: Any) -> Iterator[str]:
    """Keys of messages (of one, of a list, of lists of them) that hold something and mean nothing here."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        # ShareGPT's turns may have their text under `text`.
        text = {"text"} if value.get("content") is None and value.get("value") is None else set()
        for key, item in value.items():
            if key not in MESSAGE_KEYS | text and item not in (None, "", [], {}):
                yield key
    elif isinstance(value, list):
        yield from dict.fromkeys(key for item in value for key in _unknown_keys(item))


def unused_text(counts: Mapping[str, int], limit: int = 12) -> str:
    """Unused columns with the number of rows that have each, in a few words; "" for none."""
    by_count: dict[int, list[str]] = {}
    for name, count in counts.items():
        by_count.setdefault(count, []).append(one_line(name, 60))
    parts, shown = [], 0
    for count, names in sorted(by_count.items(), reverse=True):
        taken = names[: max(0, limit - shown)]
        shown += len(taken)
        if taken:
            parts.append(f"{', '.join(taken)} ({count:,} row{'s' if count != 1 else ''})")
    more = len(counts) - shown
    return "; ".join(parts) + (f" and {more:,} more" if more else "")
