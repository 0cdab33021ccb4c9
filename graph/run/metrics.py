"""What Prometheus reads of a run that goes on: /metrics on loopback, made at the moment it is asked for."""

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
"""`Run.status`, or what a training says in its place, called on the run's own thread."""


@contextlib.asynccontextmanager
async def served(
    address: str | None, graph: str, snapshot: Snapshot, log: structlog.typing.FilteringBoundLogger
) -> AsyncIterator[str | None]:
    """Serve it at `host:port` while in the context: the address of the page, with the port that it was given, which the log
    has, too.

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
            await trio.to_thread.run_sync(server.shutdown)  # it looks twice a second whether it is to end
        server.server_close()
        thread.join()


class _Collector:
    """Asked on the server's thread; the run's state is looked at on the run's own."""

    def __init__(self, graph: str, snapshot: Snapshot, token: trio.lowlevel.TrioToken) -> None:
        self._graph, self._snapshot, self._token = graph, snapshot, token

    def describe(self) -> list[Any]:
        """Nothing is to be asked for before the run has begun."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        try:
            told = trio.from_thread.run_sync(self._snapshot, trio_token=self._token)
        except trio.RunFinishedError:
            return
        by_host: Mapping[str, tuple[type[Any], str, str]] = {
            "up": (GaugeMetricFamily, "1 while it runs", "up"),
            "steps": (CounterMetricFamily, "steps taken", "steps"),
            "queued": (GaugeMetricFamily, "pieces that wait for a step", "queued"),
            "stepping_seconds": (GaugeMetricFamily, "how long it has been in one step", "stepping_s"),
            "heard_seconds": (GaugeMetricFamily, "since its last sign of life", "heard_s"),
            "held_bytes": (GaugeMetricFamily, "of weights", "held_bytes"),
            "kv_capacity_tokens": (GaugeMetricFamily, "positions that fit into its KV cache", "capacity_tokens"),
        }  # fmt: skip
        labels = ["graph", "host"]
        for name, (kind, what, key) in by_host.items():
            family = kind(f"ranvier_host_{name}", what, labels=labels)
            for host in told["hosts"]:
                value = float(host["state"] == "running") if key == "up" else host[key]
                if value is not None:
                    family.add_metric([self._graph, host["label"]], value)
            yield family
        held = GaugeMetricFamily("ranvier_host_kv_held_tokens", "positions that open sessions hold", labels=labels)
        for host, tokens in told["held_tokens"].items():
            held.add_metric([self._graph, host], tokens)
        yield held
        counted = CounterMetricFamily("ranvier_events", "what happened, by name", labels=[*labels, "event"])
        for host, counters in told["counters"].items():
            for event, count in counters.items():
                counted.add_metric([self._graph, host, event], count)
        yield counted
        for name, what, kind in (
            ("sessions", "open now", GaugeMetricFamily), ("requests", "accepted so far", CounterMetricFamily),
            ("tokens", "delivered so far", CounterMetricFamily), ("recoveries", "hosts replaced", CounterMetricFamily),
        ):  # fmt: skip
            if name in told:
                yield self._of_the_run(kind, name, what, told[name])
        trained = told.get("training", {})
        for name, what in (
            ("step", "of the run's steps, the last one that is done"), ("loss", "of that step"), ("accuracy", "in that step"),
            ("norm", "of all gradients of that step"), ("seconds", "that it took"),
            ("validation_loss", "the last one"), ("validation_accuracy", "in the last validation"),
        ):  # fmt: skip
            if name in trained:
                yield self._of_the_run(GaugeMetricFamily, f"training_{name}", what, trained[name])

    def _of_the_run(self, kind: type[Any], name: str, what: str, value: float) -> Any:
        family = kind(f"ranvier_{name}", what, labels=["graph"])
        family.add_metric([self._graph], value)
        return family
