"""Put the trace records of a process into its ring: messages, control messages, commands, spans and taps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ranvier.transport.format.header import Row, Verb
from ranvier.transport.links.link_state import Received, Sent, Unsent

from .crossing import ReceivedCommand
from .ring import Ring
from .trace_file import COMMAND, CONTROL, DONE, PART, SENT, SPAN, TAP, UNSENT

SPREAD = 2654435761
"""Multiplier of the hash in `_chosen`: odd, and near 2^32 divided by the golden ratio."""


_VERBS = {verb: verb.name.lower() for verb in Verb}
_MANY = (Verb.ACK, Verb.PROBE, Verb.SPEED)


class Records:
    """Make trace records with the columns of trace_file.py. An `Exchange` calls `sent`, `unsent` and `control`.

    Args:
        ring: takes the records.
        sample: the share of sessions (whole requests) that leave records. The choice depends only on the session's
            number, so both ends of a link choose the same.
        by_position: sample positions (whole micro-batches) instead of sessions.
    """

    def __init__(self, ring: Ring, sample: float = 1.0, *, by_position: bool = False) -> None:
        self._put = ring.put
        self._below = int(sample * (1 << 32)) if sample < 1.0 else None
        self._field = 2 if by_position else 0

    def sent(self, sent: Sent) -> None:
        message, link = sent.message, sent.link
        if self._below is None or self._chosen(message.rows):
            self._put((
                SENT, link.spec.edge, sent.sequence, sent.nbytes, message.ready_ns, sent.credit_ns, sent.sent_ns, message.rows,
                message.coding, link.peer, message.tensors, sent.checksum,
            ))  # fmt: skip

    def control(self, edge: int, verb: Verb, peer: str, sent: bool, arguments: tuple[Any, ...]) -> None:
        """Record a control message of a link.

        With sampling, acknowledgements, probes and speeds leave no records: they belong to no session, and
        acknowledgements are nearly as many as messages.
        """
        if self._below is None or verb not in _MANY:
            self._put((CONTROL, edge, _VERBS[verb], time.monotonic_ns(), peer, sent, arguments))

    def command(self, received: ReceivedCommand, started_ns: int, finished_ns: int) -> None:
        """Record a command that the host obeyed. Commands without a session are few, and always recorded."""
        command = received.command
        session, epoch = command.subject
        if self._below is None or not session or self._chosen((Row(session, epoch, 0, 0),)):
            self._put((
                COMMAND, command.kind, command.sent_ns, received.received_ns, started_ns, finished_ns, session, epoch
            ))  # fmt: skip

    def span(
        self, started_ns: int, finished_ns: int, row: Row, trace: str, span: str, parent: str, links: Sequence[str],
        batch: int, error: str,
    ) -> None:  # fmt: skip
        """Record a step of a traced request (spans.py)."""
        if self._below is None or self._chosen((row,)):
            self._put((SPAN, started_ns, finished_ns, row, trace, span, parent, links, batch, error))

    def unsent(self, unsent: Unsent) -> None:
        message, link = unsent.message, unsent.link
        if self._below is None or self._chosen(message.rows):
            self._put((
                UNSENT, link.spec.edge, unsent.nbytes, message.ready_ns, unsent.given_up_ns, message.rows, link.peer
            ))  # fmt: skip

    def done(self, received: Received, started_ns: int, finished_ns: int, batch: int) -> None:
        """Record a message that is used up. `batch` is the number of messages in its step; 0: it went into no step."""
        self._received(DONE, received, started_ns, finished_ns, batch, received.header.rows)

    def tapped(self, edge: int, at_ns: int, statistics: Mapping[str, float], rows: tuple[Row, ...]) -> None:
        """Record the statistics of a message that went out on an edge with a tap."""
        if self._below is None or self._chosen(rows):
            self._put(
                (
                    TAP,
                    edge,
                    at_ns,
                    statistics["norm"],
                    statistics["mean"],
                    statistics["largest"],
                    statistics["not_finite"],
                    rows,
                )
            )

    def part(self, received: Received, started_ns: int, finished_ns: int, batch: int, rows: tuple[Row, ...]) -> None:
        """Record a step that took only some rows of a message. `rows` are those of the step."""
        own = {row[:3] for row in received.header.rows}
        self._received(PART, received, started_ns, finished_ns, batch, tuple(row for row in rows if row[:3] in own))

    def _received(
        self, kind: str, received: Received, started_ns: int, finished_ns: int, batch: int, rows: tuple[Row, ...]
    ) -> None:
        header = received.header
        if self._below is not None and not self._chosen(header.rows):
            return
        self._put((
            kind, header.edge, header.sequence, received.nbytes, header.sent_ns, received.received_ns, started_ns,
            finished_ns, batch, rows, received.link.peer,
        ))  # fmt: skip

    def _chosen(self, rows: tuple[Row, ...]) -> bool:
        """Return whether a row of a message is in the sample.

        Multiplicative hashing (Knuth) spreads consecutive numbers evenly.
        """
        assert self._below is not None
        return any((row[self._field] * SPREAD & 0xFFFFFFFF) < self._below for row in rows)
