"""Hold the two ends of a link as one process sees them, and the messages on their way. `exchange.py` changes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from ..format.codec import Codec, Coding
from ..format.errors import ProtocolError
from ..format.header import Header, Row, TensorMeta
from ..format.message import Buffer, check_specs, stable
from . import codec_choice
from .link import LinkSpec
from .window import ReceiveWindow, SendWindow

MOST_TIMED = 64
Shape = tuple[tuple[TensorMeta, ...], int, int]
"""Tensors, rows and tokens of a message."""


class Received(msgspec.Struct, frozen=True, eq=False):
    """Hold a message that was received. `buffers` are in the order of the header's tensors and must not be written to.

    Its credit returns when the host calls `Exchange.consumed`.
    """

    link: ReceivingLink
    header: Header
    buffers: tuple[Buffer, ...]
    nbytes: int
    received_ns: int


class Outbound(msgspec.Struct, frozen=True, gc=False):
    """Hold an outgoing message until the exchange has made frames of it.

    `ready_ns` is when the actor had it. `coding` records what a codec did to it.
    """

    rows: tuple[Row, ...]
    tensors: tuple[TensorMeta, ...]
    buffers: tuple[Buffer, ...]
    ready_ns: int
    coding: Coding | None = None

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of its tensors."""
        return sum(meta.nbytes for meta in self.tensors)

    def stable(self) -> Outbound:
        """Return the message with buffers that nobody else can change. The sender may then reuse its own memory."""
        held = tuple(map(stable, self.buffers))
        return Outbound(self.rows, self.tensors, held, self.ready_ns, self.coding)


class Sent(msgspec.Struct, frozen=True, gc=False):
    """Describe a message that was handed to the wire, as its sender knows it."""

    link: SendingLink
    message: Outbound
    sequence: int
    nbytes: int
    credit_ns: int
    sent_ns: int
    checksum: int


class Unsent(msgspec.Struct, frozen=True, gc=False):
    """Describe a message that was dropped while it waited for credit."""

    link: SendingLink
    message: Outbound
    nbytes: int
    given_up_ns: int


@dataclass(slots=True, eq=False)
class SendingLink:
    """Hold the sender's end of one link.

    `waiting` holds the messages without credit, and the bytes of each. `on_used`, on a prompt link, is called for each message
    that was used up, with the nanoseconds since it was sent. `on_credit` is called when there may be more credit. `chooser`
    chooses the codec of each message if the edge has `codec: auto`.
    """

    spec: LinkSpec
    peer: str
    """The receiver, as the wire names it."""
    window: SendWindow
    codec: Codec
    raw: bool
    checksums: bool
    """True if messages carry checksums, as over tcp."""
    open: bool = False
    refused: str | None = None
    passed: Shape | None = None
    nbytes: int = 0
    sent: int = 0
    waiting: deque[tuple[Outbound, int]] = field(default_factory=deque)
    on_used: Callable[[int], None] | None = None
    on_credit: Callable[[], None] | None = None
    sent_at: deque[tuple[int, int]] = field(default_factory=deque)
    timed: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=MOST_TIMED))
    """With a `chooser`: sequence, time and bytes of the large messages that the receiver has not answered yet."""
    chooser: codec_choice.Chooser | None = None

    @property
    def used(self) -> int:
        """Return the highest sequence number that the receiver has used up."""
        return max(0, self.window.sequence_limit - self.spec.credits_messages)

    @property
    def queued(self) -> int:
        """Count the messages that were given to the link and are not used up."""
        return self.window.sequence - self.used + len(self.waiting)

    def may_send(self, nbytes: int) -> bool:
        """Return whether a message of `nbytes` would be sent at once."""
        return not self.waiting and self.window.may_send(nbytes)

    def learn_speed(self, sequence: int, waited_ns: int, now_ns: int, was_waiting: bool) -> None:
        """Measure the link by a round trip during which nobody was busy.

        The receiver had waited for longer than the round trip took, and this process waited for the answer (`was_waiting`).
        """
        while self.timed and self.timed[0][0] < sequence:
            self.timed.popleft()
        if self.chooser is None or not self.timed or self.timed[0][0] != sequence:
            return
        _, sent_ns, nbytes = self.timed.popleft()
        took_ns = max(1, now_ns - sent_ns)
        if was_waiting and waited_ns >= took_ns:
            self.chooser.measured(nbytes, took_ns)


@dataclass(slots=True, eq=False)
class ReceivingLink:
    """Hold the receiver's end of one link."""

    spec: LinkSpec
    peer: str
    """The sender, as the wire names it."""
    window: ReceiveWindow
    measured: bool
    open: bool = False
    passed: Shape | None = None
    nbytes: int = 0


def checked(link: SendingLink | ReceivingLink, rows: tuple[Row, ...], tensors: tuple[TensorMeta, ...]) -> int:
    """Check a message, and return its size in bytes. A message of the shape that `passed` last needs no new check.

    Raises:
        ProtocolError: the edge does not carry such a message.
    """
    shape = (tensors, len(rows), rows[0].tokens if len(rows) == 1 else sum([row.tokens for row in rows]))
    if shape != link.passed:
        if not rows:
            raise ProtocolError(f"edge {link.spec.name}: expected at least one row, got none")
        check_specs(link.spec.name, link.spec.tensors, rows, tensors)
        link.passed = shape
        link.nbytes = sum([meta.nbytes for meta in tensors])
    return link.nbytes
