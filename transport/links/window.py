"""Sequence numbers, acknowledgements and credit of one link, as two state machines without I/O.

The receiver grants in cumulative numbers ("you may have sent up to message 12 and 4 MiB in all"), so a grant that is
lost, repeated or late does no harm: the larger one counts. What was sent stays with the sender until acknowledged.
Sliding-window flow control with go-back-N repair, as in Tanenbaum, Computer Networks, §3.4.2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ..format.message import Buffer


class Outgoing(msgspec.Struct, gc=False):
    """Frames for the wire. With a sequence number they are kept until acknowledged: holding `buffers` is what keeps the
    tensors' memory untouched. The driver puts there what its wire says is to be kept instead."""

    peer: str
    header: bytes
    buffers: Sequence[Buffer] = ()
    sequence: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class SendWindow:
    """The sender's side. Closed (no credit) until the receiver's welcome."""

    credits_bytes: int
    sequence: int = 0
    sent_bytes: int = 0
    sequence_limit: int = 0
    byte_limit: int = 0
    kept: deque[Outgoing] = field(default_factory=deque)

    def may_send(self, nbytes: int) -> bool:
        """Whether a message of `nbytes` has credit. One larger than the whole window goes when all else is used up."""
        if self.sequence >= self.sequence_limit:
            return False
        return self.sent_bytes + nbytes <= self.byte_limit or self.byte_limit - self.credits_bytes >= self.sent_bytes

    def keep(self, sent: Outgoing) -> None:
        """Note a message as sent. The caller has asked `may_send`."""
        self.sequence = sent.sequence
        self.sent_bytes += sent.nbytes
        self.kept.append(sent)

    def grant(self, sequence_limit: int, byte_limit: int) -> None:
        if sequence_limit > self.sequence_limit:
            self.sequence_limit = sequence_limit
        if byte_limit > self.byte_limit:
            self.byte_limit = byte_limit

    def acknowledge(self, sequence: int, sequence_limit: int, byte_limit: int) -> None:
        """Let go of everything up to `sequence` (a number never sent is ignored by the deque's end); take the grant."""
        kept = self.kept
        while kept and kept[0].sequence <= sequence:
            kept.popleft()
        if sequence_limit > self.sequence_limit:
            self.sequence_limit = sequence_limit
        if byte_limit > self.byte_limit:
            self.byte_limit = byte_limit

    def since(self, sequence: int) -> list[Outgoing]:
        """What must be sent again when the receiver misses `sequence` and all after it."""
        return [sent for sent in self.kept if sent.sequence >= sequence]


@dataclass(slots=True)
class ReceiveWindow:
    """The receiver's side: `credits_messages` and `credits_bytes` may be on their way or unread at any time."""

    credits_messages: int
    credits_bytes: int
    received: int = 0
    consumed: int = 0
    consumed_bytes: int = 0
    told_received: int = 0
    told_consumed: int = 0
    told_bytes: int = 0
    asked: int = 0

    def ask(self) -> int | None:
        """The first missing sequence, once for each gap; None if it was asked for already."""
        missing = self.received + 1
        if self.asked == missing:
            return None
        self.asked = missing
        return missing

    def consume(self, nbytes: int) -> bool:
        """One message was used up: its credit may be granted anew. True if half the window is used up and untold: the
        sender may soon stand still."""
        self.consumed += 1
        self.consumed_bytes += nbytes
        return (
            2 * (self.consumed - self.told_consumed) >= self.credits_messages
            or 2 * (self.consumed_bytes - self.told_bytes) >= self.credits_bytes
        )

    def limits(self) -> tuple[int, int]:
        """The grant: highest sequence and bytes in all that the sender may send."""
        return self.consumed + self.credits_messages, self.consumed_bytes + self.credits_bytes

    def tell(self) -> tuple[int, int, int]:
        """The arguments of an acknowledgement, and the note that it was sent."""
        self.told_received, self.told_consumed, self.told_bytes = self.received, self.consumed, self.consumed_bytes
        return self.received, self.consumed + self.credits_messages, self.consumed_bytes + self.credits_bytes
