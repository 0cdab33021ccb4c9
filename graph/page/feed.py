"""Send the state of a run to pages as server-sent events, some times a second."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from ranvier.actors.errors import describe
from ranvier.transport.format.errors import RanvierError

from .sources import Source, described
from .watching import Watching

INTERVAL_S = 0.2
TRACE_S = 0.1
"""A frame waits so long for the trace. Then it goes without, and the next one has it."""
LINGER_S = 5.0
"""The process that reads the trace ends once nobody has asked it for so long, or for twice as long."""


class _Page:
    """Hold the newest frame for one page. A page that reads slowly misses frames."""

    def __init__(self) -> None:
        self.frame = b""
        self.there = asyncio.Event()
        self.over = False

    def show(self, frame: bytes, *, over: bool) -> None:
        self.frame, self.over = frame, over
        self.there.set()


class Feed:
    """Make the frames of one run while pages are open. All methods belong to the server's thread."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._watching = Watching(source.run_dir)
        self._pages: set[_Page] = set()
        self._making: asyncio.Task[None] | None = None
        self._resting: asyncio.Task[None] | None = None
        self._wanted_s = 0.0
        """When the last question was answered, on the loop's clock."""

    async def events(self) -> AsyncIterator[bytes]:
        """Yield events: `graph` once, then a `frame` five times a second, until the run is over (`over`)."""
        yield event("graph", await asyncio.to_thread(described, self.source))
        page = _Page()
        self._pages.add(page)
        try:
            if self._making is None or self._making.done():
                self._making = asyncio.create_task(self._make())
            while not page.over:
                await page.there.wait()
                page.there.clear()
                yield page.frame
        finally:
            self._pages.discard(page)

    async def ask(self, what: str, **arguments: Any) -> Any:
        """Return what the trace says about an edge, an actor or a token, as plain data.

        Raises:
            Silent: it does not say; the words tell why.
            ResourceError: the process that reads the trace has ended.
        """
        return msgspec.json.decode(await self._ask(what, **arguments))

    async def _ask(self, what: str, **arguments: Any) -> msgspec.Raw:
        if self._resting is None or self._resting.done():
            self._resting = asyncio.create_task(self._rest())
        try:
            return await self._watching.ask(what, **arguments)
        finally:
            self._wanted_s = asyncio.get_running_loop().time()

    def close(self) -> None:
        """End the feed, and the process that reads the trace."""
        for task in (self._making, self._resting):
            if task is not None:
                task.cancel()
        self._watching.close(forever=True)

    async def _rest(self) -> None:
        """End the watcher once nobody has asked it for a time."""
        loop = asyncio.get_running_loop()
        while self._watching.waiting or self._wanted_s + LINGER_S > loop.time():
            await asyncio.sleep(LINGER_S)
        self._watching.close()

    async def _make(self) -> None:
        why = "the server is stopping"
        try:
            await self._frames()
        except RanvierError as error:
            why = str(error)
        except Exception as error:  # an error of ours: pages are told, and standard error has the traceback
            why = describe(error)
            traceback.print_exc()
        finally:
            for page in self._pages:
                page.show(event("over", {"why": why}), over=True)

    async def _frames(self) -> None:
        loop = asyncio.get_running_loop()
        trace: asyncio.Task[msgspec.Raw] | None = None
        known, due_s = _known(None), loop.time()
        try:
            while self._pages:
                state = await self.source.state()
                if trace is None:
                    pids = tuple(host["pid"] for host in state["hosts"] if host["pid"])
                    trace = asyncio.create_task(self._ask("frame", pids=pids))
                await asyncio.wait([trace], timeout=TRACE_S)
                if trace.done():
                    known, trace = _known(trace), None
                frame = event("frame", {**state, **known})
                for page in self._pages:
                    page.show(frame, over=False)
                due_s = max(due_s + INTERVAL_S, loop.time())
                await asyncio.sleep(due_s - loop.time())
        finally:
            if trace is not None:
                trace.cancel()


def _known(asked: asyncio.Task[msgspec.Raw] | None) -> dict[str, Any]:
    """Return what a frame has of the trace: the answer, or why there is none."""
    try:
        return {"trace": asked.result() if asked is not None else None, "trace_error": ""}
    except RanvierError as error:
        return {"trace": None, "trace_error": str(error)}


def event(name: str, data: Any) -> bytes:
    """Return a server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
