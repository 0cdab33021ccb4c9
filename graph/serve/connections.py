"""Bound what connections may hold: their number, and the time until a request's headers are there.

uvicorn waits without an end for a client that sends a request byte by byte, or nothing at all. Ten thousand such connections
would take all descriptors of the process, which the run needs, too.
"""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0
"""Time from a connection's start, or from the first byte of its next request, until the request's headers are there."""
SHARE = 4
"""One in so many of the process's descriptors may be connections of clients."""


class BoundedProtocol(H11Protocol):
    """Speak HTTP over one connection, within these bounds."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE):
            transport.abort()
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_headers()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self._close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
