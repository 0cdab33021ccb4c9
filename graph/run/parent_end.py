"""Connect a run's own process to its hosts: the wire, the records of its messages, and their trace file."""

from __future__ import annotations

import time
from collections.abc import Iterable

import trio

from ranvier.actors.host.control import SHIP_AT_ONCE, SHIP_INTERVAL_S
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.trace.ring import Ring
from ranvier.actors.trace.trace_file import TraceFile
from ranvier.actors.trace.trace_records import Records
from ranvier.transport.format.host_id import HostId
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.links.link_state import Received
from ranvier.transport.wires.opening import open_wire
from ranvier.transport.wires.trio_wire import TrioWire

from ..plan.plan import EPOCH, Plan
from .run_folder import RunFolder

ME = str(HostId(GATEWAY, 0, EPOCH))


class OwnEnd:
    """Represent the run's own process as one end of its links.

    A training sets `by_position`: its records are sampled by position instead of by session.
    """

    def __init__(self, plan: Plan, folder: RunFolder, *, by_position: bool = False) -> None:
        graph = plan.graph
        self._plan, self._folder = plan, folder
        self._traces, self._sampling = bool(graph.file.trace), graph.file.sampling
        self.wire = TrioWire(
            open_wire(
                ME, plan.gateway_endpoint(folder.sockets), max_frame_bytes=graph.file.max_frame_bytes,
                shared_from_bytes=graph.file.shared_from_bytes, keys=plan.keys(folder.path),
            )
        )  # fmt: skip
        self._ring = Ring()
        self.records = Records(self._ring, self._sampling.sample, by_position=by_position)

    def exchange(self, links: Iterable[LinkSpec]) -> Exchange:
        """Return the exchange of these links. It records its messages if the run has a trace."""
        records = self.records
        callbacks = (records.sent, records.unsent, records.control) if self._traces else ()
        return Exchange(ME, self._plan.hash, links, time.monotonic_ns, *callbacks)

    def done(self, received: Received) -> None:
        """Record that a received message is fully processed."""
        if self._traces:
            self.records.done(received, received.received_ns, time.monotonic_ns(), 1)

    async def ship(self) -> None:
        """Write the records to the trace until cancelled, then those that are left."""
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
