"""Trace requests through the steps of a host: W3C trace contexts, and spans, which telemetry.py exports.

A request comes with a `traceparent`, or gets one. Its root span belongs to the gateway. Every step that takes one of
its rows is a child of the root span. It names the spans that made its inputs, whose ids come in the headers of the
messages.

Source: W3C Trace Context, Recommendation of 23 November 2021.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from ranvier.transport.format.header import Row, TracedHeader
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link_state import Received

from ..component.session import SessionInfo
from ..errors import describe
from .trace_records import Records

_FORM = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED = 1
MOST_CHARACTERS = 500
"""Maximum number of characters of an error in a span."""
_random = random.SystemRandom()


class TraceContext:
    """Hold one `traceparent` as bytes: trace id (16), span id (8), flags (1).

    Raises:
        ValueError: it is not of the form 00-<32 hex digits>-<16 hex digits>-<2 hex digits>, or one of the ids is zero.
    """

    def __init__(self, traceparent: str) -> None:
        found = _FORM.fullmatch(traceparent)
        if found is None or traceparent.startswith("ff") or (found[4] and traceparent.startswith("00")):
            raise ValueError(
                f"traceparent: expected 00-<32 hex digits>-<16 hex digits>-<2 hex digits>, got {traceparent!r:.80}"
            )
        self.trace, self.span = bytes.fromhex(found[1]), bytes.fromhex(found[2])
        self.flags = bytes.fromhex(found[3])
        if not any(self.trace) or not any(self.span):
            raise ValueError(f"traceparent: expected ids that are not zero, got {traceparent}")

    @property
    def sampled(self) -> bool:
        return bool(self.flags[0] & SAMPLED)

    def with_span(self, span: bytes) -> bytes:
        """Return the context of another span of the same trace, as a message header carries it."""
        return self.trace + span + self.flags


def new_span() -> bytes:
    return (_random.getrandbits(63) + 1).to_bytes(8, "big")


def root(caller: str | None) -> tuple[str, str]:
    """Return the `traceparent` of a request's root span, and the id of that span's parent.

    The trace and the parent (hex) are those of `caller`. Without a caller the trace is new, and the parent is empty.

    Raises:
        ValueError: `caller` is not a valid traceparent.
    """
    given = TraceContext(caller) if caller is not None else None
    trace = given.trace if given is not None else new_span() + new_span()
    flags = given.flags if given is not None else bytes([SAMPLED])
    return f"00-{trace.hex()}-{new_span().hex()}-{flags.hex()}", given.span.hex() if given is not None else ""


def words(error: object) -> str:
    """Return why a span failed; empty if it did not."""
    return describe(error)[:MOST_CHARACTERS] if isinstance(error, BaseException) else ""


Begun = tuple[Row, TraceContext, bytes]
"""A span that has begun: its row, the row's trace context, the id of the span."""


class Spans:
    """Record the spans of one host's steps, and give `exchange` the trace contexts for the headers of their outputs."""

    def __init__(self, exchange: Exchange, records: Records) -> None:
        self._exchange = exchange
        self._records = records
        self._traced: dict[int, TraceContext] = {}

    def opened(self, info: SessionInfo, _rewound: bool) -> None:
        if info.traceparent:
            context = TraceContext(info.traceparent)
            if context.sampled:
                self._traced[info.session] = context

    def closed(self, session: int) -> None:
        if self._traced.pop(session, None) is not None:
            self._exchange.traces.pop(session, None)

    def begin(self, rows: Sequence[Row]) -> list[Begun]:
        """Begin a span for each traced row."""
        if not self._traced:
            return []
        begun = []
        for row in rows:
            context = self._traced.get(row.session)
            if context is not None:
                span = new_span()
                self._exchange.traces[row.session] = context.with_span(span)
                begun.append((row, context, span))
        return begun

    def end(
        self, begun: Sequence[Begun], sources: Sequence[Received], started_ns: int, finished_ns: int, batch: int,
        failures: Mapping[int, BaseException],
    ) -> None:  # fmt: skip
        """End and record the spans of a step. `failures` holds the errors by session."""
        made_by: dict[int, list[str]] = {}
        for source in {
            id(source): source for source in sources
        }.values():  # a message that was joined row by row is listed several times
            if isinstance(source.header, TracedHeader):
                for row, trace in zip(source.header.rows, source.header.traces, strict=True):
                    if trace:
                        made_by.setdefault(row.session, []).append(trace[16:24].hex())
        for row, context, span in begun:
            error = words(failures.get(row.session))
            self._records.span(
                started_ns, finished_ns, row, context.trace.hex(), span.hex(), context.span.hex(),
                made_by.get(row.session, []), batch, error,
            )  # fmt: skip
