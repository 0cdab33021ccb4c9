"""Bound what connections may hold: their number, and the time and size of a request's headers.

uvicorn waits without an end for a client that sends a request byte by byte, or nothing at all, and keeps headers of any size.
Ten thousand such connections would take all descriptors of the process, which the run needs, too.
"""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 10.0
"""Time from a connection's start, or from the first byte of its next request, until the request's headers are there."""
MOST_HEADER_BYTES = 64 << 10
"""Most bytes that may come before a request's headers are complete."""
SHARE = 4
"""One in so many of the process's descriptors may be connections of clients."""


class BoundedProtocol(HttpToolsProtocol):
    """Speak HTTP over one connection, within these bounds."""

    _late: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE):
            transport.abort()
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
            return
        self._header_bytes += len(data)
        if self._header_bytes > MOST_HEADER_BYTES:
            self.transport.abort()
        else:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self._close)

    def _stop_waiting(self) -> None:
        self._header_bytes = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
