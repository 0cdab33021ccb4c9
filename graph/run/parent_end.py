"""Connect a run's own process to its hosts: the wire, the records of its messages, and their trace file."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

import trio

from ranvier.actors.host.control import SHIP_AT_ONCE, SHIP_INTERVAL_S
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.trace.ring import Ring
from ranvier.actors.trace.trace_file import TraceFile
from ranvier.actors.trace.trace_records import Records
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.host_id import HostId
from ranvier.transport.links.exchange import ACK_DELAY_S, TICK_S, Exchange
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.links.link_state import Received
from ranvier.transport.links.wire import Arrival
from ranvier.transport.wires.opening import open_wire
from ranvier.transport.wires.trio_wire import TrioWire

from ..plan.plan import EPOCH, Plan
from .run_folder import RunFolder

ME = str(HostId(GATEWAY, 0, EPOCH))


class Driver(Protocol):
    """Handle what happens on the links of a run. `ParentEnd.drive` calls these methods."""

    @property
    def due_ns(self) -> int | None:
        """Return the time at which `on_due` is to be called, or None."""

    def on_message(self, received: Received) -> None:
        """Handle a message that was received."""

    def on_refused(self, error: ProtocolError) -> None:
        """Handle a message that was refused."""

    def on_due(self, now_ns: int) -> None:
        """Do the work that is due: the time `due_ns` has come."""

    def on_tick(self) -> None:
        """Do periodic work: no message came for a second."""

    def flush(self) -> None:
        """Send the messages and commands that the other methods decided on."""


class ParentEnd:
    """Represent the run's own process as one end of its links.

    A training sets `by_position`: its records are sampled by position instead of by session.
    """

    def __init__(self, plan: Plan, folder: RunFolder, links: Iterable[LinkSpec], *, by_position: bool = False) -> None:
        graph = plan.graph
        self._folder = folder
        self._traces, self._sampling = bool(graph.file.trace), graph.file.sampling
        self.wire = TrioWire(
            open_wire(
                ME, plan.gateway_endpoint(folder.sockets), max_frame_bytes=graph.file.max_frame_bytes,
                shared_from_bytes=graph.file.shared_from_bytes, keys=plan.keys(folder.path),
            )
        )  # fmt: skip
        self._ring = Ring()
        records = self.records = Records(self._ring, self._sampling.sample, by_position=by_position)
        callbacks = (records.sent, records.unsent, records.control) if self._traces else ()
        self.exchange = Exchange(ME, plan.hash, links, time.monotonic_ns, *callbacks)

    async def drive(self, driver: Driver) -> None:
        """Receive until cancelled: messages go to `driver`, acknowledgements and probes go out in time."""
        exchange = self.exchange
        while True:
            wait_s = ACK_DELAY_S if exchange.owes() else TICK_S
            due_ns = driver.due_ns
            if due_ns is not None:
                wait_s = min(wait_s, max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            arrival = None
            with trio.move_on_after(wait_s):
                try:
                    arrival = await self.wire.receive()
                except ProtocolError as error:
                    driver.on_refused(error)
            if arrival is not None:
                self._take_in(arrival, driver)
            elif exchange.owes():
                exchange.idle()
            else:
                exchange.tick()
                driver.on_tick()
            if due_ns is not None and time.monotonic_ns() >= due_ns:
                driver.on_due(time.monotonic_ns())
            driver.flush()

    def _take_in(self, arrival: Arrival, driver: Driver) -> None:
        try:
            received = self.exchange.on_arrival(arrival)
        except ProtocolError as error:
            driver.on_refused(error)
            return
        if received is not None:
            driver.on_message(received)
            if self._traces:
                self.records.done(received, received.received_ns, time.monotonic_ns(), 1)

    async def ship(self) -> None:
        """Write records to the trace until cancelled. Then write the remaining ones."""
        if not self._traces:
            return
        sampling, ring = self._sampling, self._ring
        with TraceFile(
            self._folder.path, f"{GATEWAY}.0", sample=sampling.sample, most_bytes=sampling.megabytes << 20
        ) as file:
            try:
                while True:
                    if not file.write(ring.take(SHIP_AT_ONCE), ring.dropped):
                        await trio.sleep(SHIP_INTERVAL_S)
                    await trio.lowlevel.checkpoint()
            finally:
                while file.write(ring.take(SHIP_AT_ONCE), ring.dropped):
                    pass
