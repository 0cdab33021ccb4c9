"""Cause faults in a simulated run that come from outside the graph.

They have a separate random source, so that a seed's other faults are the same with and without them."""

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
from ranvier.actors.protocol.control_protocol import Heartbeat
from ranvier.graph.sessions import journal
from ranvier.graph.sessions.journal import Began, Journal
from ranvier.graph.sessions.stream import Stream

if TYPE_CHECKING:
    from .simulate import Simulation

BEAT = Heartbeat(0, 0.0, 0, {})
TICK_S = 0.3


class Mishaps:
    """Cause the faults of one simulation, and check that nothing else changes."""

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
        me = weakref.ref(self)  # a failed schedule can be freed, with its folder
        self.journal = Journal(self._folder, Began("g", "m"), lambda *written: _write(me, *written))

    def turn(self) -> None:
        """Cause a fault with a small probability."""
        if self.left and self.chance.random() < 0.002:
            self.left -= 1
            self.chance.choice(self._kinds)()

    # -- what happens -------------------------------------------------------------------------------------------

    def all_leave(self) -> None:
        """Let all clients close in one moment."""
        simulation = self._of
        for stream, _ in simulation.streams:
            simulation.happened["left together"] += not stream.over
            simulation.gateway.cancel(stream)
        simulation.flush_gateway()

    def deadlines_pass(self) -> None:
        """Advance the time past every deadline."""
        simulation = self._of
        last_ns = max((due for _, due in self.deadlines()), default=0)
        simulation.network.now_ns = max(simulation.network.now_ns, last_ns)
        simulation.happened["expired"] += sum(not stream.over for stream, _ in self.deadlines())
        simulation.gateway.on_due(simulation.network.clock())
        simulation.flush_gateway()

    def deadlines(self) -> list[tuple[Stream, int]]:
        """Return the open streams that have a deadline."""
        return [(stream, due) for stream, due in self._of.deadlines.items() if not stream.over]

    def supervisor_pauses(self) -> None:
        """Pause the parent for up to a minute.

        Heartbeats queue up meanwhile. Its own late tick comes first."""
        simulation = self._of
        simulation.happened["paused"] += 1
        held = []
        for _ in range(self.chance.randrange(5, 200)):
            simulation.network.advance(TICK_S)
            held += [host.name for host in simulation.all_hosts if not host.hangs]
        before = {host.name for host in simulation.all_hosts if simulation.supervision.hosts[host.name].lost}
        simulation.supervision.on_tick(simulation.now_s)
        for name in held:
            simulation.supervision.on_message(name, BEAT, simulation.now_s)
        for host in simulation.all_hosts:
            lost = simulation.supervision.hosts[host.name].lost
            assert lost is None or host.hangs or host.name in before, f"a healthy host was lost by a pause: {lost}"
        simulation.gateway.on_due(simulation.network.clock())
        simulation.flush_gateway()

    def disk_is_full(self) -> None:
        """Fail every write for a while."""
        self._of.happened["disk full"] += 1
        self._full_until_s = self._of.now_s + self.chance.uniform(0.3, 5)

    def zygote_dies(self) -> None:
        """Kill the process that hosts are forked from, and all hosts with it.

        It takes a while until another one can start hosts."""
        simulation = self._of
        simulation.happened["zygote died"] += 1
        self.no_starts_until_s = simulation.now_s + self.chance.uniform(0.1, 3)
        for host in simulation.all_hosts:
            simulation.supervision.on_exit(host.name, -9, "", simulation.now_s, "the zygote was lost")

    def clocks_jump(self) -> None:
        """Set the clocks of the hosts' machines to other times."""
        simulation = self._of
        simulation.happened["clocks jumped"] += 1
        for host in simulation.all_hosts:
            host.offset_ns = max(-simulation.network.now_ns, self.chance.randrange(-(10**12), 10**12))

    # -- the journal --------------------------------------------------------------------------------------------

    def asked(self, stream: Stream, info: SessionInfo) -> None:
        """Record an accepted request in the journal."""
        stream.key = str(stream.info.session)
        self.journal.add(journal.of_request(stream.key, info, (), 0.0))

    def delivered(self, stream: Stream, position: int, token: int) -> None:
        """Record a delivered token in the journal."""
        self.journal.add(journal.Made(stream.key, position, token))

    def ended(self, stream: Stream, outcome: str | Exception) -> None:
        """Record the end of a request in the journal."""
        if stream.key:
            self.journal.add(journal.Ended(stream.key, str(outcome)))

    def check(self) -> None:
        """Check that a new process would find in the journal what the clients were given."""
        self._full_until_s = 0.0
        until_s = time.monotonic() + 5
        while not self.journal.durable and time.monotonic() < until_s:  # it pauses after a failed attempt
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
        """Return whether the disk is full now."""
        return self._of.now_s < self._full_until_s


def _write(mishaps: weakref.ref[Mishaps], descriptor: int, data: bytes, at: int) -> int:
    """Write to the journal, or fail if the disk is full."""
    here = mishaps()
    if here is not None and here.disk_full:
        raise OSError(errno.ENOSPC, "no space left")
    return os.pwrite(descriptor, data, at)
