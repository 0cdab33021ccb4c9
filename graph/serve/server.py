"""Serve running graphs over HTTP: uvicorn in a thread of its own, beside the runs' trio loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ranvier.transport.format.errors import LinkClosed, ResourceError

from ..bridge import stream_log
from ..bridge.bridge import Bridge
from ..bridge.stream_log import Address
from ..file.errors import RequestError
from ..run.run import Run
from .guard import Door, is_loopback, names_of

if TYPE_CHECKING:
    from ..page.pages import Pages
    from .streams import Left

STARTED_S = 10.0
CLOSED_S = 2
"""Time for connections to close after the last answer."""


@dataclass(frozen=True, slots=True)
class Options:
    """Describe a server."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    queue: int = 256
    """Most requests that may wait for room."""
    deadline_s: float | None = None
    """Time after which an answer ends with an error, its wait included; None: never."""
    stop_s: float = 20.0
    """Time that answers have to end once the server stops."""
    resume_window_s: float = 60.0
    """Time for which an answer is kept for a client that has lost its connection."""
    keys: tuple[bytes, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    certfile: Path | None = None
    keyfile: Path | None = None
    most_bytes: int = 32 << 20
    faults: bool = False
    """Let the page kill, stop and slow actors. The runs must be `cuttable` for it to cut links."""
    say: Callable[[str], None] = print
    """Tells the user what was found at the start."""


@contextlib.asynccontextmanager
async def serving(runs: Mapping[str, Run], options: Options) -> AsyncIterator[str]:
    """Serve runs by the names of their models while in the context. Yield the address, such as `http://127.0.0.1:8000`.

    On exit no request is taken any more, those that run have `stop_s` to end, and the rest ends with an error.

    Raises:
        RequestError: the address is taken or cannot be, another address than loopback has no keys, or the extra `serve` is
            not installed.
        ResourceError: the server did not start.
    """
    try:
        import uvicorn
        import uvloop

        from ..page.pages import Pages
        from ..page.sources import Served
        from .app import application
        from .connections import BoundedProtocol
        from .streams import Kept
    except ImportError as error:
        raise RequestError(f"serve needs {error.name}; pip install 'ranvier[serve]'") from None
    if not is_loopback(options.host) and not options.keys:
        raise RequestError(f"--host {options.host}: others can reach this address; give keys with --api-key-file")
    listening = bound(options.host, options.port)
    with listening:
        port = listening.getsockname()[1]
        async with trio.open_nursery() as nursery:
            bridges = {name: Bridge(run, nursery, options.queue, options.deadline_s) for name, run in runs.items()}
            door = Door(
                names_of(options.host, options.allow_hosts),
                frozenset(options.allow_origins),
                options.keys,
                options.most_bytes,
            )
            kept = Kept(options.resume_window_s, await _left(bridges.values(), options))
            sources = {name: Served(name, bridge) for name, bridge in bridges.items()}
            pages = Pages(sources, faults=options.faults, logs=not options.keys)
            app, endpoints = application(bridges, door, kept, pages)
            config = uvicorn.Config(
                app, http=BoundedProtocol, log_config=None, access_log=False, lifespan="off", ws="none",
                timeout_graceful_shutdown=CLOSED_S, server_header=False, ssl_certfile=options.certfile,
                ssl_keyfile=options.keyfile,
            )  # fmt: skip
            server = uvicorn.Server(config)
            thread = _Thread(server, uvloop.new_event_loop, listening, bridges, pages)
            try:
                await thread.started()
                scheme = "https" if options.certfile else "http"
                yield f"{scheme}://{f'[{options.host}]' if ':' in options.host else options.host}:{port}"
            finally:
                with trio.CancelScope(shield=True):
                    endpoints.stopping = True
                    with trio.move_on_after(options.stop_s):
                        while any(bridge.open for bridge in bridges.values()):
                            await trio.sleep(0.02)
                    for bridge in bridges.values():
                        bridge.stop(LinkClosed("the server is stopping"))
                    await trio.to_thread.run_sync(thread.end)
                    kept.forget()
                    for bridge in bridges.values():
                        if bridge.log is not None:
                            bridge.log.close()
            nursery.cancel_scope.cancel()


async def _left(bridges: Iterable[Bridge], options: Options) -> dict[str, Left]:
    """Begin the logs of streams of the runs that have a journal. Return the streams of the last server at this address.

    Raises:
        ResourceError: a log cannot be written.
    """
    left: dict[str, Left] = {}
    address = Address(options.host, options.port)
    for bridge in bridges:
        began = bridge.run.hashes
        if began is None or options.resume_window_s <= 0:
            continue
        try:
            started = await trio.to_thread.run_sync(stream_log.begun, bridge.run.dir, began, address)
        except OSError as error:
            raise ResourceError(f"{error}; make room on the disk, or set journal: false") from None
        bridge.log = started.log
        left |= {name: (record, started.log) for name, record in started.left.items()}
        for each in started.said:
            options.say(each)
    return left


def bound(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        RequestError: the address is taken, or is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise RequestError(f"--host {host}: {error.strerror}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise RequestError(
            f"{host}:{port}: {error.strerror}; give another --port, or --port 0 for any free one"
        ) from None
    return made


class _Thread:
    """Run uvicorn's loop in a thread."""

    def __init__(
        self, server: Any, new_loop: Callable[[], asyncio.AbstractEventLoop], listening: socket.socket,
        bridges: Mapping[str, Bridge], pages: Pages,
    ) -> None:  # fmt: skip
        self._server, self._new_loop, self._listening, self._bridges = server, new_loop, listening, bridges
        self._pages = pages
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="ranvier-serve", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            for bridge in self._bridges.values():
                bridge.attach(self._loop)
            try:
                await self._server.serve(sockets=[self._listening])
            finally:
                self._pages.close()

        try:
            with asyncio.Runner(loop_factory=self._new_loop) as runner:
                runner.run(main())
        except BaseException as error:
            self._error = error

    async def started(self) -> None:
        """Wait until it serves.

        Raises:
            ResourceError: it does not start.
        """
        with trio.move_on_after(STARTED_S):
            while not self._server.started:
                if not self._thread.is_alive():
                    break
                await trio.sleep(0.005)
        if not self._server.started:
            self._server.should_exit = True
            raise ResourceError(f"the HTTP server did not start: {self._error or 'it is too slow'}")

    def end(self) -> None:
        """End the server, and wait for it. Pages are closed first: they would hold their connections open."""
        self._server.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._pages.close)
        self._thread.join()
