"""Which step belongs to which request that somebody traces: W3C trace contexts, and spans (telemetry.py exports them).

A request comes with a `traceparent`, or gets one; its root span is the gateway's. Every step that one of its rows goes into
is a span below that, and names the spans that made what it was given: their ids come in the header of the message.

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
from ..errors import told
from .trace_records import Records

_FORM = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED = 1
MOST_CHARACTERS = 500
"""Of an error that a span tells of."""
_random = random.SystemRandom()


class TraceContext:
    """One `traceparent`, as bytes: trace id (16), span id (8), flags (1).

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
        """The context of another span of the same trace, as a header carries it."""
        return self.trace + span + self.flags


def new_span() -> bytes:
    return (_random.getrandbits(63) + 1).to_bytes(8, "big")


def root(caller: str | None) -> tuple[str, str]:
    """The `traceparent` of a request's root span, and its parent's id (hex; empty where nobody called). The trace is the
    caller's or, without one, a new one.

    Raises:
        ValueError: `caller` is no traceparent.
    """
    given = TraceContext(caller) if caller is not None else None
    trace = given.trace if given is not None else new_span() + new_span()
    flags = given.flags if given is not None else bytes([SAMPLED])
    return f"00-{trace.hex()}-{new_span().hex()}-{flags.hex()}", given.span.hex() if given is not None else ""


def words(error: object) -> str:
    """Why a span failed; empty if it did not."""
    return told(error)[:MOST_CHARACTERS] if isinstance(error, BaseException) else ""


Begun = tuple[Row, TraceContext, bytes]
"""A row's span, which is under way."""


class Spans:
    """Those of one host's steps. `exchange` is told what to put into the headers of what a step makes."""

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
        """A span for each row that is traced."""
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
        """`failures` by session."""
        made_by: dict[int, list[str]] = {}
        for source in {id(source): source for source in sources}.values():  # one that was joined row by row comes often
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
