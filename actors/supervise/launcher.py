"""Where hosts run, behind three functions: start one, wait for its end, kill it. Nothing else knows.

`LocalLauncher` forks them on this machine from one process that has imported torch (zygote.py). That process is watched
itself. If it ends, its hosts end with it, and the next host is forked from a new one. If it stands still, its hosts go on, and
a new one takes its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import trio

from ranvier.transport.format.errors import ProtocolError, ResourceError

from ..errors import ActorFailed, Cause
from ..protocol.host_spec import HostSpec, Restart
from .restarts import Restarts
from .zygote_process import ZygoteProcess
from .zygote_protocol import Begin, Command, Event, Exited, Imported, NotStarted, Reader, Start, Started, pack

READY_DEADLINE_S = 120.0
"""For the import of torch, on a disk that is slow and beside other work."""
STARTED_DEADLINE_S = 20.0
"""For a fork, which takes 20 ms, and what hosts of that kind import, which may be transformers."""
CODE_DEADLINE_S = 1.0
"""For the exit code of a host that is known to have ended."""
KILLED = -int(signal.SIGKILL)


class Exit(NamedTuple):
    """One host has ended, by exit code (negative: the signal). `because` says what else was lost with it, if anything."""

    key: str
    code: int
    because: str = ""


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

    async def wait(self) -> Exit:
        """Wait for the next host that ends, and return how it ended."""

    async def kill(self, key: str) -> None:
        """End a host at once, whatever it is doing."""


_ENDED = trio.BrokenResourceError, trio.ClosedResourceError
"""What a command to a zygote ends with that is gone. Its events tell of that."""


@dataclass(eq=False)
class _Zygote:
    """One process that forks hosts, as its launcher sees it. `answers` are of starts: an empty one means that it was done."""

    process: ZygoteProcess
    stdin: trio.lowlevel.FdStream
    ready: trio.Event = field(default_factory=trio.Event)
    answers: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    changed: trio.Event = field(default_factory=trio.Event)
    gone: bool = False
    retired: bool = False
    """It did not answer in time: nothing is asked of it any more, and what it still does is undone."""

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@dataclass(eq=False)
class _Host:
    """One host's process. The descriptor becomes readable when it has ended, and cannot come to mean another process."""

    pid: int
    descriptor: int
    zygote: _Zygote


class LocalLauncher:
    """Hosts as processes of this machine, forked from a zygote: one that was started before, or one of its own. It is ended
    in either case. Use as `async with LocalLauncher(…).running()`.

    `counters` says how often a zygote was replaced, and why.
    """

    def __init__(self, sockets: Path, logs: Path, zygote: ZygoteProcess | None = None) -> None:
        self.counters: Counter[str] = Counter()
        self._sockets = sockets
        self._errors = logs / "zygote.err"
        self._logs = logs
        self._given = zygote
        self._zygotes: list[_Zygote] = []
        self._hosts: dict[str, _Host] = {}
        self._pids: dict[str, int] = {}
        self._restarts = Restarts(Restart())
        self._exits_in, self._exits = trio.open_memory_channel[Exit](1000)
        self._one_at_a_time = trio.Lock()
        self._nursery: trio.Nursery | None = None

    def begin(self) -> None:
        """Start the zygote, which imports torch while its starter works on. `running` waits for nothing else.

        Raises:
            ResourceError: it cannot be started.
        """
        if self._given is None:
            try:
                self._given = ZygoteProcess()
            except OSError as error:
                raise ResourceError(f"the process that hosts are forked from cannot be started: {error}") from None

    def end_zygote(self) -> None:
        """End a zygote that was given or begun, and that `running` has not taken over. Idempotent."""
        if self._given is not None and not self._zygotes:
            self._given.end()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LocalLauncher]:
        """Start the zygote if need be; on leaving, whatever still runs is killed and reaped."""
        try:
            async with trio.open_nursery() as self._nursery:
                await self._new_zygote(self._given)
                yield self
                self._nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end()

    # -- zygotes ------------------------------------------------------------------------------------------------

    async def _new_zygote(self, given: ZygoteProcess | None = None) -> _Zygote:
        process = given
        assert self._nursery is not None
        try:
            process = process or ZygoteProcess()
            stdin, stdout = process.process.stdin, process.process.stdout
            assert stdin is not None and stdout is not None
            commands = trio.lowlevel.FdStream(os.dup(stdin.fileno()))
            zygote = _Zygote(process, commands)
            events = trio.lowlevel.FdStream(os.dup(stdout.fileno()))
        except OSError as error:
            if process is not None:
                process.end()
            raise ResourceError(f"the process that hosts are forked from cannot be started: {error}") from None
        stdin.close()
        self._zygotes.append(zygote)
        self._nursery.start_soon(self._read_events, zygote, events)
        with contextlib.suppress(*_ENDED):
            await self._command(zygote, Begin(str(self._sockets), str(self._errors)))
        return zygote

    async def _living(self) -> _Zygote:
        """Return the zygote that forks, after starting another one if it is gone.

        Raises:
            ActorFailed: that was done too often.
        """
        zygote = self._zygotes[-1]
        if not (zygote.gone or zygote.retired):
            return zygote
        delay_s = self._restarts.take(time.monotonic())
        if delay_s is None:
            raise self._failed(zygote, f"the process that hosts are forked from is lost; {self._restarts}")
        self.counters["zygotes_stuck" if zygote.retired else "zygotes_lost"] += 1
        if self.counters.total() > 1:  # the first is replaced at once
            await trio.sleep(delay_s)
        return await self._new_zygote()

    async def _read_events(self, zygote: _Zygote, events: trio.lowlevel.FdStream) -> None:
        reader: Reader[Event] = Reader(Event)
        async with events:
            with contextlib.suppress(trio.BrokenResourceError, ProtocolError):  # it is gone, or not to be trusted
                async for data in events:
                    for event in reader.feed(data):
                        self._on_event(zygote, event)
                    zygote.notify()
        zygote.gone = True
        zygote.notify()
        await zygote.stdin.aclose()
        zygote.process.end()  # another one takes its place: nothing of this one is held any longer

    def _on_event(self, zygote: _Zygote, event: Event) -> None:
        match event:
            case Imported():
                zygote.ready.set()
            case Started():
                self._on_started(zygote, event.key, event.pid)
            case NotStarted():
                zygote.answers[event.key] = event.why
            case Exited():
                zygote.codes[event.key] = event.code

    def _on_started(self, zygote: _Zygote, key: str, pid: int) -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended, and its code is the next event
            descriptor = -1
        except OSError as error:
            zygote.answers[key] = f"its process cannot be watched: {error}"
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return
        host = _Host(pid, descriptor, zygote)
        if zygote.retired:  # it goes on after all; another one has forked this host since
            _kill(host)
            _close(host)
            return
        zygote.answers[key] = ""
        self._hosts[key], self._pids[key] = host, pid
        assert self._nursery is not None
        self._nursery.start_soon(self._until_exit, key, host)

    async def _command(self, zygote: _Zygote, command: Command) -> None:
        await zygote.stdin.send_all(pack(command))

    def _failed(self, zygote: _Zygote, what: str) -> ActorFailed:
        errors = ""
        with contextlib.suppress(OSError):
            errors = self._errors.read_text(errors="replace")[-4000:]
        return ActorFailed("zygote", what, Cause.DIED, remote_traceback=zygote.process.last_words() + errors)

    # -- hosts --------------------------------------------------------------------------------------------------

    @property
    def pids(self) -> Mapping[str, int]:
        return self._pids

    async def start(self, spec: HostSpec) -> None:
        """Fork a host from the zygote.

        Raises:
            ActorFailed: the host cannot be forked, or no zygote can be started.
        """
        async with self._one_at_a_time:
            while True:
                try:
                    zygote = await self._living()
                except ResourceError as error:
                    raise ActorFailed(spec.label, str(error), Cause.REFUSED) from None
                why = await self._started(zygote, spec)
                if why is None:
                    continue
                if why:
                    raise ActorFailed(spec.label, why, Cause.REFUSED)
                return

    async def _started(self, zygote: _Zygote, spec: HostSpec) -> str | None:
        """Ask a zygote for a host: why there is none, empty if there is one, None if the zygote did not answer."""
        key = spec.identity
        stderr = str(self._logs / f"{spec.label}.err")
        zygote.answers.pop(key, None)
        with trio.move_on_after(STARTED_DEADLINE_S if zygote.ready.is_set() else READY_DEADLINE_S):
            with contextlib.suppress(*_ENDED):
                await self._command(zygote, Start(spec, stderr))
            while key not in zygote.answers and not zygote.gone:
                await zygote.changed.wait()
        if key in zygote.answers:
            return zygote.answers.pop(key)
        if zygote.gone and not zygote.ready.is_set():  # the next would fare no better: torch cannot be imported
            raise self._failed(zygote, "the process that hosts are forked from has ended")
        zygote.retired = not zygote.gone
        return None

    async def _until_exit(self, key: str, host: _Host) -> None:
        """Wait for the end of one host. Its exit code is the zygote's to tell, unless that stands still or is gone."""
        if host.descriptor >= 0:
            await trio.lowlevel.wait_readable(host.descriptor)
        with trio.move_on_after(CODE_DEADLINE_S):
            while key not in host.zygote.codes and not host.zygote.gone:
                await host.zygote.changed.wait()
        _kill_group(host)
        _close(host)
        self._hosts.pop(key, None)  # its number may come to mean another process
        reported = key in host.zygote.codes
        because = "the process that hosts are forked from was lost, and its hosts with it" if host.zygote.gone else ""
        self._exits_in.send_nowait(Exit(key, host.zygote.codes.pop(key, KILLED), "" if reported else because))

    async def wait(self) -> Exit:
        return await self._exits.receive()

    async def kill(self, key: str) -> None:
        """Done from here: the zygote may stand still."""
        if key in self._hosts:
            _kill(self._hosts[key])

    # -- the end ------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        for zygote in self._zygotes:
            zygote.process.cut_lifeline()
            await zygote.stdin.aclose()  # it kills and reaps its hosts, and removes their sockets
        for zygote in self._zygotes:
            waits = zygote.ready.is_set() and not zygote.retired  # one that still imports torch has no hosts yet
            with trio.move_on_after(2 if waits else 0):
                while zygote.process.process.poll() is None:
                    await trio.sleep(0.002)
            zygote.process.end()
        for host in self._hosts.values():
            _kill(host)
            _kill_group(host)
            _close(host)


def _kill(host: _Host) -> None:
    if host.descriptor >= 0:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(host.descriptor, signal.SIGKILL)


def _kill_group(host: _Host) -> None:
    """Kill the processes that an actor's own code has started: a host leads a group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(host.pid, signal.SIGKILL)


def _close(host: _Host) -> None:
    if host.descriptor >= 0:
        os.close(host.descriptor)
        host.descriptor = -1
