"""What else goes wrong in a simulated run: things that come from outside the graph, all at once, and leave every host healthy.

They are drawn from a source of chance of their own, so that a seed's schedule of other faults is the same with and without.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ranvier.actors.component.session import SessionInfo
from ranvier.graph.sessions import journal
from ranvier.graph.sessions.journal import Began, Journal
from ranvier.graph.sessions.stream import Stream

if TYPE_CHECKING:
    from .simulate import Simulation

BEAT = {"steps": 0, "stepping_s": 0.0, "queued": 0, "counters": {}}
TICK_S = 0.3


class Mishaps:
    """Of one simulation: when they happen, and that what they must not touch stays as it was."""

    def __init__(self, seed: int, simulation: Simulation) -> None:
        self.chance = random.Random(seed ^ 0x5EED)
        self._of = simulation
        self._kinds: list[Callable[[], None]] = [
            self.all_leave, self.deadlines_pass, self.supervisor_pauses, self.disk_is_full, self.zygote_dies, self.clocks_jump,
        ]  # fmt: skip
        self.left = self.chance.randrange(0, 4)
        self.no_starts_until_s = 0.0
        self._full_until_s = 0.0
        self._folder = Path(tempfile.mkdtemp(prefix="rv-sim-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        me = weakref.ref(self)  # a schedule that fails can be let go of, with its folder
        self.journal = Journal(self._folder, Began("g", "m"), lambda *written: _write(me, *written))

    def turn(self) -> None:
        """Perhaps one happens now."""
        if self.left and self.chance.random() < 0.002:
            self.left -= 1
            self.chance.choice(self._kinds)()

    # -- what happens -------------------------------------------------------------------------------------------

    def all_leave(self) -> None:
        """All clients close in one moment."""
        simulation = self._of
        for stream, _ in simulation.streams:
            simulation.happened["left together"] += not stream.over
            simulation.gateway.cancel(stream)
        simulation.flush_gateway()

    def deadlines_pass(self) -> None:
        """Time goes on past every deadline that was given."""
        simulation = self._of
        last_ns = max((due for _, due in self.deadlines()), default=0)
        simulation.network.now_ns = max(simulation.network.now_ns, last_ns)
        simulation.happened["expired"] += sum(not stream.over for stream, _ in self.deadlines())
        simulation.gateway.on_due(simulation.network.clock())
        simulation.flush_gateway()

    def deadlines(self) -> list[tuple[Stream, int]]:
        """The open streams that have one."""
        return [(stream, due) for stream, due in self._of.deadlines.items() if not stream.over]

    def supervisor_pauses(self) -> None:
        """The parent stands still for up to a minute. Signs of life queue up meanwhile; its own late tick comes first."""
        simulation = self._of
        simulation.happened["paused"] += 1
        held = []
        for _ in range(self.chance.randrange(5, 200)):
            simulation.network.advance(TICK_S)
            held += [host.name for host in simulation.all_hosts if not host.hangs]
        before = {host.name for host in simulation.all_hosts if simulation.supervision.hosts[host.name].lost}
        simulation.supervision.on_tick(simulation.now_s)
        for name in held:
            simulation.supervision.on_message(name, "heartbeat", BEAT, simulation.now_s)
        for host in simulation.all_hosts:
            lost = simulation.supervision.hosts[host.name].lost
            assert lost is None or host.hangs or host.name in before, f"a healthy host was lost by a pause: {lost}"
        simulation.gateway.on_due(simulation.network.clock())
        simulation.flush_gateway()

    def disk_is_full(self) -> None:
        """Every write fails for a while."""
        self._of.happened["disk full"] += 1
        self._full_until_s = self._of.now_s + self.chance.uniform(0.3, 5)

    def zygote_dies(self) -> None:
        """The process that hosts are forked from dies, and all hosts with it; another one needs a while to be there."""
        simulation = self._of
        simulation.happened["zygote died"] += 1
        self.no_starts_until_s = simulation.now_s + self.chance.uniform(0.1, 3)
        for host in simulation.all_hosts:
            simulation.supervision.on_exit(host.name, -9, "", simulation.now_s, "the zygote was lost")

    def clocks_jump(self) -> None:
        """The hosts are on machines whose clocks show other times, and do so by other amounts from now on."""
        simulation = self._of
        simulation.happened["clocks jumped"] += 1
        for host in simulation.all_hosts:
            host.offset_ns = max(-simulation.network.now_ns, self.chance.randrange(-(10**12), 10**12))

    # -- the journal --------------------------------------------------------------------------------------------

    def asked(self, stream: Stream, info: SessionInfo) -> None:
        """A request was accepted."""
        stream.key = str(stream.info.session)
        self.journal.add(journal.of_request(stream.key, info, (), 0.0))

    def delivered(self, stream: Stream, position: int, token: int) -> None:
        self.journal.add(journal.Made(stream.key, position, token))

    def ended(self, stream: Stream, outcome: str | Exception) -> None:
        if stream.key:
            self.journal.add(journal.Ended(stream.key, str(outcome)))

    def check(self) -> None:
        """The journal that a new process would find says what the clients were given."""
        self._full_until_s = 0.0
        until_s = time.monotonic() + 5
        while not self.journal.durable and time.monotonic() < until_s:  # it rests after an attempt that failed
            self.journal.catch_up()
        assert self.journal.durable
        self.journal.close()
        left = journal.Resumed(self._folder, Began("g", "m"))
        for stream, _ in self._of.streams:
            if stream.key in left.requests:
                tokens = stream.log[len(stream.asked.log) : len(stream.asked.log) + stream.delivered]
                assert left.requests[stream.key].tokens == tokens, f"request {stream.key}: the journal has other tokens"
        left.close()

    @property
    def disk_full(self) -> bool:
        return self._of.now_s < self._full_until_s


def _write(mishaps: weakref.ref[Mishaps], descriptor: int, data: bytes, at: int) -> int:
    here = mishaps()
    if here is not None and here.disk_full:
        raise OSError(errno.ENOSPC, "no space left")
    return os.pwrite(descriptor, data, at)
