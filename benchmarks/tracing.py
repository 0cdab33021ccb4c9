"""What the trace of every message costs: one and sixteen streams through four actors, with it and without.

The actors are bound to their cores, since where the system places four of them on two moves the figure by a third. Every figure
is of processes of its own, the mean of some measures in them: two that are there for the whole time differ by more than what is
asked for, whichever of them traces, by where their memory happens to lie; and sixteen streams fall into batches by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean

import report
from contestants import Contestant, ours
from report import Answer, Goal

BOUND = {
    "embed": {"kind": "embedding", "cpus": [0]},
    "lower": {"kind": "blocks", "layers": "0-18", "cpus": [0]},
    "upper": {"kind": "blocks", "layers": "19-29", "cpus": [1]},
    "head": {"kind": "head", "cpus": [1]},
}
MEASURES = {1: 3, 16: 5}


def fresh(make: Callable[[], Contestant], measures: int) -> float:
    """The mean of some measures of processes that are made for them."""
    contestant = make()
    try:
        return mean(contestant.measure() for _ in range(measures))
    finally:
        contestant.close()


def ask(rounds: int) -> Answer:
    figures = report.in_turn(
        {
            f"trace {how}, {streams} streams": partial(
                fresh, partial(ours, BOUND, streams, trace=how == "on"), MEASURES[streams]
            )
            for streams in (1, 16)
            for how in ("on", "off")
        },
        3 * rounds,
    )
    goals = [Goal(f"trace on, {streams} streams", f"trace off, {streams} streams", 0.98) for streams in (1, 16)]
    return Answer("tokens/s", figures, goals)
