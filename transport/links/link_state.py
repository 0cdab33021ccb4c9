"""The two ends of a link as one process holds them, and a message that was taken from it. What moves them is `exchange.py`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from ..format.codec import Codec, Coding
from ..format.header import Header, Row, TensorMeta
from ..format.message import Buffer
from . import codec_choice
from .link import LinkSpec
from .window import ReceiveWindow, SendWindow

MOST_TIMED = 64
Shape = tuple[tuple[TensorMeta, ...], int, int]
"""Tensors, rows and tokens of a message."""


class Received(msgspec.Struct, frozen=True, eq=False):
    """A message that was taken, `buffers` in the order of the header's tensors and never to be written to. Its credit
    returns when the host calls `consumed`."""

    link: ReceivingLink
    header: Header
    buffers: tuple[Buffer, ...]
    nbytes: int
    received_ns: int


class Waiting(NamedTuple):
    """A message that has no credit yet."""

    rows: tuple[Row, ...]
    tensors: tuple[TensorMeta, ...]
    buffers: tuple[Buffer, ...]
    nbytes: int
    ready_ns: int
    coding: Coding | None


@dataclass(slots=True, eq=False)
class SendingLink:
    """The sender's end of one link. `waiting` holds what has no credit yet. `on_used`, on a prompt link, is called with the
    nanoseconds since it was sent for each message that was used up, `on_credit` when there may be more credit. `chooser`
    says which codec, where the edge leaves that open."""

    spec: LinkSpec
    window: SendWindow
    codec: Codec
    raw: bool
    open: bool = False
    refused: str | None = None
    passed: Shape | None = None
    nbytes: int = 0
    sent: int = 0
    waiting: deque[Waiting] = field(default_factory=deque)
    on_used: Callable[[int], None] | None = None
    on_credit: Callable[[], None] | None = None
    sent_at: deque[tuple[int, int]] = field(default_factory=deque)
    timed: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=MOST_TIMED))
    """Of an edge whose codec is chosen: sequence, time and bytes of large messages that nothing was heard of yet."""
    chooser: codec_choice.Chooser | None = None

    @property
    def used(self) -> int:
        """The highest sequence of which the receiver has said that it is used up."""
        return max(0, self.window.sequence_limit - self.spec.credits_messages)

    @property
    def queued(self) -> int:
        """Messages that were given to it and are not used up."""
        return self.window.sequence - self.used + len(self.waiting)

    def may_send(self, nbytes: int) -> bool:
        """Whether a message of `nbytes` would go at once."""
        return not self.waiting and self.window.may_send(nbytes)


@dataclass(slots=True, eq=False)
class ReceivingLink:
    """The receiver's end of one link."""

    spec: LinkSpec
    window: ReceiveWindow
    measured: bool
    open: bool = False
    passed: Shape | None = None
    nbytes: int = 0
