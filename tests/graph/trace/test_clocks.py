"""Correct times of hosts whose clock differs from the run's.

The hosts are real processes in their own time namespace, as if on another machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ranvier.graph.trace import summary, table
from ranvier.graph.trace.trace_lines import Lines

AHEAD_S = 1000
COMMAND = ["unshare", "--time", "--monotonic", str(AHEAD_S)]


def test_times_of_hosts_that_are_ahead_are_corrected(
    streamed: Callable[..., Path], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Correct the times of hosts whose monotonic clock is 1000 s ahead.

    Uncorrected, a message takes about 1000 s. Corrected, it takes its real time, within the estimated error."""
    tried = subprocess.run([*COMMAND, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no time namespace can be made here: {tried.stderr}")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} {sys.executable} "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    run = streamed(runs, [[1, 2, 3], [5, 6]], 8)
    monkeypatch.undo()
    clocks = json.loads((run / "clocks.json").read_text())
    assert clocks.keys() == {"embed.0.1", "lower.0.1", "upper.0.1", "head.0.1"}
    for estimates in clocks.values():
        assert estimates and all(abs(ahead - AHEAD_S * 10**9) <= error < 10**8 for _, ahead, error in estimates)
    read = summary.read(run)
    assert read.clocks.keys() == clocks.keys()
    error_us = max(error for estimates in clocks.values() for _, _, error in estimates) / 1e3
    for edge in summary.summary(read)["edges"]:
        if edge["messages"]:
            assert -error_us <= edge["microseconds"]["wire"]["p50"] < 1e6
    told = re.search(
        r"the clock of lower\.0\.1 is ([\d.]+) ms ahead, give or take", table.of_summary(summary.summary(read))
    )
    assert told is not None and abs(float(told[1]) - AHEAD_S * 1e3) < 100


def test_one_clock_is_not_corrected(streamed: Callable[..., Path], runs: Path) -> None:
    """Correct nothing if hosts and run share one clock."""
    run = streamed(runs, [[1, 2, 3]], 8)
    clocks = json.loads((run / "clocks.json").read_text())
    assert clocks and all(abs(ahead) <= error for estimates in clocks.values() for _, ahead, error in estimates)
    assert summary.read(run).clocks == {}


def test_a_negative_latency_is_shown_as_what_it_is(tmp_path: Path) -> None:
    """Show a negative latency unchanged.

    One of the two clocks is 100 ns ahead, so a message seems to arrive before it was sent."""
    (tmp_path / "trace").mkdir()
    (tmp_path / "plan.json").write_text('{"edges": [{"name": "a.y -> b.x"}]}')
    (tmp_path / "clocks.json").write_text(json.dumps({"b.0.1": [[400, 100, 20]]}))
    (tmp_path / "trace" / "a.0.jsonl").write_text(
        '{"actor": "a.0"}\n["sent",0,1,8,500,500,510,[[1,1,0,1]],null,"b.0.1",[["y",0,[1],0,8]],0]\n'
    )
    (tmp_path / "trace" / "b.0.jsonl").write_text(
        '{"actor": "b.0"}\n["done",0,1,8,510,605,620,630,1,[[1,1,0,1]],"a.0.1"]\n'
    )
    read = summary.read(tmp_path)
    [done] = read.done["b.0"]
    assert (done.sent_ns, done.received_ns, done.started_ns, done.finished_ns) == (510, 505, 520, 530)
    [edge] = summary.summary(read)["edges"]
    assert edge["microseconds"]["wire"]["p50"] == pytest.approx(-0.005)
    assert [record.sent_ns for _, kind, record in Lines(tmp_path).read() if kind == "sent"] == [510]


def test_a_clock_that_drifts_is_corrected_by_what_was_known_then(tmp_path: Path) -> None:
    """Correct each time by the offset known for that time, and report the drift.

    The clock is 100 ns ahead at 1000 ns, and 300 ns ahead at 3000 ns."""
    (tmp_path / "trace").mkdir()
    (tmp_path / "plan.json").write_text('{"edges": [{"name": "a.y -> b.x"}]}')
    (tmp_path / "clocks.json").write_text(json.dumps({"b.0.1": [[1000, 100, 20], [3000, 300, 10]]}))
    shown = [[500, 600], [1000, 1100], [2000, 2200], [3000, 3300], [9000, 9300]]
    lines = [
        ["done", 0, n, 8, at_ns, ahead_ns, ahead_ns, ahead_ns, 1, [[1, 1, 0, 1]], "a.0.1"]
        for n, (at_ns, ahead_ns) in enumerate(shown)
    ]
    (tmp_path / "trace" / "b.0.jsonl").write_text("\n".join(map(json.dumps, [{"actor": "b.0"}, *lines])) + "\n")
    read = summary.read(tmp_path)
    assert [done.received_ns for done in read.done["b.0"]] == [at_ns for at_ns, _ in shown]
    assert summary.summary(read)["clocks"] == {"b.0.1": {"offset_ns": 300, "error_ns": 20, "drift_ns": 200}}
    assert (
        "the clock of b.0.1 is 0.000 ms ahead, give or take 0.000 ms, after it drifted by 0.000 ms"
        in table.of_summary(summary.summary(read))
    )
