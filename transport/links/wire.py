"""Define what a wire is: the whole contract between the code that moves bytes and everything above it.

A **wire** carries frames between named peers. While nothing breaks it keeps their order and loses nothing. When something
breaks it may lose, repeat, delay or reorder them. `zeromq.ZeroWire`, `local.LocalWire` and `testing.MemoryWire` are wires.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import msgspec

from ..format.message import Buffer


class Arrival(msgspec.Struct, frozen=True, gc=False):  # creating it takes 0.1 µs, a named tuple 0.5 µs
    """Hold received frames: the peer's identity as the wire knows it, the header's bytes and the tensors' bytes.

    From `waiting_since_ns` on, the receiver did nothing but wait for these frames; 0 means that it did not wait.
    """

    peer: str
    header: Buffer
    buffers: tuple[Buffer, ...]
    waiting_since_ns: int = 0


class Wire(Protocol):
    """Carry frames between named peers. One thread owns a wire; only `Waker.wake` may be called from another."""

    @property
    def address(self) -> str:
        """Return the address at which peers reach this wire, with the port that was actually bound."""

    def connect(self, peer: str, address: str) -> None:
        """Register `peer` and its address. Frames that are sent before it listens are kept, and delivered later.

        Raises:
            AddressError: the address may not be used.
        """

    def disconnect(self, peer: str) -> None:
        """Forget `peer`. Frames that were not delivered to it are dropped. Unknown peers are ignored."""

    def send(self, peer: str, header: bytes, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """Send frames without blocking. Writable buffers are copied if they would otherwise be sent by reference.

        Returns the buffers to keep, in place of `buffers`, until the message is acknowledged.

        Raises:
            LinkClosed: this wire is closed.
            LinkBroken: `peer` is not connected.
        """

    def receive(self, timeout_s: float | None) -> Arrival | None:
        """Return the next frames, or None after `timeout_s` (0: do not wait; None: wait forever) or after a wake.

        Raises:
            LinkClosed: this wire is closed.
            ProtocolError: the frames that came do not form a message; they are dropped.
        """

    def close(self) -> None:
        """Release all resources. Idempotent."""


class Waker(Protocol):
    """Make a blocked `receive` of another thread return None, now or at its next call."""

    def wake(self) -> None:
        """Interrupt the other thread."""

    def close(self) -> None:
        """Release all resources."""


class ProcessWire(Wire, Protocol):
    """Extend `Wire` for wires between processes: event loops can wait for them, and other threads can wake them."""

    me: str

    @property
    def fd(self) -> int:
        """Return the descriptor to wait for. It may be edge-triggered: call `receive(0)` before and after every wait."""

    @property
    def counters(self) -> Counter[str]:
        """Return counters of what the wire did besides carrying frames."""

    def waker(self) -> Waker:
        """Return a handle with which one other thread can interrupt `receive`."""
