"""The errors that a user can put right, and the secrets that no message shows."""

from __future__ import annotations

import errno
import os
import re

_URL = re.compile(r"\b[A-Za-z][\w+.-]*://[^\s'\"<>]+")


class InputError(Exception):
    """Bad input, in one sentence: what is wrong, where (file and line, or config key), what to do.

    Entry points print the sentence without a traceback and exit with code 2 (see `launch/entry.py`).
    """


def shown(value: object, limit: int = 80) -> str:
    """A value of the input as an error shows it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a whole number of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


class StepNotTaken(InputError):
    """Raised by a collector in every process, before the step changes the state: the loop saves it, then ends."""


def without_secrets(text: str) -> str:
    """The text with the secret parts of its URLs as ***: name and password before an @, and the values of a query."""

    def hidden(url: re.Match[str]) -> str:
        scheme, _, rest = url[0].partition("://")
        path, mark, query = rest.partition("?")
        name, at, host = path.rpartition("@")
        values = re.sub(r"([^&;=]*=)?[^&;]+", lambda part: f"{part[1] or ''}***", query)
        return f"{scheme}://{'***' if at else name}{at}{host}{mark}{values}"

    return _URL.sub(hidden, text)


# File-system errors that a person can put right: no room, no right to write, a file where a folder should be, a
# failing disk.
_FILE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EBUSY,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.ESTALE,
)
_NUMBER_BY_TEXT = {
    os.strerror(number): number
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
}


def file_error(error: BaseException) -> OSError | None:
    """The file-system error that an exception is or was caused by, or None; TensorStore names it only in its text."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    # An exception can be among its own causes, after a `raise error from error`.
    while cause is not None and not any(cause is before for before in seen):
        if isinstance(cause, OSError) and cause.errno in _FILE_ERRORS:
            return cause
        text = next((text for text in _NUMBER_BY_TEXT if text in str(cause)), None)
        if text is not None:
            return OSError(_NUMBER_BY_TEXT[text], text)
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return None
