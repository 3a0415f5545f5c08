"""The exception that means "your input is wrong, and here is what to do", and what a file system refused."""

from __future__ import annotations

import errno
import os


class InputError(Exception):
    """Bad input, said in one sentence: what is wrong, where (file and line, or config key), what to do.

    Entry points print the sentence without a traceback and exit with code 2 (see `launch/entry.py`).
    """


def shown(value: object, limit: int = 80) -> str:
    """A value of the input as an error shows it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


# What a person can put right: no room, no right to write, a file where a folder should be, a disk that fails.
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
_SAID = {
    os.strerror(number): number
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
}


def file_error(error: BaseException) -> OSError | None:
    """What a file system refused, where that is an exception or its cause; TensorStore has it in its text alone."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    # An exception may be among its own causes, which a `raise error from error` makes it.
    while cause is not None and not any(cause is before for before in seen):
        if isinstance(cause, OSError) and cause.errno in _FILE_ERRORS:
            return cause
        told = next((text for text in _SAID if text in str(cause)), None)
        if told is not None:
            return OSError(_SAID[told], told)
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return None
