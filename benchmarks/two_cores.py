"""Measure what a second core gains: two stages on two cores with 16 streams against one stage on one core with 8.

Both have batches of 8 rows. With bfloat16 each batch reads 270 MB of weights, and both cores share the memory. `stored`
(Q4_1) reads a third of that.
"""

from __future__ import annotations

from functools import partial

from contestants import ONE, TWO, Makers, in_turn, ours
from report import Answer, Goal

WEIGHTS = ("bfloat16", "stored")


def ask(rounds: int) -> Answer:
    makers: Makers = {
        **{f"two stages, two cores, 16, {w}": partial(ours, TWO, 16, weights=w) for w in WEIGHTS},
        **{f"one stage, one core, 8, {w}": partial(ours, ONE, 8, weights=w, cores=[0]) for w in WEIGHTS},
    }
    goals = [Goal(f"two stages, two cores, 16, {w}", f"one stage, one core, 8, {w}", 1.85) for w in WEIGHTS]
    return Answer("tokens/s", in_turn(makers, rounds), goals)
