"""Receive from a wire in trio: one reader per wire, which loses nothing when a wait is cancelled.

ZeroMQ's descriptor is edge-triggered: it becomes readable once, and only for messages that came after the last call of
the wire's `receive(0)`. So this module calls `receive(0)` before every wait. The wait itself takes no message from the
wire, and so a cancelled `receive` loses none.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ..format.message import Buffer
from ..links.wire import Arrival, ProcessWire


class TrioWire:
    """Await `receive` of a wire. One task at a time may receive; sending never blocks."""

    def __init__(self, wire: ProcessWire) -> None:
        self.wire = wire
        self._fd = wire.fd
        self._reading = False

    async def receive(self) -> Arrival:
        """Return the next frames.

        Raises:
            LinkClosed: the wire is closed.
            ProtocolError: the frames that came do not form a message; call again.
            trio.BusyResourceError: another task is receiving.
        """
        if self._reading:
            raise trio.BusyResourceError("another task is receiving from this wire")
        self._reading = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                arrival = self.wire.receive(0)
                if arrival is not None:
                    return arrival
                await trio.lowlevel.wait_readable(self._fd)
        finally:
            self._reading = False

    def connect(self, peer: str, address: str) -> None:
        self.wire.connect(peer, address)

    def disconnect(self, peer: str) -> None:
        self.wire.disconnect(peer)

    def send(self, peer: str, header: bytes, buffers: Sequence[Buffer] = ()) -> Sequence[Buffer]:
        return self.wire.send(peer, header, buffers)

    def close(self) -> None:
        """Close the wire; a waiting `receive` raises `trio.ClosedResourceError`."""
        trio.lowlevel.notify_closing(self._fd)
        self.wire.close()
