"""Run several actors in one process: one step thread, in which they take turns, with one pool of threads for products.

Each actor has its own links, credits, records, counters and control thread, as in a process of its own. Each runs in a
greenlet. It gives up its turn when it waits for messages, and after a step if it has another one to do, so that what it sent is
worked on while it is still in the cache. What is ready first goes first. When no actor has anything to do, the thread waits for
all of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from greenlet import greenlet  # type: ignore[import-untyped]

from ranvier.transport import system
from ranvier.transport.links.wire import ProcessWire

from ..model.kernels import packed
from ..protocol.host_spec import HostSpec
from ..trace.crossing import Crossing
from .batcher import Work
from .control import ControlThread
from .host import Host
from .process import outcome, prepare_process
from .shared_wire import SharedWire

AWAKE_NS = 500_000
"""If the last wait was shorter than this, the next one stays awake for this long: a sleeping core wakes up late and cold."""
REST_US = 300
"""Microseconds that the pool's threads stay awake after a step: the next actor's step begins within this time."""
LOOK_NS = 300_000
"""Time after which the wires are looked at while actors work: acknowledgements and new sessions come over them."""
LATE_NS = 20_000_000
"""An actor whose wait is over by this much goes before actors that have messages."""


def main(specs: Sequence[HostSpec], lifeline: int) -> int:
    """Run the actors of one process until all have ended, and return its exit code.

    `lifeline` is a descriptor that becomes readable when the supervisor has ended.
    """
    prepare_process(specs[0])
    crossings = [Crossing() for _ in specs]
    controls = [ControlThread(spec, crossing, lifeline) for spec, crossing in zip(specs, crossings, strict=True)]
    for control in controls:
        control.start()
    packed.rest(REST_US)
    turns = Together()
    hosts = [_Member(spec, crossing, turns) for spec, crossing in zip(specs, crossings, strict=True)]
    try:
        with torch.inference_mode():
            return turns.run(hosts)
    finally:
        for control in controls:
            control.end()
        for control in controls:
            control.finish()
        for host in hosts:
            host.close()
        turns.close()


class _Member(Host):
    """Run an actor that shares its process."""

    shares = True

    def __init__(self, spec: HostSpec, crossing: Crossing, turns: Together) -> None:
        super().__init__(spec, crossing)
        self._turns = turns

    def mode(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the mode belongs to the thread

    def open_wire(self) -> ProcessWire:
        return SharedWire(self._turns, super().open_wire(), lambda: self.actor.writes)

    def step(self, work: Work) -> None:
        super().step(work)
        if (
            self.core.queue
        ):  # otherwise it waits next; with 16 streams its rows then come together: a quarter more tokens
            self._turns.others_first()


class Together:
    """Let the actors of one process take turns (see `shared_wire.Turns`)."""

    def __init__(self) -> None:
        self.wires: dict[str, SharedWire] = {}
        self._running: dict[SharedWire, greenlet] = {}
        self._waiting: dict[SharedWire, int | None] = {}
        """Until when the wires wait that have nothing to give, in nanoseconds; None: forever."""
        self._woken: deque[SharedWire] = deque()
        self._ready: deque[greenlet] = deque()
        self._asleep = False
        self._bell = system.Bell()
        self._quick = False
        self._looked_ns = 0
        self._code = 0
        self._hub: greenlet

    def run(self, hosts: Sequence[Host]) -> int:
        """Run all actors. Return 0 if all of them ended as they should, else, as soon as one fails, 1."""
        self._hub = greenlet.getcurrent()
        living = [greenlet(self._live, self._hub) for _ in hosts]
        self._ready.extend(living)
        starting = dict(zip(living, hosts, strict=True))
        while not self._code and not all(one.dead for one in living):
            self._take_in()
            if self._ready:
                one = self._ready.popleft()
                if one in starting:
                    one.switch(starting.pop(one))
                else:
                    one.switch()
            else:
                self._sleep()
        return self._code

    def _live(self, host: Host) -> None:
        self._code = max(self._code, outcome(host))

    def wait(self, wire: SharedWire, timeout_s: float | None) -> None:
        self._running[wire] = greenlet.getcurrent()
        self._waiting[wire] = None if timeout_s is None else time.monotonic_ns() + int(timeout_s * 1e9)
        self._hub.switch()

    def wake(self, wire: SharedWire) -> None:
        self._woken.append(wire)
        if self._asleep:
            self._bell.ring()

    def others_first(self) -> None:
        """Let the actors that have something to do go before the one that runs."""
        if self._woken or self._ready:
            self._ready_again()
            self._ready.append(greenlet.getcurrent())
            self._hub.switch()

    def close(self) -> None:
        self._bell.close()

    # -- the hub ------------------------------------------------------------------------------------------------

    def _ready_again(self) -> None:
        """Note that the wires that were woken need not wait any longer."""
        while self._woken:
            wire = self._woken.popleft()
            if wire in self._waiting:
                del self._waiting[wire]
                self._ready.append(self._running[wire])

    def _take_in(self) -> None:
        """Find out who can go on."""
        now_ns = time.monotonic_ns()
        if now_ns - self._looked_ns > LOOK_NS:
            self._look()
        self._ready_again()
        limit_ns = now_ns - LATE_NS if self._ready else now_ns
        for wire in [wire for wire, until_ns in self._waiting.items() if until_ns is not None and until_ns <= limit_ns]:
            del self._waiting[wire]
            self._ready.append(self._running[wire])

    def _look(self) -> bool:
        """Look for messages from other processes. Return whether any actor was woken."""
        self._woken.extend([wire for wire in self.wires.values() if wire.look()])
        self._looked_ns = time.monotonic_ns()
        return bool(self._woken)

    def _sleep(self) -> None:
        """Wait until a message comes from elsewhere, a command comes, or a wait is over."""
        began_ns = time.monotonic_ns()
        until_ns = min(
            (until for until in self._waiting.values() if until is not None), default=began_ns + 1_000_000_000
        )
        while self._quick and time.monotonic_ns() < min(until_ns, began_ns + AWAKE_NS):
            if self._look():
                return
            system.yield_core()
        self._asleep = True  # from here on, whoever wakes a wire rings
        if not self._look():
            outside = [wire.outer.fd for wire in self._waiting if wire.outside]
            system.wait_readable((self._bell.fd, *outside), max(0.0, (until_ns - time.monotonic_ns()) / 1e6))
            self._look()
        self._asleep = False
        self._bell.hush()
        self._quick = time.monotonic_ns() - began_ns < AWAKE_NS
