"""Give one cause to each microsecond of a request and of an actor's idle time, so that the causes add up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranvier.actors.trace.ring import Ring
from ranvier.actors.trace.trace_file import DONE, DROPPED, PART, SENT, TraceFile
from ranvier.actors.trace.trace_records import Records
from ranvier.graph.trace import critical_path, summary, table
from ranvier.graph.trace.critical_path import Causes, Stretch
from ranvier.graph.trace.summary import Trace
from ranvier.graph.trace.trace_lines import DoneLine, SentLine, TraceError
from ranvier.transport.format.header import Row

GATEWAY, A, B = "gateway.0", "a.0", "b.0"
EDGES = ["gateway.x -> a.x", "a.y -> b.y", "b.z -> gateway.z"]


def sent(
    edge: int, sequence: int, session: int, ready: int, credit: int, at: int, target: str, epoch: int = 1
) -> SentLine:
    """Return a record of a message that was sent."""
    return SentLine(edge, sequence, 8, ready, credit, at, [[session, epoch, 0, 1]], None, f"{target}.1")


def done(
    edge: int,
    sequence: int,
    sessions: list[int],
    at: int,
    taken: int,
    started: int,
    finished: int,
    source: str,
    epoch: int = 1,
) -> DoneLine:
    """Return a record of a message that a step has used."""
    return DoneLine(
        edge, sequence, 8, at, taken, started, finished, 1, [[s, epoch, 0, 1] for s in sessions], f"{source}.1"
    )


def by_hand() -> Trace:
    """Return a trace of two sessions over two actors.

    The second session waits for `a`, then for credit of `b`, then for `b`, in whose socket it lies."""
    return Trace(
        Path("by-hand"), EDGES,
        sent={
            GATEWAY: [sent(0, 1, 1, 0, 0, 2, A), sent(0, 2, 2, 0, 0, 4, A)],
            A: [sent(1, 1, 1, 110, 110, 112, B), sent(1, 2, 2, 150, 170, 175, B)],
            B: [sent(2, 1, 1, 270, 270, 271, GATEWAY), sent(2, 2, 2, 400, 400, 402, GATEWAY)],
        },
        done={
            A: [done(0, 1, [1], 2, 7, 10, 110, GATEWAY), done(0, 2, [2], 4, 8, 115, 150, GATEWAY)],
            B: [done(1, 1, [1], 112, 118, 120, 270, A), done(1, 2, [2], 175, 280, 300, 400, A)],
            GATEWAY: [done(2, 1, [1], 271, 275, 275, 276, B), done(2, 2, [2], 402, 405, 405, 409, B)],
        },
    )  # fmt: skip


def test_a_request_whose_causes_are_known() -> None:
    """Find the causes of a request in order, from its first message to its last answer."""
    path = Causes(by_hand()).critical_path(2)
    assert path == [
        Stretch("serialise", EDGES[0], 0, 4), Stretch("wire", EDGES[0], 4, 8), Stretch("handling", A, 8, 10),
        Stretch("busy", A, 10, 110), Stretch("sending", A, 110, 112), Stretch("handling", A, 112, 115), Stretch("compute", A, 115, 150),
        Stretch("credit", EDGES[1], 150, 170), Stretch("serialise", EDGES[1], 170, 175), Stretch("busy", B, 175, 270),
        Stretch("sending", B, 270, 271), Stretch("wire", EDGES[1], 271, 280), Stretch("handling", B, 280, 300), Stretch("compute", B, 300, 400),
        Stretch("serialise", EDGES[2], 400, 402), Stretch("wire", EDGES[2], 402, 405), Stretch("compute", GATEWAY, 405, 409),
    ]  # fmt: skip
    told = critical_path.why(by_hand(), 2)
    assert told["ms"] == pytest.approx(409 / 1e6)
    assert {
        "cause": "compute", "where": B, "ms": 100 / 1e6, "share": pytest.approx(100 / 409), "times": 1, "longest_ms": 100 / 1e6
    } in told["causes"]  # fmt: skip


def test_an_idle_time_is_blamed_on_what_ended_it() -> None:
    """Blame an idle time on what ended it.

    `b` is idle from 270 to 300: its message is sent, travels and is handled. `a` is idle from 110 to 115, and has a
    message."""
    found = Causes(by_hand())
    assert found.idle(B) == [
        Stretch("sending", B, 270, 271), Stretch("wire", EDGES[1], 271, 280), Stretch("handling", B, 280, 300)
    ]  # fmt: skip
    assert found.idle(A) == [Stretch("sending", A, 110, 112), Stretch("handling", A, 112, 115)]


def test_an_idle_time_goes_back_to_whoever_was_slow() -> None:
    """Trace an idle time back to the actor that was slow.

    `b` ends at 30 and begins again at 300. `a` computes until 290 what a client requested at 40."""
    slow = Trace(
        Path("slow"), EDGES,
        sent={GATEWAY: [sent(0, 2, 2, 40, 40, 50, A)], A: [sent(1, 1, 1, 20, 20, 21, B), sent(1, 2, 2, 290, 290, 293, B)]},
        done={
            GATEWAY: [],
            A: [done(0, 1, [1], 2, 3, 5, 20, GATEWAY), done(0, 2, [2], 50, 60, 140, 290, GATEWAY)],
            B: [done(1, 1, [1], 21, 22, 25, 30, A), done(1, 2, [2], 293, 298, 300, 310, A)],
        },
    )  # fmt: skip
    assert Causes(slow).idle(B) == [
        Stretch("client", GATEWAY, 30, 40), Stretch("serialise", EDGES[0], 40, 50), Stretch("wire", EDGES[0], 50, 60),
        Stretch("handling", A, 60, 140), Stretch("compute", A, 140, 290), Stretch("serialise", EDGES[1], 290, 293),
        Stretch("wire", EDGES[1], 293, 298), Stretch("handling", B, 298, 300),
    ]  # fmt: skip


def test_a_loss_is_a_cause() -> None:
    """Count the time until a session continues in a later epoch as recovery.

    What came before the loss is on the path too."""
    again = Trace(
        Path("again"), [EDGES[0], "a.y -> gateway.y"],
        sent={
            GATEWAY: [sent(0, 1, 1, 0, 0, 1, A), sent(0, 2, 1, 500, 500, 501, A, epoch=2)],
            A: [sent(1, 1, 1, 20, 20, 21, GATEWAY), sent(1, 2, 1, 520, 520, 521, GATEWAY, epoch=2)],
        },
        done={
            A: [done(0, 1, [1], 1, 2, 2, 20, GATEWAY), done(0, 2, [1], 501, 503, 503, 520, GATEWAY, epoch=2)],
            GATEWAY: [done(1, 1, [1], 21, 22, 22, 23, A), done(1, 2, [1], 521, 525, 525, 530, A, epoch=2)],
        },
    )  # fmt: skip
    path = Causes(again).critical_path(1)
    assert Stretch("recovery", GATEWAY, 23, 500) in path
    assert sum(stretch.ns for stretch in path) == 530


def test_records_that_are_missing_are_said_to_be() -> None:
    """Report a time whose records are missing as unknown."""
    holes = by_hand()
    del holes.sent[A]
    assert Causes(holes).critical_path(2)[0] == Stretch("unknown", EDGES[1], 0, 280)
    assert critical_path.idle(holes)["actors"][1]["known"] == pytest.approx(20 / 30)


def test_a_session_that_is_not_there() -> None:
    """Refuse a session that is not in the trace, and list those that are."""
    with pytest.raises(TraceError, match="by-hand: session 5 is not in this trace; there are 1, 2"):
        Causes(by_hand()).critical_path(5)


SIXTEEN = [list(range(3, 3 + length)) for length in range(1, 17)]
"""Prompts of 16 sessions, which are enough for batches to be cut at the source."""


@pytest.fixture(scope="module")
def run_dir(streamed: Callable[..., Path]) -> Iterator[Path]:
    """Provide the folder of a run with 16 sessions over four actors."""
    place = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))
    yield streamed(place, SIXTEEN, 12)
    shutil.rmtree(place)


def test_what_is_cut_at_the_source_stays_cut(run_dir: Path) -> None:
    """Keep the batches of two stages as the source has cut them.

    No actor ever has more than half of the sessions in one step, while its neighbour is idle."""
    read = summary.read(run_dir)
    most = -(-len(SIXTEEN) // min(2, len(os.sched_getaffinity(0))))
    for actor in ("embed.0", "lower.0", "upper.0", "head.0"):
        steps: dict[int, set[int]] = {}
        for record in read.in_steps(actor):
            steps.setdefault(record.started_ns, set()).update(row[0] for row in record.rows)
        assert 1 < max(map(len, steps.values())) <= most


def test_a_sample_is_whole_requests_at_both_ends(streamed: Callable[..., Path], runs: Path) -> None:
    """Record the sampled sessions completely, at both ends.

    Each of them can be explained like any session. Other sessions are recorded only in messages that they share with
    one."""
    read = summary.read(streamed(runs, SIXTEEN, 12, trace={"sample": 0.2}))
    assert read.sample == 0.2
    sent = {summary.sent_key(actor, record) for actor, own in read.sent.items() for record in own}
    done = {summary.done_key(actor, record) for actor, own in read.done.items() for record in own}
    assert sent == done
    chosen = {session for session in range(1, 17) if (session * 2654435761 & 0xFFFFFFFF) < 0.2 * 2**32}
    assert 1 <= len(chosen) <= 6
    for own in (*read.sent.values(), *read.done.values()):
        assert all(chosen & {row[0] for row in record.rows} for record in own)
    for session in chosen:
        path = Causes(read).critical_path(session)
        assert all(one.ended_ns == other.began_ns for one, other in pairwise(path))
        assert all(stretch.cause != "unknown" for stretch in path)
    assert "the messages of 20.00% of all sessions" in table.of_summary(summary.summary(read))
    with pytest.raises(TraceError, match=r"has records of 20.00% of the sessions; idle times need all"):
        critical_path.idle(read)


def test_a_file_that_may_get_no_longer(tmp_path: Path) -> None:
    """Count the records that no longer fit into a trace file, and write the count into it."""
    (tmp_path / "trace").mkdir()
    with TraceFile(tmp_path, "a.0", most_bytes=2000) as file:
        for number in range(100):
            file.write([(SENT, 0, number, 8, 1, 2, 3, 0, [[1, 1, 0, 1]], None, "b.0.1")], 0)
    lines = (tmp_path / "trace" / "a.0.jsonl").read_text().splitlines()
    assert sum(map(len, lines)) < 2200
    kept = [json.loads(line) for line in lines[1:]]
    assert 5 < len(kept) < 100
    assert kept[-1] == [DROPPED, 100 - (len(kept) - 1)]


def test_the_causes_of_real_requests_add_up(run_dir: Path) -> None:
    """Cover each of 16 requests without a gap, from the first message to the last answer."""
    read = summary.read(run_dir)
    found = Causes(read)
    assert len(found.sessions) == 16
    for session in found.sessions:
        path = found.critical_path(session)
        assert all(one.ended_ns == other.began_ns for one, other in pairwise(path))
        asked = min(r.ready_ns for r in read.sent[GATEWAY] if any(row[0] == session for row in r.rows))
        answered = max(r.finished_ns for r in read.done[GATEWAY] if any(row[0] == session for row in r.rows))
        assert path[0].began_ns == asked
        assert path[-1].ended_ns == answered
        assert all(stretch.ns > 0 and stretch.cause != "unknown" for stretch in path)
        computed = {stretch.where for stretch in path if stretch.cause == "compute"}
        assert computed == {GATEWAY, "embed.0", "lower.0", "upper.0", "head.0"}
        assert sum(stretch.cause == "compute" and stretch.where == "head.0" for stretch in path) >= 12


def test_the_parts_of_every_message_add_up(run_dir: Path) -> None:
    """Split the time of each message, from ready to finished, into parts that add up to it within 1 %."""
    read, whole = summary.read(run_dir), 0
    for sender, record, parts in summary.messages(read):
        assert sender is not None and parts.keys() == set(summary.PARTS)
        assert all(spent_ns >= 0 for spent_ns in parts.values())
        took_ns = record.finished_ns - sender.ready_ns
        assert abs(sum(parts.values()) - took_ns) <= took_ns // 100
        assert sender.tensors[0][4] == record.nbytes
        whole += 1
    assert whole == sum(map(len, read.sent.values())) > 100


def test_every_output_was_made_by_a_step_that_is_in_the_trace(run_dir: Path) -> None:
    """Attribute every output to a step of the trace, even if one message's rows ran in several steps."""
    read = summary.read(run_dir)
    for actor, records in read.sent.items():
        if actor != GATEWAY:
            assert {record.ready_ns for record in records} <= {step.finished_ns for step in Causes(read).steps[actor]}
    for actor in read.parts:  # no row is in two steps
        rows = [(record.edge, *row) for record in read.in_steps(actor) for row in record.rows]
        assert len(rows) == len(set(rows))


def test_a_message_whose_rows_go_into_two_steps() -> None:
    """Give each of two steps its own rows of a message.

    The record of the first step is of kind `part`."""
    ring = Ring()
    records = Records(ring)
    rows = tuple(Row(session, 1, 7, 1) for session in (1, 2, 3))
    received: Any = SimpleNamespace(
        header=SimpleNamespace(edge=1, sequence=4, sent_ns=5, rows=rows), nbytes=24, received_ns=6,
        link=SimpleNamespace(peer="a.0.1"),
    )  # fmt: skip
    records.part(
        received, 10, 20, 1, (rows[1], Row(9, 1, 0, 4))
    )  # the second row, in a step with a row of another message
    records.done(received, 30, 40, 1)
    (kind, *first), (other, *last) = ring.take(9)
    assert (kind, other) == (PART, DONE)
    cut = Trace(Path("cut"), EDGES, done={B: [DoneLine(*last)]}, parts={B: [DoneLine(*first)]})
    found = {
        step.started_ns: [row[0] for record in step.inputs for row in record.rows] for step in Causes(cut).steps[B]
    }
    assert found == {10: [2], 30: [1, 3]}


def test_idle_times_have_causes(run_dir: Path) -> None:
    """Explain at least 95 % of each actor's idle time, with causes that add up."""
    told = critical_path.idle(summary.read(run_dir))
    assert {actor["actor"] for actor in told["actors"]} == {"embed.0", "lower.0", "upper.0", "head.0"}
    for actor in told["actors"]:
        assert sum(each["ms"] for each in actor["causes"]) == pytest.approx(actor["idle_ms"])
        assert actor["known"] >= 0.95
        assert 0 < actor["idle_ms"] < actor["ms"]


def test_what_is_printed(run_dir: Path) -> None:
    """Print the causes of a request's time and of idle times."""
    read = summary.read(run_dir)
    text = table.of_path(critical_path.why(read, 3))
    assert text.startswith("session 3: ") and "compute   upper.0" in text
    assert "upper.0 had nothing to do for" in table.of_idle(critical_path.idle(read))


def test_the_command(run_dir: Path, tmp_path: Path) -> None:
    """Answer `--why`, `--diff`, `--plot` and `--idle` on the command line."""

    def said(*more: str) -> str:
        command = [sys.executable, "-m", "ranvier", "trace", str(run_dir), *more]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert json.loads(said("--why", "3", "--json"))["session"] == 3
    assert "no median changed by" in said("--diff", str(run_dir))
    said("--plot", str(tmp_path / "page.svg"))
    page = (tmp_path / "page.svg").read_text()
    for word in ("upper.0", "lower.hidden -&gt; upper.hidden", "bytes sent", "latency"):
        assert f"<!-- {word} -->" in page, word
    assert json.loads(said("--diff", str(run_dir), "--json"))["changes"] == []
    assert {each["actor"] for each in json.loads(said("--idle", "--json"))["actors"]} >= {"upper.0"}
