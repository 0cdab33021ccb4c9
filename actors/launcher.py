"""Where hosts run, behind three functions: start one, wait for its end, kill it. Nothing else knows.

`LocalLauncher` forks them on this machine from one process that has imported torch (zygote.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import trio

from .errors import ActorFailed
from .spec import HostSpec


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
    """Hosts as processes of this machine, forked from a zygote. Use as `async with LocalLauncher(…).running()`."""

    def __init__(self, sockets: Path, logs: Path) -> None:
        self._sockets = sockets
        self._logs = logs
        self._pids: dict[str, int] = {}
        self._ready = False
        self._exits_in, self._exits = trio.open_memory_channel[tuple[str, int]](1000)
        self._process: trio.Process | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LocalLauncher]:
        """Start the zygote; on leaving, whatever still runs is killed and reaped."""
        # The read end goes to every host: it becomes readable when this process is gone, however it went.
        lifeline_read, lifeline_write = os.pipe2(os.O_CLOEXEC)
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # numpy's threads would not survive the fork
        errors = self._logs / "zygote.err"
        try:
            with errors.open("ab") as stderr:
                process = self._process = await trio.lowlevel.open_process(
                    [sys.executable, "-m", "ranvier.actors.zygote", str(lifeline_read), str(self._sockets)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    pass_fds=(lifeline_read,),
                    start_new_session=True,  # the terminal's Ctrl-C comes to the supervisor alone
                    env=environment,
                )
            os.close(lifeline_read)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_events, process, errors)
                yield self
                nursery.cancel_scope.cancel()
        finally:
            os.close(lifeline_write)
            with trio.CancelScope(shield=True):
                await self._end()

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        await process.stdin.aclose()  # the zygote kills and reaps its hosts, and removes their sockets
        with trio.move_on_after(2 if self._ready else 0):  # one that still imports torch has no hosts yet
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()

    async def _read_events(self, process: trio.Process, errors: Path) -> None:
        assert process.stdout is not None
        pending = b""
        async for data in process.stdout:
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event["event"] == "zygote":
                    self._ready = True
                elif event["event"] == "started":
                    self._pids[event["key"]] = event["pid"]
                elif event["event"] == "exited":
                    self._exits_in.send_nowait((event["key"], event["code"]))
        tail = errors.read_text(errors="replace")[-4000:]
        raise ActorFailed("zygote", "the process that hosts are forked from has ended", remote_traceback=tail)

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
        assert self._process is not None and self._process.stdin is not None
        try:
            await self._process.stdin.send_all(json.dumps(command).encode() + b"\n")
        except trio.BrokenResourceError:
            raise ActorFailed("zygote", "the process that hosts are forked from has ended") from None
