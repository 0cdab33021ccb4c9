"""Track sequence numbers, acknowledgements and credit of one link, in two state machines without I/O.

The receiver grants credit in cumulative numbers ("you may send up to message 12, and 4 MiB in total"). So a lost, repeated or
late grant does no harm: the larger number counts. The sender keeps each message until it is acknowledged. The method is
sliding-window flow control with go-back-N repair, as in Tanenbaum, Computer Networks, §3.4.2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ..format.message import Buffer


class Outgoing(msgspec.Struct, gc=False):
    """Hold frames for the wire.

    Frames with a sequence number are kept until they are acknowledged. Holding `buffers` keeps the tensors' memory untouched.
    After sending, the driver replaces `buffers` with what `Wire.send` returned.
    """

    peer: str
    header: bytes
    buffers: Sequence[Buffer] = ()
    sequence: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class SendWindow:
    """Track the sender's side. It has no credit until the receiver's WELCOME."""

    credits_bytes: int
    sequence: int = 0
    sent_bytes: int = 0
    sequence_limit: int = 0
    byte_limit: int = 0
    kept: deque[Outgoing] = field(default_factory=deque)

    def may_send(self, nbytes: int) -> bool:
        """Return whether a message of `nbytes` has credit.

        A message larger than the whole window may be sent once everything before it is used up.
        """
        if self.sequence >= self.sequence_limit:
            return False
        return self.sent_bytes + nbytes <= self.byte_limit or self.byte_limit - self.credits_bytes >= self.sent_bytes

    def keep(self, sent: Outgoing) -> None:
        """Record a message as sent. The caller must have checked `may_send`."""
        self.sequence = sent.sequence
        self.sent_bytes += sent.nbytes
        self.kept.append(sent)

    def grant(self, sequence_limit: int, byte_limit: int) -> None:
        """Raise the limits to those of a grant. Lower limits are ignored."""
        if sequence_limit > self.sequence_limit:
            self.sequence_limit = sequence_limit
        if byte_limit > self.byte_limit:
            self.byte_limit = byte_limit

    def acknowledge(self, sequence: int, sequence_limit: int, byte_limit: int) -> None:
        """Release everything up to `sequence`, and take the grant.

        A `sequence` that was never sent does no harm: at most all kept messages are released.
        """
        kept = self.kept
        while kept and kept[0].sequence <= sequence:
            kept.popleft()
        if sequence_limit > self.sequence_limit:
            self.sequence_limit = sequence_limit
        if byte_limit > self.byte_limit:
            self.byte_limit = byte_limit

    def since(self, sequence: int) -> list[Outgoing]:
        """Return the messages to send again when the receiver misses `sequence` and everything after it."""
        return [sent for sent in self.kept if sent.sequence >= sequence]


@dataclass(slots=True)
class ReceiveWindow:
    """Track the receiver's side.

    At any time, at most `credits_messages` messages and `credits_bytes` bytes are on their way or not used up yet.
    """

    credits_messages: int
    credits_bytes: int
    received: int = 0
    consumed: int = 0
    consumed_bytes: int = 0
    acknowledged: int = 0
    granted: int = 0
    granted_bytes: int = 0
    asked: int = 0

    def ask(self) -> int | None:
        """Return the first missing sequence, once per gap; None if it was requested already."""
        missing = self.received + 1
        if self.asked == missing:
            return None
        self.asked = missing
        return missing

    def consume(self, nbytes: int) -> bool:
        """Record that one message was used up, so that its credit can be granted again.

        Returns True if half the window is used up and not acknowledged yet: the sender may soon run out of credit.
        """
        self.consumed += 1
        self.consumed_bytes += nbytes
        return (
            2 * (self.consumed - self.granted) >= self.credits_messages
            or 2 * (self.consumed_bytes - self.granted_bytes) >= self.credits_bytes
        )

    def limits(self) -> tuple[int, int]:
        """Return the grant: the highest sequence and the total bytes that the sender may send."""
        return self.consumed + self.credits_messages, self.consumed_bytes + self.credits_bytes

    def report(self) -> tuple[int, int, int]:
        """Return the arguments of an acknowledgement, and record that it was sent."""
        self.acknowledged, self.granted, self.granted_bytes = self.received, self.consumed, self.consumed_bytes
        return self.received, self.consumed + self.credits_messages, self.consumed_bytes + self.credits_bytes
