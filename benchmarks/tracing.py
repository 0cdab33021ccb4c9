"""What the trace of every message costs, and `--record all` besides: one and sixteen streams through four actors.

The actors are bound to their cores, since where the system places four of them on two moves the figure by a third. Every figure
is of processes of its own, the mean of some measures in them: two that are there for the whole time differ by more than what is
asked for, whichever of them traces, by where their memory happens to lie. The processor time of a token is told, too: it is
what tracing takes, whether or not somebody waits for it.
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
    """A figure is of processes that are made for it."""

    def __init__(self, make: Callable[[], Contestant], streams: int) -> None:
        self._make, self._streams = make, streams
        self._cpu_s_a_token = 0.0

    def speed(self) -> float:
        """Tokens a second, the mean of some measures."""
        contestant, measures = self._make(), MEASURES[self._streams]
        try:
            before_s = contestant.cpu_s()
            speed = mean(contestant.measure() for _ in range(measures))
            self._cpu_s_a_token = (contestant.cpu_s() - before_s) / (measures * self._streams * NEW)
        finally:
            contestant.close()
        return speed

    def cpu_ms(self) -> float:
        """Processor time of a token, of the same measures."""
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
