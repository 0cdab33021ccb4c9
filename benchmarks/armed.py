"""Measure what recovery costs while nothing is lost: the default against `restart: never`, one and sixteen streams.

The streams go through four actors that are bound to their cores. As in tracing.py, there are three times as many rounds
as asked for.
"""

from __future__ import annotations

from functools import partial

from contestants import Makers, in_turn, ours
from report import Answer, Goal
from tracing import BOUND


def ask(rounds: int) -> Answer:
    makers: Makers = {
        f"{how}, {streams} streams": partial(ours, BOUND, streams, **({"restart": "never"} if how == "never" else {}))
        for streams in (1, 16)
        for how in ("armed", "never")
    }
    goals = [Goal(f"armed, {streams} streams", f"never, {streams} streams", 0.98) for streams in (1, 16)]
    return Answer("tokens/s", in_turn(makers, 3 * rounds), goals)
