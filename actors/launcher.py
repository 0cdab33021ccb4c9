"""Where hosts run, behind three functions: start one, wait for its end, kill it. Nothing else knows.

`LocalLauncher` forks them on this machine from one process that has imported torch (zygote.py).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import trio

from .errors import ActorFailed
from .spec import HostSpec
from .zygote_process import ZygoteProcess


class Launcher(Protocol):
    """Starts hosts somewhere. A key names a host: its identity."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Process ids by key, of hosts on this machine."""

    async def start(self, spec: HostSpec) -> None:
        """Begin to start a host; its own `ready` tells when it is.

        Raises:
            ActorFailed: hosts cannot be started at all.
        """

    async def wait(self) -> tuple[str, int]:
        """The key and exit code of the next host that ends (negative: the signal that ended it)."""

    async def kill(self, key: str) -> None:
        """End a host at once, whatever it is doing."""


class LocalLauncher:
    """Hosts as processes of this machine, forked from a zygote: one that was started before, or one of its own. It is ended
    in either case. Use as `async with LocalLauncher(…).running()`."""

    def __init__(self, sockets: Path, logs: Path, zygote: ZygoteProcess | None = None) -> None:
        self._sockets = sockets
        self._errors = logs / "zygote.err"
        self._logs = logs
        self._zygote = zygote
        self._pids: dict[str, int] = {}
        self._ready = False
        self._exits_in, self._exits = trio.open_memory_channel[tuple[str, int]](1000)
        self._stdin: trio.lowlevel.FdStream | None = None
        self._one_at_a_time = trio.Lock()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LocalLauncher]:
        """Start the zygote if need be; on leaving, whatever still runs is killed and reaped."""
        zygote = self._zygote = self._zygote or ZygoteProcess()
        try:
            stdin, stdout = zygote.process.stdin, zygote.process.stdout
            assert stdin is not None and stdout is not None
            async with trio.lowlevel.FdStream(os.dup(stdout.fileno())) as events:
                self._stdin = trio.lowlevel.FdStream(os.dup(stdin.fileno()))
                stdin.close()
                await self._command(do="begin", sockets=str(self._sockets), errors=str(self._errors))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read_events, events)
                    yield self
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end(zygote)

    async def _end(self, zygote: ZygoteProcess) -> None:
        zygote.cut_lifeline()
        if self._stdin is not None:
            await self._stdin.aclose()  # the zygote kills and reaps its hosts, and removes their sockets
        with trio.move_on_after(2 if self._ready else 0):  # one that still imports torch has no hosts yet
            while zygote.process.poll() is None:
                await trio.sleep(0.002)
        zygote.end()

    async def _read_events(self, events: trio.lowlevel.FdStream) -> None:
        pending = b""
        async for data in events:
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["event"] == "zygote":
                    self._ready = True
                elif event["event"] == "started":
                    self._pids[event["key"]] = event["pid"]
                elif event["event"] == "exited":
                    self._exits_in.send_nowait((event["key"], event["code"]))
        raise self._gone()

    def _gone(self) -> ActorFailed:
        assert self._zygote is not None
        told = self._errors.read_text(errors="replace")[-4000:] if self._errors.exists() else ""
        what = "the process that hosts are forked from has ended"
        return ActorFailed("zygote", what, remote_traceback=self._zygote.last_words() + told)

    @property
    def pids(self) -> Mapping[str, int]:
        return self._pids

    async def start(self, spec: HostSpec) -> None:
        stderr = str(self._logs / f"{spec.label}.err")
        await self._command(do="start", key=spec.identity, spec=spec.to_plain(), stderr=stderr)

    async def wait(self) -> tuple[str, int]:
        return await self._exits.receive()

    async def kill(self, key: str) -> None:
        await self._command(do="kill", key=key)

    async def _command(self, **command: Any) -> None:
        assert self._stdin is not None
        try:
            async with self._one_at_a_time:
                await self._stdin.send_all(json.dumps(command).encode() + b"\n")
        except trio.BrokenResourceError:
            raise self._gone() from None
