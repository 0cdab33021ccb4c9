"""Lend memory to peers, so that large tensors go through shared memory (shared_memory.py).

This module tracks which peers can read this process's memory, what is lent, and what is given back. Frames go in and frames
come out; it does not use ZeroMQ.

Messages between the wires themselves begin with an empty frame, because a header is never empty. The next frame is one of:

- an offer, or its answer: these test whether the peer can read this process's memory at all;
- a return: the borrower gives segments back;
- a drop: the lender no longer uses segments, so the borrower unmaps them;
- loans: the header and the tensors of a message follow, with empty frames in place of the lent tensors.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ..format.errors import ProtocolError
from ..format.message import Buffer
from ..links.wire import Arrival
from .shared_memory import Borrower, Lender, Loan

MAX_OWN_BYTES = 1 << 16


class _Offer(msgspec.Struct, tag=1, array_like=True):
    loan: Loan


class _Answer(msgspec.Struct, tag=2, array_like=True):
    read: bytes


class _Returned(msgspec.Struct, tag=3, array_like=True):
    segments: list[int]


class _Lent(msgspec.Struct, tag=4, array_like=True):
    """List the tensor frames that are loans, by index."""

    loans: list[tuple[int, Loan]]


class _Dropped(msgspec.Struct, tag=5, array_like=True):
    """List segments that are no longer lent: nobody needs to map them."""

    segments: list[int]


_own = msgspec.msgpack.Decoder(_Offer | _Answer | _Returned | _Lent | _Dropped)
_encode = msgspec.msgpack.Encoder().encode


class Lending(NamedTuple):
    """Describe how a message is sent.

    `loans` is the frame before its header, or None if it has no loans. `sent` are the frames of its tensors. `kept` are the
    buffers to keep until the message is acknowledged.
    """

    loans: bytes | None
    sent: Sequence[Buffer]
    kept: Sequence[Buffer]


class Sharing:
    """Manage the shared memory of one wire.

    The wire must send each entry (peer, frame) of `outbox`, behind an empty frame.

    Args:
        me: the wire's identity, for error messages.
        from_bytes: tensors of at least this many bytes are lent; 0: none are.
    """

    def __init__(self, me: str, from_bytes: int) -> None:
        self.from_bytes = from_bytes
        self.counters: Counter[str] = Counter()
        self.lender, self.borrower = Lender(), Borrower()
        self.outbox: deque[tuple[str, bytes]] = deque()
        self._me = me
        self._nonces: dict[str, bytes] = {}
        self._reads: dict[str, bool] = {}

    def join(self, peer: str) -> None:
        """Add a peer, which is a process of this machine."""
        if self.from_bytes:
            self._reads[peer] = False

    def leave(self, peer: str) -> None:
        self._reads.pop(peer, None)
        self._nonces.pop(peer, None)
        self.lender.forget(peer)
        self.borrower.forget(peer)

    def close(self) -> None:
        self.lender.close()

    def concerns(self, peer: str, buffers: Sequence[Buffer]) -> bool:
        """Return whether one of these buffers may be lent to `peer`."""
        return peer in self._reads and self.from_bytes <= max(map(len, buffers))

    def lend(self, peer: str, buffers: Sequence[Buffer]) -> Lending:
        """Lend the large buffers of a message.

        Until `peer` has shown that it can read this process's memory, all buffers go over the wire. The offer that tests
        this is put into the outbox once.
        """
        if not self._reads[peer]:
            if peer not in self._nonces and (made := self.lender.offer(peer)) is not None:
                self._nonces[peer] = made[1]
                self.outbox.append((peer, _encode(_Offer(made[0]))))
            return Lending(None, buffers, buffers)
        loans, sent, kept = [], list(buffers), list(buffers)
        for index, buffer in enumerate(buffers):
            if len(buffer) >= self.from_bytes and (lent := self.lender.lend(peer, buffer)) is not None:
                loans.append((index, lent[0]))
                sent[index], kept[index] = b"", lent[1]
        self._announce_dropped()
        if not loans:
            self.counters["shared_full"] += 1
            return Lending(None, buffers, buffers)
        self.counters["shared_sent"] += len(loans)
        return Lending(_encode(_Lent(loans)), sent, kept)

    def give_back(self) -> None:
        """Put returns into the outbox, of segments that nobody here views any more, and drops, of those no longer lent."""
        let_go: dict[str, list[int]] = {}
        while self.borrower.let_go:
            peer, segment = self.borrower.let_go.popleft()
            let_go.setdefault(peer, []).append(segment)
        self.outbox.extend((peer, _encode(_Returned(segments))) for peer, segments in let_go.items())
        self._announce_dropped()

    def _announce_dropped(self) -> None:
        self.outbox.extend((peer, _encode(_Dropped(segments))) for peer, segments in self.lender.dropped().items())

    def take(self, arrival: Arrival) -> Arrival | None:
        """Process a message of the peer's wire itself. Return the message with tensors that follows loans, otherwise None.

        Raises:
            ProtocolError: it is not such a message, or a loan cannot be read.
        """
        peer, frames = arrival.peer, arrival.buffers
        if peer not in self._reads or not frames or len(frames[0]) > MAX_OWN_BYTES:
            raise ProtocolError(f"{self._me}: expected a header from {peer}, got an empty frame")
        try:
            own = _own.decode(frames[0])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"{self._me}: expected a header, or a wire's own frame, from {peer}: {error}") from None
        if isinstance(own, _Lent):
            return self._with_loans(arrival, own)
        if isinstance(own, _Returned):
            self.lender.returned(peer, own.segments)
        elif isinstance(own, _Dropped):
            self.borrower.drop(peer, own.segments)
        elif isinstance(own, _Answer):
            self._reads[peer] = own.read == self._nonces.get(peer)
        else:
            try:
                read = bytes(self.borrower.view(peer, own.loan))
            except ProtocolError:
                read = b""  # memory of another user or machine: tensors go over the wire
            self.outbox.append((peer, _encode(_Answer(read))))
        return None

    def _with_loans(self, arrival: Arrival, lent: _Lent) -> Arrival:
        peer = arrival.peer
        if len(arrival.buffers) < 2:
            raise ProtocolError(f"{self._me}: expected a header after the loans of {peer}, got none")
        header, buffers = arrival.buffers[1], list(arrival.buffers[2:])
        for index, loan in lent.loans:
            if not 0 <= index < len(buffers) or len(buffers[index]):
                raise ProtocolError(f"{self._me}: expected a loan of {peer} at an empty frame, got index {index}")
            try:
                buffers[index] = self.borrower.view(peer, loan)
            except ProtocolError:  # no descriptors or no memory: it is requested again, and comes over the wire
                self.outbox.append((peer, _encode(_Answer(b""))))
                raise
        return Arrival(peer, header, tuple(buffers), arrival.waiting_since_ns)
