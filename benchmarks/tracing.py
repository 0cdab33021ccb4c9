"""Measure what the trace of every message costs, without and with `--record all`: one and sixteen streams, four actors.

The actors are bound to their cores, because the way in which the system places four actors on two cores changes the
figure by a third. Every figure comes from new processes, and is the mean of several measurements in them. Two
contestants that live for the whole time differ by more than tracing costs, whichever of them traces, because of where
their memory happens to lie. The processor time per token is reported, too: it shows the cost of tracing even where
nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any

import report
from contestants import NEW, Contestant, ours
from report import Answer, Goal

BOUND = {
    "embed": {"kind": "embedding", "cpus": [0]},
    "lower": {"kind": "blocks", "layers": "0-18", "cpus": [0]},
    "upper": {"kind": "blocks", "layers": "19-29", "cpus": [1]},
    "head": {"kind": "head", "cpus": [1]},
}
MEASURES = {1: 3, 16: 5}
CPU = "CPU ms a token"
HOW: dict[str, dict[str, Any]] = {
    "on": {"trace": True},
    "off": {"trace": False},
    "and record on": {"trace": True, "record": {"megabytes": 4096}},
}


class Fresh:
    """Measure each figure with new processes."""

    def __init__(self, make: Callable[[], Contestant], streams: int) -> None:
        self._make, self._streams = make, streams
        self._cpu_s_a_token = 0.0

    def speed(self) -> float:
        """Return tokens per second, the mean of several measurements."""
        contestant, measures = self._make(), MEASURES[self._streams]
        try:
            before_s = contestant.cpu_s()
            speed = mean(contestant.measure() for _ in range(measures))
            self._cpu_s_a_token = (contestant.cpu_s() - before_s) / (measures * self._streams * NEW)
        finally:
            contestant.close()
        return speed

    def cpu_ms(self) -> float:
        """Return the processor time per token in milliseconds, from the same measurements."""
        return self._cpu_s_a_token * 1e3


def ask(rounds: int) -> Answer:
    turns: dict[str, Callable[[], float]] = {}
    goals = []
    for streams in (1, 16):
        for how, settings in HOW.items():
            each = Fresh(partial(ours, BOUND, streams, **settings), streams)
            turns[f"trace {how}, {streams} streams"] = each.speed
            turns[f"trace {how}, {streams} streams: {CPU}"] = each.cpu_ms
        for how, bound in (("on", 0.98), ("and record on", None)):
            mine, theirs = f"trace {how}, {streams} streams", f"trace off, {streams} streams"
            goals += [
                Goal(mine, theirs, bound),
                Goal(f"{mine}: {CPU}", f"{theirs}: {CPU}", 1.02 if bound else None, less=True),
            ]
    return Answer("tokens/s", report.in_turn(turns, 3 * rounds), goals)
