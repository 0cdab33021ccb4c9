"""Watch traces: the same messages, parts and paths as `ranvier trace` finds, read bit by bit."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranvier.graph.page import watch as watch_module
from ranvier.graph.page.events import Events
from ranvier.graph.page.histogram import bucket, microseconds, percentile
from ranvier.graph.page.watch import Watch
from ranvier.graph.trace import critical_path, summary
from ranvier.graph.trace.trace_lines import TraceError

PROMPTS = [[5, 6, 7], list(range(40)), [9]]


@pytest.fixture(scope="module")
def finished(streamed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streamed(tmp_path_factory.mktemp("watched"), PROMPTS, 12)


def test_parts_are_those_of_the_summary(finished: Path) -> None:
    """Count each message once, and find the percentiles of its parts."""
    watch = Watch(finished)
    watch.look()
    for number, edge in enumerate(summary.summary(summary.read(finished))["edges"]):
        found = watch.edge(number)
        assert found["name"] == edge["edge"]
        assert {parts["messages"] for parts in found["parts"].values()} == {edge["messages"]}
        for part, figures in edge["microseconds"].items():
            for share in ("p50", "p95"):
                assert found["parts"][part][f"{share}_us"] == pytest.approx(figures[share], rel=0.06, abs=1), (
                    edge,
                    part,
                )


def test_paths_are_those_of_trace_why(finished: Path) -> None:
    """Find the same path of each token, and paths that add up to the path of the whole request."""
    watch, trace = Watch(finished), summary.read(finished)
    watch.look()
    for session in critical_path.Causes(trace).sessions:
        first = len(next(prompt for prompt in PROMPTS if _begins_at(trace, session) == len(prompt)))
        whole = critical_path.why(trace, session)
        parts = [watch.path([session], position) for position in range(first, first + 12)]
        for position, part in enumerate(parts, first):
            assert part["path"] == critical_path.why(trace, session, position)["path"]
        assert sum(part["ms"] for part in parts) == pytest.approx(whole["ms"])
    with pytest.raises(TraceError, match="no record of this token"):
        watch.path([session], 10_000)


def _begins_at(trace: Any, session: int) -> int:
    return min(row[2] for record in trace.done[critical_path.ME] for row in record.rows if row[0] == session)


def test_a_trace_that_grows(finished: Path, tmp_path: Path) -> None:
    """Find the same, whatever part of each file is there at each look."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    whole = {file.name: file.read_bytes() for file in (copy / "trace").iterdir()}
    for file in (copy / "trace").iterdir():
        file.write_bytes(b"")
    watch, at_once = Watch(copy), Watch(finished)
    for step in range(1, 24):
        for name, data in whole.items():
            (copy / "trace" / name).write_bytes(data[: len(data) * step // 23])
        watch.look()
    at_once.look()
    for edge in range(6):
        assert watch.edge(edge) == at_once.edge(edge)
    assert watch.steps("lower.0") and {tuple(step.items()) for step in watch.steps("lower.0")} == {
        tuple(step.items()) for step in at_once.steps("lower.0")
    }


def test_the_window(finished: Path) -> None:
    """Count the rates of the last seconds: tokens of actors, messages and bytes of edges. They sink to zero at rest."""
    trace = summary.read(finished)
    ended_ns = max(record.finished_ns for records in trace.done.values() for record in records)
    now_ns = ended_ns
    watch = Watch(finished, lambda: now_ns)
    watch.look()
    frame = watch.frame()
    assert set(frame["actors"]) == {"embed.0", "lower.0", "upper.0", "head.0", "gateway.0"}
    assert all(0 <= actor["busy"] <= 1 and actor["tokens_s"] > 0 for actor in frame["actors"].values())
    began_ns = min(record.started_ns for records in trace.done.values() for record in records)
    tokens = sum(row[3] for record in trace.in_steps("lower.0") for row in record.rows)
    assert frame["actors"]["lower.0"]["tokens_s"] == pytest.approx(tokens / ((ended_ns - began_ns) / 1e9))
    assert frame["edges"][0]["name"] == "embed.hidden -> lower.hidden" and frame["token"] is None  # not settled yet
    now_ns += 5_500_000_000
    watch.look()
    frame = watch.frame()
    assert not any(actor["tokens_s"] for actor in frame["actors"].values())
    assert not any(edge["messages_s"] for edge in frame["edges"])
    token = frame["token"]
    assert token["path"] == critical_path.why(trace, token["session"], token["position"])["path"]


def test_records_that_are_not_kept_any_more(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep few records, and read the trace again for the path of an older token; but not if it is too large."""
    monkeypatch.setattr(watch_module, "MOST_ROWS", 10)
    watch, trace = Watch(finished), summary.read(finished)
    watch.look()
    session = critical_path.Causes(trace).sessions[0]
    position = _begins_at(trace, session) + 1
    assert watch.path([session], position)["path"] == critical_path.why(trace, session, position)["path"]
    monkeypatch.setattr(watch_module, "MOST_BYTES", 10)
    with pytest.raises(TraceError, match="too old"):
        watch.path([session], position)


@given(st.lists(st.integers(1001, 10**11), min_size=1), st.sampled_from([0.5, 0.95, 0.99]))
def test_percentiles_of_histograms(durations: list[int], share: float) -> None:
    """Find a percentile to half a bucket."""
    found = percentile(Counter(map(bucket, durations)), share)
    wanted = summary.percentiles(each / 1e3 for each in durations)[f"p{int(100 * share)}"]
    assert found == pytest.approx(wanted, rel=0.0905 / 2 + 1e-3)
    assert microseconds(bucket(500)) == 0.0 and percentile(Counter(), share) is None


def test_events_of_a_log_that_is_rotated(tmp_path: Path) -> None:
    """Tell warnings and errors of a run's log, over a rotation and lines that are not the log's."""
    log = tmp_path / "logs" / "supervisor.jsonl"
    log.parent.mkdir()
    events = Events(tmp_path)
    events.look()
    lost = b'{"actor": "a.0", "what": "killed by SIGKILL", "event": "lost", "level": "warning", "timestamp": "T"}\n'
    log.write_bytes(b'{"event": "starting", "level": "info"}\n"level": "error"\n' + lost + lost[:20])
    events.look()
    assert [(each["event"], each["words"]) for each in events.last] == [("lost", "killed by SIGKILL")]
    log.write_bytes(lost.replace(b"a.0", b"b.0"))
    events.look()
    assert [each["actor"] for each in events.last] == ["a.0", "b.0"]
