"""Check the session protocol (epoch, position, fence, replay) as a state machine.

Hypothesis chooses what happens next, to which host, and what the network does to each message. It finds the shortest
sequence that fails."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ranvier.graph.sessions.stream import Delivered
from ranvier.transport.wires.testing import Carried

spec = importlib.util.spec_from_file_location("simulate_protocol", Path(__file__).with_name("simulate.py"))
assert spec is not None and spec.loader is not None
simulate: Any = importlib.util.module_from_spec(spec)
sys.modules["simulate_protocol"] = simulate
spec.loader.exec_module(simulate)

ANY = st.integers(0, 7)
MOST_CRASHES = 4


class Protocol(RuleBasedStateMachine):
    """Run the gateway, four hosts and an extra replica, as in `simulate.py`, in an order that hypothesis chooses."""

    @initialize(seed=st.integers(0, 20))
    def begin(self, seed: int) -> None:
        """Begin a simulation without random faults."""
        self.all = simulate.Simulation(seed)
        self.all.network.fault = self.fault
        self.all.crashes = self.all.left = self.all.leaving = 0
        self.crashes = 0
        self.next: list[str] = []
        self.calm = False

    def fault(self, crossing: Carried) -> Sequence[Carried]:
        """Apply the fault that was chosen for the next message."""
        what = self.next.pop() if self.next and not self.calm else "fine"
        if what == "lost":
            return []
        if what == "twice":
            return [crossing, crossing]
        if what == "late":
            return [
                Carried(crossing.number, crossing.source, crossing.target, crossing.header, crossing.buffers, 10**9)
            ]
        return [crossing.damaged()] if what == "damaged" and crossing.buffers else [crossing]

    @rule(prompt=st.lists(st.integers(0, 96), min_size=1, max_size=6), count=st.integers(1, 5))
    def submit(self, prompt: list[int], count: int) -> None:
        self.all.submit(prompt, count)

    @rule(bad=st.lists(st.sampled_from(("lost", "twice", "late", "damaged", "fine")), min_size=1, max_size=6))
    def network(self, bad: list[str]) -> None:
        """Choose what the network does to the next messages."""
        self.next = bad

    @rule(which=ANY, times=st.integers(1, 12))
    def receive(self, which: int, times: int) -> None:
        hosts = self.all.all_hosts
        if hosts:
            for _ in range(times):
                self.all.receive(hosts[which % len(hosts)])

    @rule(which=ANY, times=st.integers(1, 4))
    def step(self, which: int, times: int) -> None:
        hosts = self.all.all_hosts
        if hosts:
            host = hosts[which % len(hosts)]
            for _ in range(times):
                host.step()
                self.all.flush(host.exchange, host.name)

    @rule(which=ANY, times=st.integers(1, 6))
    def obey(self, which: int, times: int) -> None:
        hosts = self.all.all_hosts
        if hosts:
            host = hosts[which % len(hosts)]
            for _ in range(min(times, len(host.commands))):
                host.obey()
                self.all.flush(host.exchange, host.name)

    @rule(times=st.integers(1, 12))
    def gateway(self, times: int) -> None:
        for _ in range(times):
            self.all.receive_gateway()

    @rule()
    def tick(self) -> None:
        self.all.tick()

    @precondition(lambda self: self.crashes < MOST_CRASHES)
    @rule(which=ANY)
    def crash(self, which: int) -> None:
        hosts = self.all.all_hosts
        if hosts:
            self.crashes += 1
            self.all.crash(hosts[which % len(hosts)])

    @precondition(lambda self: self.all.away and self.all.coming is None)
    @rule(which=ANY)
    def replace(self, which: int) -> None:
        self.all.replace(which % len(self.all.away))

    @precondition(lambda self: self.all.streams)
    @rule(which=ANY)
    def leave(self, which: int) -> None:
        stream, _ = self.all.streams[which % len(self.all.streams)]
        self.all.gateway.cancel(stream)
        self.all.flush_gateway()

    @rule()
    def all_goes_well(self) -> None:
        """Let every process do all that is due for a while, so that sequences make progress."""
        for _ in range(3):
            self.round()

    def round(self) -> None:
        """Do all that is due once."""
        for host in self.all.all_hosts:
            while host.commands:
                host.obey()
            self.all.flush(host.exchange, host.name)
            while host.wire.inbox:
                self.all.receive(host)
            while host.step():
                self.all.flush(host.exchange, host.name)
        while self.all.wire.inbox:
            self.all.receive_gateway()
        self.all.enter()

    @invariant()
    def what_was_delivered_is_right(self) -> None:
        """Deliver only expected tokens, in order, and at most one end."""
        if not hasattr(self, "all"):
            return
        self.all.enter()
        for stream, expected in self.all.streams:
            events = list(stream.events)
            tokens = [event.token for event in events if isinstance(event, Delivered)]
            assert tokens == expected[: len(tokens)]
            assert sum(not isinstance(event, Delivered) for event in events) == stream.over

    def teardown(self) -> None:
        """End every stream once all goes well, whatever has happened."""
        if not hasattr(self, "all"):
            return
        self.calm = True
        for _ in range(400):
            if self.all.away and self.all.coming is None:
                self.all.replace(0)
            self.round()
            self.all.tick()
            if not self.all.away and self.all.coming is None and all(stream.over for stream, _ in self.all.streams):
                break
        self.all.check()


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=120, stateful_step_count=40)
