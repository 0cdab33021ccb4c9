"""Provide wires in memory, with a hook to lose, delay, repeat, reorder and damage what they carry, in virtual time.

The tests of this project use them. Users can test with them how their actors behave on a bad link::

    network = MemoryNetwork()
    a, b = network.wire("a.0.0"), network.wire("b.0.0")
    network.fault = lambda crossing: [] if crossing.number == 3 else [crossing]   # lose the third
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..format.errors import LinkBroken, LinkClosed
from ..format.message import Buffer, stable
from ..links.wire import Arrival


@dataclass(frozen=True, slots=True)
class Carried:
    """Hold the `number`-th set of frames that the network carries. It arrives `delay_ns` of virtual time later."""

    number: int
    source: str
    target: str
    header: bytes
    buffers: tuple[Buffer, ...]
    delay_ns: int = 0

    def damaged(self, byte: int = 0) -> Carried:
        """Return a copy with one bit flipped: in its first tensor, or in its header if it has no tensor."""
        if not self.buffers:
            return replace(self, header=_flipped(self.header, byte))
        first = memoryview(bytearray(_flipped(bytes(self.buffers[0]), byte)))
        return replace(self, buffers=(first, *self.buffers[1:]))


Fault = Callable[[Carried], Sequence[Carried]]
"""Returns what replaces a `Carried`: nothing (it is lost), itself, itself twice, itself later, or a changed copy."""


def _flipped(data: bytes, byte: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :]


class MemoryNetwork:
    """Connect wires by name, with a virtual clock and one `fault` hook for everything that is carried."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.now_ns = 0
        self.wires: dict[str, MemoryWire] = {}
        self._late: list[tuple[int, int, Carried]] = []
        self._count = 0

    def clock(self) -> int:
        """Return the virtual time in nanoseconds."""
        return self.now_ns

    def wire(self, me: str) -> MemoryWire:
        """Create the wire of the peer `me`."""
        wire = self.wires[me] = MemoryWire(self, me)
        return wire

    def advance(self, seconds: float) -> None:
        """Let virtual time pass, and deliver what is due."""
        self.now_ns += int(seconds * 1e9)
        due = sorted(entry for entry in self._late if entry[0] <= self.now_ns)
        self._late = [entry for entry in self._late if entry[0] > self.now_ns]
        for _, _, crossing in due:
            self._deliver(crossing)

    def carry(self, source: str, target: str, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Deliver frames, now or later, as `fault` decides."""
        self._count += 1
        # the wire owns a copy: a sender that writes to its tensor later must not change what arrives
        crossing = Carried(
            self._count, source, target, header, tuple(memoryview(bytearray(buffer)) for buffer in buffers)
        )
        for outcome in [crossing] if self.fault is None else self.fault(crossing):
            if outcome.delay_ns:
                self._count += 1
                self._late.append((self.now_ns + outcome.delay_ns, self._count, outcome))
            else:
                self._deliver(outcome)

    def _deliver(self, crossing: Carried) -> None:
        wire = self.wires.get(crossing.target)
        if wire is not None and not wire.closed:
            wire.inbox.append(Arrival(crossing.source, crossing.header, crossing.buffers, waiting_since_ns=1))


class MemoryWire:
    """Implement `wire.Wire` in memory. `receive` never waits: virtual time passes only by `MemoryNetwork.advance`."""

    def __init__(self, network: MemoryNetwork, me: str) -> None:
        self.me = me
        self.inbox: deque[Arrival] = deque()
        self.closed = False
        self._network = network
        self._peers: set[str] = set()

    @property
    def address(self) -> str:
        return f"memory://{self.me}"

    def connect(self, peer: str, address: str) -> None:
        self._peers.add(peer)

    def disconnect(self, peer: str) -> None:
        self._peers.discard(peer)

    def send(self, peer: str, header: bytes, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        if self.closed:
            raise LinkClosed(f"{self.me}: this wire is closed")
        if peer not in self._network.wires:
            raise LinkBroken(f"{self.me}: cannot send to {peer}: no such wire")
        self._network.carry(self.me, peer, header, buffers)
        return tuple(map(stable, buffers))

    def receive(self, timeout_s: float | None) -> Arrival | None:
        if self.closed:
            raise LinkClosed(f"{self.me}: this wire is closed")
        return self.inbox.popleft() if self.inbox else None

    def close(self) -> None:
        self.closed = True
        self.inbox.clear()
