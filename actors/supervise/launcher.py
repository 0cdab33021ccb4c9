"""Run hosts behind three functions: start one, wait for its end, kill it. No other module knows where hosts run.

`LocalLauncher` forks hosts on this machine from one process that has imported torch, the zygote (zygote.py). The launcher
watches the zygote, too. If the zygote ends, its hosts end with it, and the next host is forked from a new zygote. If it hangs,
its hosts continue, and a new zygote takes its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import trio

from ranvier.transport.format.errors import ProtocolError, ResourceError
from ranvier.transport.system import ProcessHandle

from ..errors import ActorFailed, Cause
from ..protocol.host_spec import HostSpec, Restart
from .restarts import Restarts
from .zygote_process import ZygoteProcess
from .zygote_protocol import Begin, Command, Event, Exited, Imported, NotStarted, Reader, Start, Started, pack

READY_DEADLINE_S = 120.0
"""Limit for the import of torch, on a slow disk and a busy machine."""
STARTED_DEADLINE_S = 20.0
"""Limit for a fork, which takes 20 ms, and for the imports of hosts of that kind, which may include transformers."""
LOOK_S = 0.02
"""Seconds between two looks whether a host still lives, where the system does not say when it ends."""
CODE_DEADLINE_S = 1.0
"""Limit for the arrival of the exit code of a host that is known to have ended."""
KILLED = -int(signal.SIGKILL)


class Exit(NamedTuple):
    """Report that a process has ended, with its exit code (negative: the signal). `because` is a loss that caused it, if any.

    `keys` are the identities of the hosts that it ran: one, or those that shared it.
    """

    keys: tuple[str, ...]
    code: int
    because: str = ""


class Launcher(Protocol):
    """Start, await and kill hosts. A key is the identity of a host."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Return the process ids of the hosts on this machine, by key."""

    async def start(self, specs: Sequence[HostSpec]) -> None:
        """Begin to start a process that runs these hosts: one, or those that share it. Each reports `ready` later.

        Raises:
            ActorFailed: hosts cannot be started at all.
        """

    async def wait(self) -> Exit:
        """Wait for the next host that ends, and return how it ended."""

    async def kill(self, key: str) -> None:
        """Kill a host at once, whatever it is doing."""


_ENDED = trio.BrokenResourceError, trio.ClosedResourceError
"""Errors of sending a command to a zygote that is gone. `_read_events` notices the loss and handles it."""


@dataclass(eq=False)
class _Zygote:
    """Represent one process that forks hosts, as its launcher sees it.

    `answers` holds the result of each start, by key: empty if the host was forked, otherwise the reason why not.
    """

    process: ZygoteProcess
    stdin: trio.lowlevel.FdStream
    ready: trio.Event = field(default_factory=trio.Event)
    answers: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    changed: trio.Event = field(default_factory=trio.Event)
    gone: bool = False
    retired: bool = False
    """True if it did not answer in time. It gets no more commands, and any host that it still forks is killed."""

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@dataclass(eq=False)
class _Host:
    """Hold one host's process; `process` is None if it had ended before it could be watched."""

    keys: tuple[str, ...]
    pid: int
    process: ProcessHandle | None
    zygote: _Zygote


class LocalLauncher:
    """Run hosts as processes of this machine, forked from a zygote. Use as `async with LocalLauncher(…).running()`.

    The zygote is the given one, or one that the launcher starts. The launcher ends it in both cases. `counters` counts how
    often a zygote was replaced, by reason.
    """

    def __init__(self, sockets: Path, logs: Path, zygote: ZygoteProcess | None = None) -> None:
        self.counters: Counter[str] = Counter()
        self._sockets = sockets
        self._errors = logs / "zygote.err"
        self._logs = logs
        self._given = zygote
        self._zygotes: list[_Zygote] = []
        self._hosts: dict[str, _Host] = {}
        self._members: dict[str, tuple[str, ...]] = {}
        self._pids: dict[str, int] = {}
        self._restarts = Restarts(Restart())
        self._exits_in, self._exits = trio.open_memory_channel[Exit](1000)
        self._one_at_a_time = trio.Lock()
        self._nursery: trio.Nursery | None = None

    def begin(self) -> None:
        """Start the zygote early, so that it imports torch while the caller continues. `running` then uses this zygote.

        Raises:
            ResourceError: the zygote cannot be started.
        """
        if self._given is None:
            try:
                self._given = ZygoteProcess()
            except OSError as error:
                raise ResourceError(f"the process that hosts are forked from cannot be started: {error}") from None

    def end_zygote(self) -> None:
        """End the zygote that was given, or started by `begin`, unless `running` has taken it over. Idempotent."""
        if self._given is not None and not self._zygotes:
            self._given.end()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LocalLauncher]:
        """Start the zygote if there is none yet. On exit, kill and reap every process that still runs."""
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
        """Return the zygote to fork from. Start another one first if the last one is gone or hangs.

        Raises:
            ActorFailed: zygotes were replaced too often.
        """
        zygote = self._zygotes[-1]
        if not (zygote.gone or zygote.retired):
            return zygote
        delay_s = self._restarts.take(time.monotonic())
        if delay_s is None:
            raise self._failed(zygote, f"the process that hosts are forked from is lost; {self._restarts}")
        self.counters["zygotes_stuck" if zygote.retired else "zygotes_lost"] += 1
        if self.counters.total() > 1:  # only the first one is replaced at once
            await trio.sleep(delay_s)
        return await self._new_zygote()

    async def _read_events(self, zygote: _Zygote, events: trio.lowlevel.FdStream) -> None:
        reader: Reader[Event] = Reader(Event)
        async with events:
            with contextlib.suppress(trio.BrokenResourceError, ProtocolError):  # it is gone, or sent invalid data
                async for data in events:
                    for event in reader.feed(data):
                        self._on_event(zygote, event)
                    zygote.notify()
        zygote.gone = True
        zygote.notify()
        await zygote.stdin.aclose()
        zygote.process.end()  # another one takes its place: release all resources of this one

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
            process = ProcessHandle(pid)
        except ProcessLookupError:  # it has ended; the next event brings its exit code
            process = None
        except OSError as error:
            zygote.answers[key] = f"its process cannot be watched: {error}"
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return
        host = _Host(self._members.get(key, (key,)), pid, process, zygote)
        if zygote.retired:  # it continued after all, but another one has forked this host since
            _kill(host)
            _close(host)
            return
        zygote.answers[key] = ""
        for each in host.keys:
            self._hosts[each], self._pids[each] = host, pid
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

    async def start(self, specs: Sequence[HostSpec]) -> None:
        """Fork a process from the zygote.

        Raises:
            ActorFailed: the host cannot be forked, or no zygote can be started.
        """
        async with self._one_at_a_time:
            while True:
                try:
                    zygote = await self._living()
                except ResourceError as error:
                    raise ActorFailed(specs[0].label, str(error), Cause.REFUSED) from None
                why = await self._started(zygote, specs)
                if why is None:
                    continue
                if why:
                    raise ActorFailed(specs[0].label, why, Cause.REFUSED)
                return

    async def _started(self, zygote: _Zygote, specs: Sequence[HostSpec]) -> str | None:
        """Ask a zygote for a process. Return an empty text, why it cannot be started, or None if the zygote did not answer."""
        key = specs[0].process
        self._members[key] = tuple(spec.identity for spec in specs)
        stderr = str(self._logs / f"{specs[0].log_name}.err")
        zygote.answers.pop(key, None)
        with trio.move_on_after(STARTED_DEADLINE_S if zygote.ready.is_set() else READY_DEADLINE_S):
            with contextlib.suppress(*_ENDED):
                await self._command(zygote, Start(list(specs), stderr))
            while key not in zygote.answers and not zygote.gone:
                await zygote.changed.wait()
        if key in zygote.answers:
            return zygote.answers.pop(key)
        if zygote.gone and not zygote.ready.is_set():  # the next one would fail, too: torch cannot be imported
            raise self._failed(zygote, "the process that hosts are forked from has ended")
        zygote.retired = not zygote.gone
        return None

    async def _until_exit(self, key: str, host: _Host) -> None:
        """Wait for the end of one host. The zygote reports its exit code, unless the zygote hangs or is gone."""
        process = host.process
        if process is not None and process.fd >= 0:
            await trio.lowlevel.wait_readable(process.fd)
        elif process is not None:
            while process.send(0) and key not in host.zygote.codes:
                await trio.sleep(LOOK_S)
        with trio.move_on_after(CODE_DEADLINE_S):
            while key not in host.zygote.codes and not host.zygote.gone:
                await host.zygote.changed.wait()
        _kill_group(host)
        _close(host)
        for each in host.keys:
            self._hosts.pop(each, None)  # its pid may belong to another process later
        self._members.pop(key, None)
        reported = key in host.zygote.codes
        because = "the process that hosts are forked from was lost, and its hosts with it" if host.zygote.gone else ""
        self._exits_in.send_nowait(Exit(host.keys, host.zygote.codes.pop(key, KILLED), "" if reported else because))

    async def wait(self) -> Exit:
        return await self._exits.receive()

    async def kill(self, key: str) -> None:
        """Kill the process of a host directly, because the zygote may hang."""
        if key in self._hosts:
            _kill(self._hosts[key])

    # -- the end ------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        for zygote in self._zygotes:
            zygote.process.cut_lifeline()
            await zygote.stdin.aclose()  # so it kills and reaps its hosts, and removes their sockets
        for zygote in self._zygotes:
            waits = zygote.ready.is_set() and not zygote.retired  # one that still imports torch has no hosts yet
            with trio.move_on_after(2 if waits else 0):
                while zygote.process.process.poll() is None:
                    await trio.sleep(0.002)
            zygote.process.end()
        for host in set(self._hosts.values()):
            _kill(host)
            _kill_group(host)
            _close(host)


def _kill(host: _Host) -> None:
    if host.process is not None:
        host.process.send(signal.SIGKILL)


def _kill_group(host: _Host) -> None:
    """Kill the processes that an actor's code has started: each host leads its own process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(host.pid, signal.SIGKILL)


def _close(host: _Host) -> None:
    if host.process is not None:
        host.process.close()
