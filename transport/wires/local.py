"""Carry messages within one machine without ZeroMQ: packets over Unix sockets, large tensors in memory that both ends map.

Everything that a peer sends comes over one socket, which keeps the order. A tensor that cannot be shared goes over the socket
in several packets. Reasons are that the peer may not read this process's memory, or that no shared memory is left.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Sequence

from ..format.errors import AddressError, LinkClosed
from ..format.message import COPY_BELOW_BYTES, Buffer, stable
from ..links.wire import Arrival
from . import endpoint
from .descriptors import OF_A_PEER, OF_A_WIRE, claim, make_sure_of_descriptors
from .lending import Sharing
from .unix_sockets import UnixSockets, UnixWaker

AWAKE_NS = 500_000
"""If the last wait was shorter than this, the next one stays awake for this long: a sleeping core wakes up late and cold."""


class LocalWire:
    """Carry messages within one machine (see `wire.ProcessWire`). The thread that uses a wire owns it.

    Args:
        me: the identity others see, `actor.replica.epoch`.
        address: where to listen, `local:///absolute/path`.
        max_frame_bytes: a peer that announces a larger frame is disconnected.
        shared_from_bytes: tensors of at least this size go through shared memory to peers that can read it; 0: none do.

    Raises:
        AddressError: the address may not be used or is in use.
        ResourceError: there are not enough descriptors.
    """

    def __init__(self, me: str, address: str, *, max_frame_bytes: int, shared_from_bytes: int = 0) -> None:
        self.me = me
        self._path = _path(me, address)
        self.address = address
        make_sure_of_descriptors(me, OF_A_WIRE)
        self._lock: int | None = claim(self._path)
        try:
            self._sockets = UnixSockets(me, self._path, max_frame_bytes)
        except OSError as error:
            os.close(self._lock)
            raise AddressError(f"{me}: cannot listen at {address}: {error.strerror or error}") from error
        self._sharing = Sharing(me, shared_from_bytes)
        self._pair_bytes = min(COPY_BELOW_BYTES, shared_from_bytes or COPY_BELOW_BYTES)
        self._quick = False
        self._peers = 0

    @property
    def counters(self) -> Counter[str]:
        """Return the counters of this wire.

        `shared_sent` counts lent tensors, `shared_full` messages for which no shared memory was left, and `in_pieces`
        messages that took several packets.
        """
        return self._sharing.counters + Counter(in_pieces=self._sockets.pieces)

    @property
    def fd(self) -> int:
        """Return the descriptor that is readable while there is anything to receive."""
        return self._sockets.fd

    def connect(self, peer: str, address: str) -> None:
        path = _path(f"{self.me}: {peer}", address)
        if not self._sockets.knows(peer):
            self._peers += 1
            make_sure_of_descriptors(self.me, OF_A_PEER * self._peers)
            self._sockets.connect(peer, path)
            self._sharing.join(peer)

    def disconnect(self, peer: str) -> None:
        if self._sockets.knows(peer):
            self._peers -= 1
        self._sharing.leave(peer)
        self._sockets.disconnect(peer)

    def send(self, peer: str, header: bytes, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        sockets, sharing = self._sockets, self._sharing
        if len(buffers) == 1 and len(buffers[0]) < self._pair_bytes and sockets.send_pair(peer, header, buffers[0]):
            return buffers
        if not sockets.knows(peer):
            if sockets.closed:
                raise LinkClosed(f"{self.me}: this wire is closed")
            return buffers  # an answer to a peer that does not belong to this graph, or has left it
        if buffers and sharing.from_bytes and sharing.concerns(peer, buffers):
            loans, sent, kept = sharing.lend(peer, buffers)
            if loans is not None:
                sockets.send(peer, (b"", loans, header, *sent))
                return kept
        buffers = tuple(map(stable, buffers))
        sockets.send(peer, (header, *buffers))
        return buffers

    def receive(self, timeout_s: float | None) -> Arrival | None:
        sharing, ready = self._sharing, self._sockets.ready
        began_ns = time.monotonic_ns() if timeout_s != 0 else 0
        left_s, looked = timeout_s, False
        if sharing.borrower.let_go or sharing.outbox:
            self._notify()
        while True:
            if ready:
                arrival = ready.popleft()
                if len(arrival.header):
                    return arrival
                whole = sharing.take(arrival)
                if whole is not None:
                    return whole
                self._notify()
                continue
            if looked and (not began_ns or (left_s is not None and left_s <= 0)):
                return None
            awake_until_ns = began_ns + AWAKE_NS if began_ns and self._quick and not looked else 0
            woken = self._sockets.wait(left_s, began_ns, awake_until_ns)
            looked = True
            if began_ns:
                took_ns = time.monotonic_ns() - began_ns
                self._quick = took_ns < AWAKE_NS
                left_s = timeout_s - took_ns / 1e9 if timeout_s is not None else None
            if woken and not ready:
                return None

    def _notify(self) -> None:
        """Send the messages of this wire itself: those about shared memory (lending.py)."""
        sharing = self._sharing
        sharing.give_back()
        while sharing.outbox:
            peer, frame = sharing.outbox.popleft()
            if self._sockets.knows(peer):
                self._sockets.send(peer, (b"", frame))

    def waker(self) -> UnixWaker:
        """Return a handle with which one other thread can interrupt `receive`."""
        return UnixWaker(self._sockets.wakes)

    def close(self) -> None:
        self._sockets.close()
        self._sharing.close()
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.close(self._lock)
            self._lock = None


def _path(who: str, address: str) -> str:
    """Return the path of an address of this wire.

    Raises:
        AddressError: the address is not one of this wire.
    """
    parsed = endpoint.parse(address)
    if parsed.scheme != "local":
        raise AddressError(
            f"{who}: expected an address local:///path, got {address}; a process has one wire, "
            "so give all its edges the same transport"
        )
    return parsed.location
