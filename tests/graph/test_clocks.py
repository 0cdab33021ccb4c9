"""Hosts whose clock is not the run's: real processes in a time namespace of their own, as on a machine of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ranvier.graph import trace
from ranvier.graph.trace_lines import Lines

AHEAD_S = 1000
COMMAND = ["unshare", "--time", "--monotonic", str(AHEAD_S)]


def test_times_of_hosts_that_are_ahead_are_corrected(
    streamed: Callable[..., Path], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What starts the hosts is given a monotonic clock that is 1000 s ahead. Raw, a message takes that long; corrected, it takes
    what it takes, give or take the error."""
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
    for clock in clocks.values():
        assert abs(clock["offset_ns"] - AHEAD_S * 10**9) <= clock["error_ns"] < 10**8
    read = trace.read(run)
    assert read.clocks == clocks
    error_us = max(clock["error_ns"] for clock in clocks.values()) / 1e3
    for edge in trace.summary(read)["edges"]:
        if edge["messages"]:
            assert -error_us <= edge["microseconds"]["wire"]["p50"] < 1e6
    told = re.search(r"the clock of lower\.0\.1 is ([\d.]+) ms ahead, give or take", trace.table(trace.summary(read)))
    assert told is not None and abs(float(told[1]) - AHEAD_S * 1e3) < 100


def test_one_clock_is_not_corrected(streamed: Callable[..., Path], runs: Path) -> None:
    run = streamed(runs, [[1, 2, 3]], 8)
    clocks = json.loads((run / "clocks.json").read_text())
    assert all(clock["shift_ns"] == 0 and abs(clock["offset_ns"]) <= clock["error_ns"] for clock in clocks.values())
    assert trace.read(run).clocks == {}


def test_a_negative_latency_is_shown_as_what_it_is(tmp_path: Path) -> None:
    """Two clocks, one ahead by 100: a message that seems to have come before it was sent."""
    (tmp_path / "trace").mkdir()
    (tmp_path / "plan.json").write_text('{"edges": [{"name": "a.y -> b.x"}]}')
    (tmp_path / "clocks.json").write_text(json.dumps({"b.0.1": {"offset_ns": 100, "error_ns": 20, "shift_ns": 100}}))
    (tmp_path / "trace" / "a.0.jsonl").write_text(
        '{"actor": "a.0"}\n["sent",0,1,8,500,500,510,[[1,1,0,1]],null,"b.0.1",[["y",0,[1],0,8]],0]\n'
    )
    (tmp_path / "trace" / "b.0.jsonl").write_text(
        '{"actor": "b.0"}\n["done",0,1,8,510,605,620,630,1,[[1,1,0,1]],"a.0.1"]\n'
    )
    read = trace.read(tmp_path)
    [done] = read.done["b.0"]
    assert (done.sent_ns, done.received_ns, done.started_ns, done.finished_ns) == (510, 505, 520, 530)
    [edge] = trace.summary(read)["edges"]
    assert edge["microseconds"]["wire"]["p50"] == pytest.approx(-0.005)
    assert [record.sent_ns for _, kind, record in Lines(tmp_path).read() if kind == "sent"] == [510]
