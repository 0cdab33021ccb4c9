"""Send the state of a run to pages as server-sent events, some times a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from ranvier.transport.format.errors import RanvierError

from .sources import Source, described
from .watching import Watching

INTERVAL_S = 0.2
TRACE_S = 0.1
"""A frame waits so long for the trace. Then it goes without, and the next one has it."""
LINGER_S = 5.0
"""The process that reads the trace ends so long after the last page was closed."""


class Silent(RanvierError):
    """Report that the trace does not say what was asked."""


class _Page:
    """Hold the newest frame for one page. A page that reads slowly misses frames."""

    def __init__(self) -> None:
        self.frame = b""
        self.there = asyncio.Event()


class Feed:
    """Make the frames of one run while pages are open. All methods belong to the server's thread."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._watching = Watching(source.run_dir)
        self._pages: set[_Page] = set()
        self._making: asyncio.Task[None] | None = None
        self._wanted_s = 0.0
        """When somebody last wanted something, on the loop's clock."""

    async def events(self) -> AsyncIterator[bytes]:
        """Yield events: `graph` once, then a `frame` five times a second, until the run is over (`over`)."""
        yield event("graph", await asyncio.to_thread(described, self.source))
        page = _Page()
        self._pages.add(page)
        try:
            making = self._want()
            while True:
                await page.there.wait()
                page.there.clear()
                yield page.frame
                if making.done():
                    return
        finally:
            self._pages.discard(page)

    async def ask(self, what: str, **arguments: Any) -> Any:
        """Return what the trace says about an edge, an actor or a token, as plain data.

        Raises:
            Silent: it does not say; the words tell why.
            ResourceError: the process that reads the trace has ended.
        """
        self._want()
        answer, error = await self._watching.ask(what, **arguments)
        if error:
            raise Silent(error)
        return msgspec.json.decode(answer)

    def close(self) -> None:
        """End the feed, and the process that reads the trace."""
        if self._making is not None:
            self._making.cancel()
        self._watching.over = True
        self._watching.close()

    def _want(self) -> asyncio.Task[None]:
        self._wanted_s = asyncio.get_running_loop().time()
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._make())
        return self._making

    async def _make(self) -> None:
        why = "the server is stopping"
        try:
            await self._frames()
        except RanvierError as error:
            why = str(error)
        finally:
            self._show(event("over", {"why": why}))
            self._watching.close()

    async def _frames(self) -> None:
        loop = asyncio.get_running_loop()
        trace: asyncio.Task[tuple[msgspec.Raw, str]] | None = None
        known, due_s = _known(None), loop.time()
        try:
            while self._pages or loop.time() < self._wanted_s + LINGER_S:
                if not self._pages:
                    await asyncio.sleep(INTERVAL_S)
                    continue
                self._wanted_s = loop.time()
                state = await self.source.state()
                if trace is None:
                    pids = tuple(host["pid"] or 0 for host in state["hosts"])
                    trace = asyncio.create_task(self._watching.ask("frame", pids=pids))
                await asyncio.wait([trace], timeout=TRACE_S)
                if trace.done():
                    known, trace = _known(trace), None
                self._show(event("frame", {**state, **known}))
                due_s = max(due_s + INTERVAL_S, loop.time())
                await asyncio.sleep(due_s - loop.time())
        finally:
            if trace is not None:
                trace.cancel()

    def _show(self, frame: bytes) -> None:
        for page in self._pages:
            page.frame = frame
            page.there.set()


def _known(asked: asyncio.Task[tuple[msgspec.Raw, str]] | None) -> dict[str, Any]:
    answer, error = msgspec.Raw(), ""
    if asked is not None:
        try:
            answer, error = asked.result()
        except RanvierError as failed:
            error = str(failed)
    return {"trace": answer if answer else msgspec.Raw(b"null"), "trace_error": error}


def event(name: str, data: Any) -> bytes:
    """Return a server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
