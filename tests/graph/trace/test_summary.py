"""Check that the trace of a real run is complete and in order."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ranvier.graph.trace import summary, table
from ranvier.graph.trace.trace_lines import Lines, TraceError


@pytest.fixture(scope="module")
def run_dir(streamed: Callable[..., Path]) -> Iterator[Path]:
    """Provide the folder of a run with three sessions at once over four actors."""
    place = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))
    yield streamed(place, ([1, 2, 3], list(range(20)), [7]), 10)
    shutil.rmtree(place)


def test_every_message_left_a_record_at_both_ends(run_dir: Path) -> None:
    """Record every message at both ends, in order on its edge, with times that go forward."""
    read = summary.read(run_dir)
    sent = {(r.edge, r.sequence): r for records in read.sent.values() for r in records}
    done = {(r.edge, r.sequence): r for records in read.done.values() for r in records}
    assert sent.keys() == done.keys()
    assert len(sent) == sum(map(len, read.sent.values())) == sum(map(len, read.done.values()))
    assert not read.dropped
    for key, end in done.items():
        begin = sent[key]
        assert begin.ready_ns <= begin.credit_ns <= begin.sent_ns == end.sent_ns
        assert end.sent_ns <= end.received_ns <= end.started_ns <= end.finished_ns
        assert (begin.nbytes, [list(r) for r in begin.rows]) == (end.nbytes, [list(r) for r in end.rows])
    for edge in range(len(read.edges)):
        sequences = sorted(sequence for e, sequence in sent if e == edge)
        assert sequences == list(range(1, len(sequences) + 1))


def test_every_control_message_left_a_record_at_both_ends(run_dir: Path) -> None:
    """Record the control messages of links at both ends.

    At most 10 % are missing at the receiver, because they arrived after it had ended."""
    read = summary.read(run_dir)
    sent, heard = Counter[Any](), Counter[Any]()
    for actor, records in read.control.items():
        for record in records:
            ends = (actor, record.peer.rpartition(".")[0])
            if record.sent:
                sent[record.edge, record.verb, *ends] += 1
            else:
                heard[record.edge, record.verb, *reversed(ends)] += 1
    assert {verb for _, verb, *_ in sent} >= {"hello", "welcome", "ack"}
    assert heard <= sent
    assert sum((sent - heard).values()) <= 0.1 * sent.total()
    for way in summary.summary(read)["control"]:
        assert sum(way["messages"].values()) > 0


def test_every_command_left_a_record(run_dir: Path) -> None:
    """Record every command of the supervisor.

    Each host is connected first, opens each session before its first step, closes it after its last step, and is
    stopped last."""
    read = summary.read(run_dir)
    assert read.commands.keys() == {"embed.0", "lower.0", "upper.0", "head.0"}
    for actor, told in read.commands.items():
        for one in told:
            assert one.sent_ns <= one.received_ns <= one.started_ns <= one.finished_ns
        obeyed = [(one.verb, one.session) for one in told]
        assert obeyed[0] == ("connect", 0) and obeyed[-1] == ("stop", 0)
        assert sorted(obeyed[1:-1]) == [(verb, session) for verb in ("close", "open") for session in (1, 2, 3)]
        for one in told:
            steps = [step.started_ns for step in read.in_steps(actor) if one.session in {row[0] for row in step.rows}]
            assert one.verb != "open" or (one.epoch == 1 and one.finished_ns <= min(steps))
            assert one.verb != "close" or one.started_ns >= max(steps)
    numbers = [
        (told["command"], told["number"]) for told in summary.summary(read)["commands"] if told["actor"] == "head.0"
    ]
    assert numbers == [("close", 3), ("connect", 1), ("open", 3), ("stop", 1)]


def test_every_position_of_every_session_is_in_it(run_dir: Path) -> None:
    """Record each position of each session exactly once on the edge between the two groups."""
    read = summary.read(run_dir)
    edge = read.edges.index("lower.hidden -> upper.hidden")
    positions: Counter[tuple[int, int]] = Counter()
    for record in read.done["upper.0"]:
        if record.edge == edge:
            for session, epoch, position, tokens in record.rows:
                assert epoch == 1
                positions.update((session, position + offset) for offset in range(tokens))
    assert sorted(Counter(session for session, _ in positions).values()) == [10, 12, 29]
    assert set(positions.values()) == {1}


def test_the_summary_adds_up(run_dir: Path) -> None:
    """Sum up bytes and times per edge, and name every actor."""
    told = summary.summary(summary.read(run_dir))
    by_name = {edge["edge"]: edge for edge in told["edges"]}
    hidden = by_name["lower.hidden -> upper.hidden"]
    assert hidden["bytes"] == (12 + 29 + 10) * 48 * 4
    assert by_name["head.sampled -> gateway.sampled"]["bytes"] == 30 * 8
    assert set(hidden["microseconds"]) == {"serialise", "credit", "wire", "join", "queue", "compute"}
    assert all(part["p50"] <= part["p95"] <= part["p99"] for part in hidden["microseconds"].values())
    assert {actor["actor"] for actor in told["actors"]} == {"embed.0", "lower.0", "upper.0", "head.0", "gateway.0"}
    text = table.of_summary(told)
    for word in ("lower.hidden -> upper.hidden", "tokens per step", "gateway.0"):
        assert word in text


def test_the_end_of_a_long_file_is_read_alone(run_dir: Path) -> None:
    """Read the last lines of a file, whole ones only, wherever the reading begins, and then every new line."""
    every = list(Lines(run_dir).read())
    for last_bytes in (0, 1, 200, 3000, 10**6):
        lines = Lines(run_dir, last_bytes)
        found = list(lines.read())
        assert lines.heads.keys() == set((run_dir / "trace").glob("*.jsonl"))
        for actor in {actor for actor, *_ in every}:
            own = [each for each in every if each[0] == actor]
            last = [each for each in found if each[0] == actor]
            assert last == own[len(own) - len(last) :]
            assert len(last) in (0, 1) if last_bytes < 2 else len(last) > 0
        assert last_bytes < 10**6 or len(found) == len(every)
        assert not list(lines.read())


def test_a_line_that_was_cut_off_is_left_out(run_dir: Path, tmp_path: Path) -> None:
    """Read the trace of a killed process without its incomplete last line."""
    for part in ("plan.json", "trace"):
        target = tmp_path / part
        if part == "trace":
            target.mkdir()
            for file in (run_dir / part).iterdir():
                (target / file.name).write_bytes(file.read_bytes()[:-7])
        else:
            target.write_bytes((run_dir / part).read_bytes())
    assert summary.summary(summary.read(tmp_path))["edges"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no run folder"),
        (lambda p: ((p / "plan.json").write_text('{"edges": []}'), (p / "trace").mkdir()), "holds no records"),
        (
            lambda p: (
                (p / "plan.json").write_text('{"edges": []}'),
                (p / "trace").mkdir(),
                (p / "trace" / "a.jsonl").write_text("x\n"),
            ),
            "expected a first line that names the actor",
        ),
    ],
)
def test_no_trace(make: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    """Refuse a folder without a trace, and say what is missing."""
    make(tmp_path)
    with pytest.raises(TraceError, match=words):
        summary.read(tmp_path)


def test_percentiles_by_nearest_rank() -> None:
    """Take percentiles by nearest rank, and None if there are no values."""
    assert summary.percentiles(range(1, 101)) == {"p50": 50, "p95": 95, "p99": 99}
    assert summary.percentiles([7.0]) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}
    assert summary.percentiles([]) == {"p50": None, "p95": None, "p99": None}
