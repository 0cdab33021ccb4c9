"""Export the spans of requests by OTLP over HTTP. They are read from the trace while it is written.

Each request has one span (at the gateway). Below it is one span for each step that processed one of its rows. The span
of a step links to the spans that made its inputs. The export never delays a message: spans that the collector does not
accept are counted as lost.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.trace.trace_file import SPAN
from ranvier.transport.format.host_id import replica_id

from ..file.errors import RequestError
from ..trace.trace_lines import Lines, Spanned

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

EXPORT_EVERY_S = 1.0
AT_ONCE = 512
MOST_UNSENT = 16 * AT_ONCE
"""If the collector refuses a batch while more spans than this are unsent, all unsent spans are dropped."""
TIMEOUT_S = 3.0
"""Timeout of one request to the collector, retries included."""


@contextlib.asynccontextmanager
async def exporting(
    run_dir: Path, graph: str, endpoint: str | None, log: Any, counts: dict[str, int]
) -> AsyncIterator[None]:
    """Export the spans of a run to a collector, if `endpoint` is given, until all are written.

    At the end, `counts` gets the numbers of spans that were `exported` and `lost`.

    Raises:
        RequestError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        yield
        return
    exporter = Exporter(run_dir, graph, endpoint, log)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exporter.run)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await exporter.finish()
        counts.update(exported=exporter.exported, lost=exporter.lost)


class Exporter:
    """Export the spans of one run.

    Args:
        endpoint: the collector's base address; spans go to its /v1/traces.
        log: gets one warning if the collector does not accept spans.

    Raises:
        RequestError: OpenTelemetry is not installed.
    """

    def __init__(self, run_dir: Path, graph: str, endpoint: str, log: Any) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise RequestError("telemetry.otlp needs OpenTelemetry; pip install 'ranvier[telemetry]'") from None
        self._lines = Lines(run_dir)
        self._made = _Made(graph, run_dir.name, time.time_ns() - time.monotonic_ns())
        self._endpoint = f"{endpoint.rstrip('/')}/v1/traces"
        self._exporter = OTLPSpanExporter(endpoint=self._endpoint, timeout=TIMEOUT_S)
        self._log = log
        self._unsent: list[ReadableSpan] = []
        logging.getLogger("opentelemetry").addHandler(logging.NullHandler())  # the run's log reports a failure once
        self.exported = self.lost = 0

    async def run(self) -> None:
        """Export new spans until cancelled. `finish` sends the rest."""
        while True:
            await trio.sleep(EXPORT_EVERY_S)
            await self._export()

    async def finish(self) -> None:
        """Send the rest when everything is written. If the collector refuses a batch, drop all that is left."""
        await self._export(until_refused=True)
        shut_down: Any = self._exporter.shutdown
        shut_down()

    async def _export(self, until_refused: bool = False) -> None:
        self._unsent += await trio.to_thread.run_sync(self._new)
        while self._unsent:
            batch = self._unsent[:AT_ONCE]
            taken = await trio.to_thread.run_sync(self._taken, batch)
            if taken:
                self.exported += len(batch)
                del self._unsent[: len(batch)]
                continue
            if not self.lost:
                self._log.warning("the collector takes no spans", endpoint=self._endpoint)
            gone = len(self._unsent) if until_refused or len(self._unsent) > MOST_UNSENT else len(batch)
            self.lost += gone
            del self._unsent[:gone]

    def _new(self) -> list[ReadableSpan]:
        return [self._made.span(actor, record) for actor, _, record in self._lines.read((SPAN,))]

    def _taken(self, batch: Sequence[ReadableSpan]) -> bool:
        from opentelemetry.sdk.trace.export import SpanExportResult

        return self._exporter.export(batch) is SpanExportResult.SUCCESS


class _Made:
    """Convert spans to OpenTelemetry's form. `offset_ns` is the time of day minus CLOCK_MONOTONIC."""

    def __init__(self, graph: str, run: str, offset_ns: int) -> None:
        self._graph, self._run, self._offset_ns = graph, run, offset_ns
        self._resources: dict[str, Any] = {}

    def span(self, actor: str, record: Spanned) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import Link, SpanKind
        from opentelemetry.trace.status import Status, StatusCode

        session, epoch, position, tokens = record.row
        name = replica_id(actor).actor
        root = name == GATEWAY
        return ReadableSpan(
            name="request" if root else f"{name} step",
            context=_context(record.trace, record.span),
            parent=_context(record.trace, record.parent) if record.parent else None,
            resource=self._resource(actor),
            attributes={
                "ranvier.session": session, "ranvier.epoch": epoch, "ranvier.position": position, "ranvier.tokens": tokens,
                **({} if root else {"ranvier.batch_rows": record.batch}),
            },
            links=[Link(_context(record.trace, link)) for link in record.links],
            kind=SpanKind.SERVER if root else SpanKind.CONSUMER,
            status=Status(StatusCode.ERROR, record.error) if record.error else Status(StatusCode.UNSET),
            start_time=record.started_ns + self._offset_ns,
            end_time=record.finished_ns + self._offset_ns,
        )  # fmt: skip

    def _resource(self, actor: str) -> Any:
        from opentelemetry.sdk.resources import Resource

        if actor not in self._resources:
            self._resources[actor] = Resource({
                "service.namespace": self._graph, "service.name": f"{self._graph}.{actor.partition('.')[0]}",
                "service.instance.id": f"{self._run}/{actor}",
            })  # fmt: skip
        return self._resources[actor]


def _context(trace: str, span: str) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
