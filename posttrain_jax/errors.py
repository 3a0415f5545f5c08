"""The one exception that means "your input is wrong, and here is what to do"."""

from __future__ import annotations


class InputError(Exception):
    """Bad input, said in one sentence: what is wrong, where (file and line, or config key), what to do.

    Entry points print the sentence without a traceback and exit with code 2 (see `launch/entry.py`).
    """


def shown(value: object, limit: int = 80) -> str:
    """A value of the input as an error shows it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."
