"""Carry messages between the actors of one process in memory, and their other messages over the wire of each.

A message is handed over, not sent: its header and the memory of its tensors go into the inbox of the other actor. They have one
device, so a tensor on a GPU stays there. The actors of a process take turns (together.py), so a wire that has nothing to give
lets the others work.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.message import Buffer, DeviceBuffer, stable
from ranvier.transport.format.tensors import to_buffer, to_device_buffer
from ranvier.transport.links.wire import Arrival, ProcessWire

from ..component.devices import here


class Turns(Protocol):
    """Say whose turn it is in a shared process (together.py)."""

    wires: dict[str, SharedWire]
    """The wires of the actors of this process, by identity."""

    def wait(self, wire: SharedWire, timeout_s: float | None) -> None:
        """Let the others work until something has arrived at `wire`, it was woken, or the time is over."""

    def wake(self, wire: SharedWire) -> None:
        """Let `wait` of a wire return. Any thread may call this."""


class SharedWire:
    """Be the wire of one actor that shares its process (see `wire.ProcessWire`).

    Args:
        turns: the process that the actor shares.
        outer: the wire to all actors that are elsewhere.
        copies: whether this actor gets copies of tensors, because it may write into them.
    """

    def __init__(self, turns: Turns, outer: ProcessWire, copies: Callable[[], bool]) -> None:
        self.me = outer.me
        self.outer = outer
        self.inbox: deque[Arrival] = deque()
        self.outside: set[str] = set()
        """The peers in other processes."""
        self.handed_over = 0
        self._refused: deque[ProtocolError] = deque()
        self._turns = turns
        self._copies = copies
        self._inside: set[str] = set()
        turns.wires[self.me] = self

    @property
    def address(self) -> str:
        return self.outer.address

    @property
    def fd(self) -> int:
        return self.outer.fd

    @property
    def counters(self) -> Counter[str]:
        """Return the counters of the outer wire. `handed_over` counts messages that stayed in this process."""
        return self.outer.counters + Counter(handed_over=self.handed_over)

    def connect(self, peer: str, address: str) -> None:
        if peer in self._turns.wires:
            self._inside.add(peer)
        else:
            self.outer.connect(peer, address)
            self.outside.add(peer)

    def disconnect(self, peer: str) -> None:
        if peer in self._inside:
            self._inside.discard(peer)
        else:
            self.outer.disconnect(peer)
            self.outside.discard(peer)

    def send(self, peer: str, header: bytes, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        if peer not in self._inside:
            return self.outer.send(peer, header, tuple(map(_on_host, buffers)))
        buffers = tuple(map(stable, buffers))
        other = self._turns.wires[peer]
        given = tuple(map(_copied, buffers)) if other._copies() else buffers
        self.handed_over += 1
        other.inbox.append(Arrival(self.me, header, given))
        self._turns.wake(other)
        return buffers

    def receive(self, timeout_s: float | None) -> Arrival | None:
        arrival = self._next()
        if arrival is None and timeout_s != 0:
            self._turns.wait(self, timeout_s)
            arrival = self._next()
        return arrival

    def _next(self) -> Arrival | None:
        if self._refused:
            raise self._refused.popleft()
        if self.inbox:
            return self.inbox.popleft()
        return self.outer.receive(0) if self.outside else None

    def look(self) -> bool:
        """Look for frames from another process. Return whether `receive` has something to give now."""
        if not self.outside:
            return False
        try:
            arrival = self.outer.receive(0)
        except ProtocolError as error:
            self._refused.append(error)
            return True
        if arrival is not None:
            self.inbox.append(arrival)
        return arrival is not None

    def waker(self) -> SharedWaker:
        """Return a handle with which one other thread can interrupt `receive`."""
        return SharedWaker(self._turns, self)

    def close(self) -> None:
        self._turns.wires.pop(self.me, None)
        self.inbox.clear()
        self.outer.close()


def _copied(buffer: Buffer) -> Buffer:
    if isinstance(buffer, DeviceBuffer):
        return to_device_buffer("", buffer.tensor.clone())[1]
    return memoryview(bytearray(buffer))


def _on_host(buffer: Buffer) -> Buffer:
    """Return the bytes of a buffer in this machine's memory."""
    return to_buffer("", here(buffer.tensor), sole=True)[1] if isinstance(buffer, DeviceBuffer) else buffer


class SharedWaker:
    """Wake the actor of one `SharedWire` from another thread."""

    def __init__(self, turns: Turns, wire: SharedWire) -> None:
        self._turns = turns
        self._wire = wire

    def wake(self) -> None:
        self._turns.wake(self._wire)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
