"""An HTTP connection that is closed when its client does not send a request in time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedConnection(H11Protocol):
    """uvicorn closes a connection that is idle between two requests; this one is closed too where a request does not
    begin, or its head does not end, within `idle_seconds`."""

    idle_seconds: float
    _wait: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The client has connected."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()  # the head is here, and a response under way
        elif self._wait is None:
            self._wait = self.loop.call_later(self.idle_seconds, self.transport.close)

    def _stop_watching(self) -> None:
        if self._wait is not None:
            self._wait.cancel()
            self._wait = None


def timed_connection(seconds: float) -> type[TimedConnection]:
    """A connection that waits so long."""
    return type("Connection", (TimedConnection,), {"idle_seconds": seconds})
