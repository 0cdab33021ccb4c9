"""Check what other tools get: OTLP spans as protobufs, /metrics as Prometheus reads them, and logs."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, models

import ranvier
from ranvier.actors.trace.spans import TraceContext, root
from ranvier.actors.trace.trace_file import SPAN
from ranvier.graph.trace.trace_lines import Lines

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PROMPT = [5, 17, 200, 33, 8]


class Receiver:
    """Stand in for an OTLP collector, which reads protobufs at /v1/traces and answers with one.

    With a `status` other than 200, it refuses them."""

    def __init__(self, status: int = 200) -> None:
        self.spans: list[tuple[dict[str, str], Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                if status == 200:
                    for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                        resource = {a.key: a.value.string_value for a in group.resource.attributes}
                        receiver.spans += [(resource, span) for scope in group.scope_spans for span in scope.spans]
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Provide a collector that accepts spans."""
    made = Receiver()
    yield made
    made.close()


Four = Callable[..., ranvier.Graph]


@pytest.fixture
def four(tiny: Any, graph_file: Callable[..., Path], split: Any) -> Four:
    """Provide a function that returns a graph of the small llama in four actors, with these settings."""
    model, _ = tiny("llama")

    def make(**settings: Any) -> ranvier.Graph:
        path = graph_file(model={"source": "unset", "dtype": "float32"}, prefill_chunk=3, **split(4, 6), **settings)
        return ranvier.load(path, overrides={"model.source": str(model)})

    return make


def generated(graph: ranvier.Graph, runs: Path, tokens: int = 4, **options: Any) -> ranvier.Run:
    """Generate tokens from the graph, and return the run."""

    async def main() -> ranvier.Run:
        async with ranvier.launch(graph, runs=runs) as run:
            async for _ in run.generate(PROMPT, max_tokens=tokens, stop_tokens=(), **options):
                pass
        return run

    return trio.run(main)


def test_spans_reach_a_collector(four: Four, receiver: Receiver, runs: Path) -> None:
    """Export spans: the request joins the caller's trace, and each step is below the request.

    A step is linked to the steps that made its inputs."""
    run = generated(four(telemetry={"otlp": receiver.address}), runs, traceparent=CALLER)
    spans = {span.span_id: span for _, span in receiver.spans}
    assert len(spans) == len(receiver.spans)
    assert {span.trace_id.hex() for span in spans.values()} == {CALLER.split("-")[1]}
    [request] = [span for span in spans.values() if span.name == "request"]
    assert request.parent_span_id.hex() == CALLER.split("-")[2]
    steps = [span for span in spans.values() if span is not request]
    assert {span.name for span in steps} == {"embed step", "blocks0 step", "blocks1 step", "head step"}
    assert all(span.parent_span_id == request.span_id for span in steps)
    # Two parts of the prompt, then one token per step: four tokens take five steps of each actor.
    assert len(steps) == 4 * 5
    before = {"embed step": {"request", "head step"}, "blocks0 step": {"embed step"}, "blocks1 step": {"blocks0 step"},
              "head step": {"blocks1 step"}}  # fmt: skip
    for span in steps:
        for link in span.links:
            made = spans[link.span_id]
            assert made.name in before[span.name]
            assert made.name == "request" or made.start_time_unix_nano <= span.start_time_unix_nano
        assert len(span.links) == 1
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    by_instance = {resource["service.instance.id"] for resource, _ in receiver.spans}
    assert by_instance == {f"{run.dir.name}/{actor}.0" for actor in ("gateway", "embed", "blocks0", "blocks1", "head")}
    assert json.loads((run.dir / "run.json").read_text())["spans"] == {"exported": 21, "lost": 0}


def test_a_request_without_a_caller_begins_a_trace(four: Four, receiver: Receiver, runs: Path) -> None:
    """Begin a new trace for each request without a caller."""
    graph = four(telemetry={"otlp": receiver.address})

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run, trio.open_nursery() as nursery:
            for prompt in (PROMPT, PROMPT[::-1]):
                nursery.start_soon(_all, run, prompt)

    trio.run(main)
    roots = [span for _, span in receiver.spans if span.name == "request"]
    assert len({span.trace_id for span in roots}) == 2
    assert [span.parent_span_id for span in roots] == [b"", b""]
    for made in roots:  # rows of one batch belong to different traces
        own = [span for _, span in receiver.spans if span.trace_id == made.trace_id]
        assert {span.name for span in own} == {"request", "embed step", "blocks0 step", "blocks1 step", "head step"}


async def _all(run: ranvier.Run, prompt: Sequence[int]) -> None:
    """Generate tokens to the end."""
    async for _ in run.generate(prompt, max_tokens=3, stop_tokens=()):
        pass


def test_the_context_is_in_the_header_of_every_message(four: Four, runs: Path) -> None:
    """Send the trace context in the header of every message, even without an exporter.

    A request without a caller, or whose caller does not sample it, is not traced."""
    for traceparent, traced in ((CALLER, True), (CALLER[:-1] + "0", False), (None, False)):
        run = generated(four(), runs, traceparent=traceparent)
        spans = [(actor, record) for actor, kind, record in Lines(run.dir).read() if kind == SPAN]
        everyone = {"gateway.0", "embed.0", "blocks0.0", "blocks1.0", "head.0"}
        assert {actor for actor, _ in spans} == (everyone if traced else set())
        assert all(record.links for actor, record in spans if actor != "gateway.0")


def test_a_step_that_fails_has_an_error(runs: Path, tmp_path: Path, receiver: Receiver) -> None:
    """Put the error of a failed step into its span and into that of the request."""
    (tmp_path / "faulty.py").write_text((Path(__file__).parents[1] / "custom" / "faulty.py").read_text())
    (tmp_path / "graph.yaml").write_text(json.dumps({
        "ranvier": 1, "name": "t", "telemetry": {"otlp": receiver.address},
        "actors": {"one": {"kind": "./faulty.py:Faulty", "args": {"at_step": "raise"}}},
        "edges": ["gateway.x -> one.x", "one.y -> gateway.y"],
    }))  # fmt: skip
    graph = ranvier.load(tmp_path / "graph.yaml", allow_code=True)

    async def main() -> None:
        import torch

        async with ranvier.launch(graph, runs=runs) as run:
            with pytest.raises(ranvier.ActorFailed):
                await run.call(CALLER, x=torch.tensor([13.0]))

    trio.run(main)
    [step] = [span for _, span in receiver.spans if span.name == "one step"]
    assert step.status.message == "ValueError: thirteen is not a number I like"
    [request] = [span for _, span in receiver.spans if span.name == "request"]
    assert request.status.message.startswith("ActorFailed: actor one.0: session 1")


@pytest.mark.slow
def test_a_collector_that_takes_nothing_holds_up_nobody(four: Four, runs: Path) -> None:
    """Generate tokens while the collector refuses or is absent.

    The lost spans are counted, and logged once."""
    refusing = Receiver(status=400)
    try:
        for address in (refusing.address, "http://127.0.0.1:9"):
            run = generated(four(telemetry={"otlp": address}), runs)
            assert json.loads((run.dir / "run.json").read_text())["spans"] == {"exported": 0, "lost": 21}
            log = [json.loads(line) for line in (run.dir / "logs" / "supervisor.jsonl").read_text().splitlines()]
            assert [line["endpoint"] for line in log if line["event"] == "the collector takes no spans"] == [
                f"{address}/v1/traces"
            ]
    finally:
        refusing.close()


def test_metrics_as_prometheus_reads_them(four: Four, runs: Path) -> None:
    """Serve metrics in the format of Prometheus until the run ends."""
    graph = four(telemetry={"metrics": "127.0.0.1:0"})
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}

    async def main() -> str:
        async with ranvier.launch(graph, runs=runs) as run:
            await _all(run, PROMPT)
            steps = run.status
            while sum(host["steps"] for host in steps()["hosts"]) < 4 * 4:  # reported with the heartbeats
                await trio.sleep(0.02)
            assert run.metrics is not None
            text = await trio.to_thread.run_sync(lambda: urllib.request.urlopen(run.metrics or "").read().decode())
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
            return run.metrics

    address = trio.run(main)
    hosts = ["blocks0.0", "blocks1.0", "embed.0", "head.0"]
    assert found["ranvier_host_up"] == {(("graph", "test"), ("host", host)): 1.0 for host in hosts}
    assert sum(found["ranvier_host_steps_total"].values()) >= 16
    assert found["ranvier_tokens_total"] == {(("graph", "test"),): 3.0}
    assert found["ranvier_requests_total"] == {(("graph", "test"),): 1.0}
    assert found["ranvier_sessions"] == {(("graph", "test"),): 0.0}
    assert {dict(labels)["host"] for labels in found["ranvier_host_kv_capacity_tokens"]} == {"blocks0.0", "blocks1.0"}
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address)


@pytest.mark.parametrize(
    ("telemetry", "words"),
    [
        *(({"metrics": address}, "expected loopback, such as 127.0.0.1:9464, or port 0") for address in
          ("0.0.0.0:9464", "192.0.2.1:9464", "127.0.0.1:x")),
        ({"otlp": "127.0.0.1:4318"}, "telemetry.otlp: '127.0.0.1:4318' is not an address; expected http://address:port"),
    ],
)  # fmt: skip
def test_addresses_that_are_none(telemetry: dict[str, str], words: str, four: Four) -> None:
    """Refuse invalid addresses before anything starts.

    /metrics are for loopback only."""
    with pytest.raises(ranvier.GraphError, match=words):
        four(telemetry=telemetry)
    with pytest.raises(ranvier.GraphError, match="remove trace: false"):
        four(telemetry={"otlp": "http://127.0.0.1:4318"}, trace=False)


def test_a_port_that_is_taken(four: Four, receiver: Receiver, runs: Path) -> None:
    """Report that the port for metrics is in use."""
    port = receiver.server.server_address[1]
    with pytest.raises(ranvier.RequestError, match=f"127.0.0.1:{port}: Address already in use; give another port"):
        generated(four(telemetry={"metrics": f"127.0.0.1:{port}"}), runs)


@pytest.mark.parametrize("form", ["json", "console"])
def test_the_log_on_standard_error(form: str, tiny: Any, four: Four, runs: Path, tmp_path: Path) -> None:
    """Write each line of the log to standard error, as JSON or for the console."""
    four()
    source, _ = tiny("llama")
    model = tmp_path / "model"
    shutil.copytree(source, model)
    Tokenizer(models.BPE({"y": 0, "x": 1}, [])).save(str(model / "tokenizer.json"))
    command = [
        sys.executable, "-m", "ranvier", "run", str(tmp_path / "graph.yaml"), "--set", f"model.source={model}",
        "--prompt", "x", "--raw", "-n", "2", "--runs", str(runs), "--log", form,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    if form == "json":
        told = [json.loads(line) for line in lines if line.startswith("{")]
        assert {"info"} == {line["level"] for line in told} and all("timestamp" in line for line in told)
    else:
        told = [line for line in lines if "[info" in line]
    [run] = runs.iterdir()
    assert len(told) == len((run / "logs" / "supervisor.jsonl").read_text().splitlines()) > 3


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "00-abc-00f067aa0ba902b7-01",
        CALLER.upper(),
        "ff" + CALLER[2:],
        CALLER + "-x",
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
    ],
)
def test_what_is_no_trace_context(wrong: str) -> None:
    """Refuse an invalid traceparent."""
    with pytest.raises(ValueError, match="traceparent: expected"):
        TraceContext(wrong)


def test_a_later_version_is_read_as_this_one() -> None:
    """Read a later version of the W3C trace context, without what that version appends."""
    assert TraceContext("01" + CALLER[2:] + "-more").trace.hex() == CALLER.split("-")[1]
    begun, parent = root(CALLER)
    assert begun.split("-")[1] == CALLER.split("-")[1] and parent == CALLER.split("-")[2]
    assert begun.split("-")[2] != parent


def test_lines_are_read_as_they_are_written(tmp_path: Path) -> None:
    """Leave an incomplete line of the trace for the next read."""
    (tmp_path / "trace").mkdir()
    file = tmp_path / "trace" / "a.0.jsonl"
    file.write_text('{"actor": "a.0"}\n["dropped", 3]\n["drop')
    lines = Lines(tmp_path)
    assert [(actor, kind, record.records) for actor, kind, record in lines.read()] == [("a.0", "dropped", 3)]
    with file.open("a") as more:
        more.write('ped", 4]\n')
    assert [record.records for _, _, record in lines.read()] == [4]
    assert list(lines.read()) == []
