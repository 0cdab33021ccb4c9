"""Define what a wire is: the whole contract between bytes on their way and everything above.

A **wire** carries frames between named peers. While nothing breaks it keeps their order and loses nothing. When something
breaks it may lose, repeat, delay or reorder them. `zeromq.ZeroWire`, `local.LocalWire` and `testing.MemoryWire` are wires.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import msgspec

from ..format.message import Buffer


class Arrival(msgspec.Struct, frozen=True, gc=False):  # made in 0.1 µs, a named tuple in 0.5
    """Hold frames as they came: the peer's identity as the wire knows it, the header's bytes, the tensors' bytes. Since
    `waiting_since_ns` (0: not at all) the receiver had done nothing but wait for them."""

    peer: str
    header: Buffer
    buffers: tuple[Buffer, ...]
    waiting_since_ns: int = 0


class Wire(Protocol):
    """Carry frames between named peers. One thread owns a wire; only `Waker.wake` may be called from another."""

    @property
    def address(self) -> str:
        """Return where others reach this wire, with the port that was really bound."""

    def connect(self, peer: str, address: str) -> None:
        """Make `peer` known. What is sent to it before it listens is kept and delivered.

        Raises:
            AddressError: the address may not be used.
        """

    def disconnect(self, peer: str) -> None:
        """Forget `peer`. What was not delivered to it is dropped. Unknown peers are ignored."""

    def send(self, peer: str, header: bytes, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """Hand frames over without blocking. Buffers that can be written to are copied where they would go by reference.
        Return what to keep, in place of `buffers`, until it is acknowledged.

        Raises:
            LinkClosed: this wire is closed.
            LinkBroken: `peer` is not connected.
        """

    def receive(self, timeout_s: float | None) -> Arrival | None:
        """Return the next frames, or None when `timeout_s` (0: look only; None: forever) has passed or after a wake.

        Raises:
            LinkClosed: this wire is closed.
            ProtocolError: frames came that no message has; they are dropped.
        """

    def close(self) -> None:
        """Let go of everything. Idempotent."""


class Waker(Protocol):
    """Make a blocked `receive` of another thread return None, now or at its next call."""

    def wake(self) -> None:
        """Interrupt the other thread."""

    def close(self) -> None:
        """Let go of everything."""


class ProcessWire(Wire, Protocol):
    """A wire between processes, which event loops and other threads can work with."""

    me: str

    @property
    def fd(self) -> int:
        """Return the descriptor to wait for. It may be edge-triggered: look (`receive(0)`) before and after every wait."""

    @property
    def counters(self) -> Counter[str]:
        """Count what the wire did beside carrying frames."""

    def waker(self) -> Waker:
        """Return a handle with which one other thread can interrupt `receive`."""
