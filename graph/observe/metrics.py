"""Serve the metrics of a live run to Prometheus: /metrics on loopback, computed on request."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import trio

from ranvier.transport.wires.endpoint import parse

from ..file.errors import RequestError

if TYPE_CHECKING:
    import structlog

Snapshot = Callable[[], Mapping[str, Any]]
"""`Run.snapshot`, or its counterpart for a training. It is called on the run's own thread."""


@contextlib.asynccontextmanager
async def served(
    address: str | None, graph: str, snapshot: Snapshot, log: structlog.typing.FilteringBoundLogger
) -> AsyncIterator[str | None]:
    """Serve the metrics at `address` (`host:port`) while in the context.

    Yield the URL of the page, with the port that is in use, and log it. Without an address, yield None.

    Raises:
        RequestError: prometheus_client is not installed, or the port is taken.
    """
    if address is None:
        yield None
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise RequestError("telemetry.metrics needs prometheus_client; pip install 'ranvier[telemetry]'") from None
    endpoint = parse(f"tcp://{address}")
    registry = CollectorRegistry()
    registry.register(_Collector(graph, snapshot, trio.lowlevel.current_trio_token()))
    try:
        server, thread = start_http_server(endpoint.port, endpoint.location, registry)
    except OSError as error:
        raise RequestError(
            f"telemetry.metrics {address}: {error.strerror}; give another port, or 0 for any free one"
        ) from None
    page = f"http://{endpoint.location}:{server.server_port}/metrics"
    log.info("metrics", page=page)
    try:
        yield page
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(server.shutdown)  # up to 0.5 s: the server checks twice a second
        server.server_close()
        thread.join()


class _Collector:
    """Collect the metrics on the server's thread, from a snapshot that is taken on the run's own thread."""

    def __init__(self, graph: str, snapshot: Snapshot, token: trio.lowlevel.TrioToken) -> None:
        self._graph, self._snapshot, self._token = graph, snapshot, token

    def describe(self) -> list[Any]:
        """Return nothing, so that the registry does not call `collect` before the run has begun."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        try:
            status = trio.from_thread.run_sync(self._snapshot, trio_token=self._token)
        except trio.RunFinishedError:
            return
        yield from self._of_hosts(status)
        yield from self._of_events(status)
        for name, what, kind in (
            ("sessions", "sessions open now", GaugeMetricFamily),
            ("requests", "requests accepted so far", CounterMetricFamily),
            ("tokens", "tokens delivered so far", CounterMetricFamily),
            ("recoveries", "hosts replaced so far", CounterMetricFamily),
        ):  # fmt: skip
            if name in status:
                yield self._of_the_run(kind, name, what, status[name])
        trained = status.get("training", {})
        for name, what in (
            ("step", "number of the last finished step"), ("loss", "loss of that step"),
            ("accuracy", "accuracy of that step"), ("norm", "norm of all gradients of that step"),
            ("seconds", "duration of that step"), ("validation_loss", "loss of the last validation"),
            ("validation_accuracy", "accuracy of the last validation"),
        ):  # fmt: skip
            if name in trained:
                yield self._of_the_run(GaugeMetricFamily, f"training_{name}", what, trained[name])

    def _of_hosts(self, status: Mapping[str, Any]) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        by_host: Mapping[str, tuple[type[Any], str, str]] = {
            "up": (GaugeMetricFamily, "1 while the host runs", "up"),
            "steps": (CounterMetricFamily, "steps taken so far", "steps"),
            "queued": (GaugeMetricFamily, "pieces of work that wait for a step", "queued"),
            "stepping_seconds": (GaugeMetricFamily, "time since the current step began", "stepping_s"),
            "heard_seconds": (GaugeMetricFamily, "time since the last message of the host", "heard_s"),
            "held_bytes": (GaugeMetricFamily, "bytes of weights that the host holds", "held_bytes"),
            "kv_capacity_tokens": (GaugeMetricFamily, "token positions that fit into the KV cache", "capacity_tokens"),
        }  # fmt: skip
        labels = ["graph", "host"]
        for name, (kind, what, key) in by_host.items():
            family = kind(f"ranvier_host_{name}", what, labels=labels)
            for host in status["hosts"]:
                value = float(host["state"] == "running") if key == "up" else host[key]
                if value is not None:
                    family.add_metric([self._graph, host["label"]], value)
            yield family
        held = GaugeMetricFamily(
            "ranvier_host_kv_held_tokens", "token positions that open sessions hold", labels=labels
        )
        for host, tokens in status["held_tokens"].items():
            held.add_metric([self._graph, host], tokens)
        yield held

    def _of_events(self, status: Mapping[str, Any]) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        counted = CounterMetricFamily(
            "ranvier_events", "events counted by the host, by name", labels=["graph", "host", "event"]
        )
        for host, counters in status["counters"].items():
            for event, count in counters.items():
                counted.add_metric([self._graph, host, event], count)
        yield counted

    def _of_the_run(self, kind: type[Any], name: str, what: str, value: float) -> Any:
        family = kind(f"ranvier_{name}", what, labels=["graph"])
        family.add_metric([self._graph], value)
        return family
