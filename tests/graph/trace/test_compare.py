"""Find what changed between two runs, in the order of its cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranvier.graph.trace import compare, summary, table
from ranvier.graph.trace.summary import Trace
from ranvier.graph.trace.trace_lines import DoneLine, SentLine


def run(name: str, *, wire_us: int, compute_us: int, credit_us: int = 0, more: bool = False) -> dict[str, Any]:
    """Return a summary of ten messages from a to b with these times."""
    sent, done = [], []
    for number in range(10):
        ready = number * 1_000_000
        left = ready + credit_us * 1000
        came = left + wire_us * 1000
        rows = [[1, 1, number, 2]]
        sent.append(SentLine(0, number, 8, ready, left, left, rows, None, "b.0.1"))
        done.append(DoneLine(0, number, 8, left, came, came, came + compute_us * 1000, 1, rows, "a.0.1"))
    actors = {"b.0": done, **({"c.0": done} if more else {})}
    return summary.summary(Trace(Path(name), ["a.y -> b.x"], sent={"a.0": sent}, done=actors))


def test_the_largest_change_comes_first() -> None:
    """List the largest change first."""
    before, after = run("one", wire_us=100, compute_us=2000), run("two", wire_us=150, compute_us=3000, credit_us=700)
    told = compare.compare(before, after)
    assert [(each["where"], each["part"], each["p50_us"], each["total_ms"]) for each in told["changes"]] == [
        ("b.0", "compute", [2000.0, 3000.0], 10.0), ("a.y -> b.x", "credit", [0.0, 700.0], 7.0),
        ("a.y -> b.x", "wire", [100.0, 150.0], 0.5),
    ]  # fmt: skip
    text = table.of_changes(told)
    assert "b.0         compute        2000 ->      3000 µs (1.5 times), +10.0 ms over 10" in text
    assert "(new), +7.0 ms over 10" in text


def test_what_is_as_it_was_and_what_is_not_there() -> None:
    """Leave out changes below 10 % or 5 µs, and list the actors that only one of the runs has."""
    same = compare.compare(run("one", wire_us=100, compute_us=2000), run("two", wire_us=104, compute_us=2010))
    assert same["changes"] == []
    assert "no median changed by at least 10% and 5 µs" in table.of_changes(same)
    other = compare.compare(run("one", wire_us=1, compute_us=1), run("two", wire_us=1, compute_us=1, more=True))
    assert (other["only_before"], other["only_after"]) == ([], ["c.0"])
