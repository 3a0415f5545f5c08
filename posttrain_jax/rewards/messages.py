"""Messages between a run and its processes of reward functions: JSON on a socket of their own.

A message is a token, a length and JSON. So nothing that is read is ever run, and what a reward function writes to the
socket itself is passed over: it does not hold the token, which is drawn for every process.
"""

from __future__ import annotations

import base64
import datetime
import json
import operator
import socket
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, SupportsIndex

from posttrain_jax.core.errors import InputError

TOKEN_BYTES = 16
_LENGTH_BYTES = 8
_MOST_BYTES = 1 << 31  # of a message
_READ_BYTES = 1 << 16
_TAG = "$posttrain_jax"  # the key of an object that stands for what JSON does not know
_DATES = (datetime.datetime, datetime.date, datetime.time)


class Messages:
    """One end of a socket.

    Args:
      connection: the socket; it is closed by `close`.
      token: TOKEN_BYTES that both ends know.
    """

    def __init__(self, connection: socket.socket, token: bytes) -> None:
        self._socket = connection
        self._token = token
        self._buffer = bytearray()

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`."""
        return self._socket.fileno()

    def send(self, text: str) -> None:
        """Sends a message, JSON from `as_json`. Raises OSError where the other end is gone or does not read."""
        payload = text.encode()
        self._socket.sendall(self._token + len(payload).to_bytes(_LENGTH_BYTES, "big") + payload)

    def read(self) -> list[Any]:
        """What has come, and perhaps no whole message; waits only where nothing at all has come.

        Raises:
          EOFError: the other end is closed.
          OSError: it is gone.
          ValueError: something else than a message stands after the token.
        """
        self._receive()
        return list(self._whole())

    def next(self) -> Any:
        """The next message, however long that takes. Raises as `read`."""
        while True:
            for message in self._whole():
                return message
            self._receive()

    def _receive(self) -> None:
        received = self._socket.recv(_READ_BYTES)
        if not received:
            raise EOFError
        self._buffer += received

    def _whole(self) -> Iterable[Any]:
        """The messages that have come to their end."""
        header = TOKEN_BYTES + _LENGTH_BYTES
        while True:
            start = self._buffer.find(self._token)
            del self._buffer[: start if start >= 0 else max(len(self._buffer) - TOKEN_BYTES + 1, 0)]
            if start < 0 or len(self._buffer) < header:
                return
            length = int.from_bytes(self._buffer[TOKEN_BYTES:header], "big")
            if length > _MOST_BYTES:
                raise ValueError(f"a message of {length} bytes")
            if len(self._buffer) < header + length:
                return
            payload = bytes(self._buffer[header : header + length])
            del self._buffer[: header + length]
            yield json.loads(payload, object_hook=_decoded)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


def as_json(value: Any, what: str) -> str:
    """JSON of plain values: what JSON has, bytes, dates, times, Decimals, tuples (as lists), keys of any of these.

    Raises:
      InputError: it holds something else; `what` says of what it is.
    """
    return json.dumps(_encoded(value, what))


def _encoded(value: Any, what: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, SupportsIndex):
        return operator.index(value)
    if isinstance(value, dict):
        if all(type(key) is str and key != _TAG for key in value):
            return {key: _encoded(item, what) for key, item in value.items()}
        return {_TAG: ["dict", [[_encoded(key, what), _encoded(item, what)] for key, item in value.items()]]}
    if isinstance(value, list | tuple):
        return [_encoded(item, what) for item in value]
    if isinstance(value, bytes):
        return {_TAG: ["bytes", base64.b64encode(value).decode()]}
    if type(value) in _DATES:
        return {_TAG: [type(value).__name__, value.isoformat()]}
    if type(value) is datetime.timedelta:
        return {_TAG: ["timedelta", [value.days, value.seconds, value.microseconds]]}
    if type(value) is Decimal:
        return {_TAG: ["Decimal", str(value)]}
    raise InputError(
        f"{what} holds a {type(value).__name__}, which cannot be given to a reward function; make it text, numbers or "
        "lists of them."
    )


def _decoded(value: dict[str, Any]) -> Any:
    if len(value) != 1 or _TAG not in value:
        return value
    kind, content = value[_TAG]
    if kind == "dict":
        return {tuple(key) if isinstance(key, list) else key: item for key, item in content}
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "timedelta":
        return datetime.timedelta(*content)
    if kind == "Decimal":
        return Decimal(content)
    return {each.__name__: each for each in _DATES}[kind].fromisoformat(content)
