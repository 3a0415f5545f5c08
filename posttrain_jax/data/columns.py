"""What becomes of every column of a row: it is read, or it is left unused and counted, or the row is refused.

Refused is a text that could be part of the prompt, for a model trained without it answers another question: a column
whose name holds one of PROMPT_WORDS (`question`, `input_text`) and none of ABOUT_WORDS (`prompt_id`, `question_type`);
of preferences without a prompt, any column whose name holds none of ABOUT_WORDS.
Two kinds are let through, and counted: one whose texts all stand in what was read (the `prompt` that UltraChat repeats
beside its `messages`), and one that holds all that was read (Alpaca's rendered `text`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from posttrain_jax.data.rows import RowError, one_line

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
    perplexity embedding embeddings topic domain subject tag tags config configs window labeling labeling template"""
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
        answers: Sequence[str],
        *,
        is_chat: bool,
        needs_prompt: bool = False,
        refuse_of_chats_only: bool = False,
    ) -> tuple[str, ...]:
        """The columns (and keys of messages, `messages[].time`) that hold something and were not read.

        Args:
          prompt: the texts of the prompt, as the row was read.
          answers: those of what is trained.
          is_chat: whether the row was read as a chat.
          needs_prompt: whether answers without a prompt make no sense.
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
                if is_lost and any(texts_in(value)) and not _repeats(value, prompt, answers):
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
        contents = [value[key] for key in ("content", "value") if key in value]
        for item in contents or value.values():
            yield from texts_in(item)
    elif value is not None and not isinstance(value, bool | int | float):
        yield type(value).__name__


def same_text(text: str) -> str:
    """The text with single spaces: what two texts that say the same have in common."""
    return " ".join(text.split())


def _repeats(value: Any, prompt: Sequence[str], answers: Sequence[str]) -> bool:
    lines = [same_text(line) for text in prompt for line in text.splitlines()]
    prompt, answers = [same_text(text) for text in prompt], [same_text(text) for text in answers]
    if all(any(same_text(text) in read for read in (*prompt, *answers)) for text in texts_in(value)):
        return True
    whole = same_text(value) if isinstance(value, str) else ""
    return any(lines) and all(line in whole for line in lines) and any(text in whole for text in answers)


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
