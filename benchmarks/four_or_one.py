"""Measure what the cut costs one stream: four actors against the same model as one actor.

The weights are bfloat16. Each side runs with one and with two threads per actor, and the better result counts.
"""

from __future__ import annotations

from functools import partial

from contestants import FOUR, ONE, Makers, in_turn, ours
from report import Answer, Goal


def ask(rounds: int) -> Answer:
    cuts = {"four actors": FOUR, "one actor": ONE}
    makers: Makers = {
        f"{name}, {threads} threads": partial(ours, cut, 1, threads=threads)
        for name, cut in cuts.items()
        for threads in (1, 2)
    }
    four, one = ([f"{name}, {threads} threads" for threads in (1, 2)] for name in cuts)
    return Answer(
        "tokens/s",
        in_turn(makers, rounds),
        [Goal(four, one, 0.95), *(Goal(f, o) for f, o in zip(four, one, strict=True))],
    )
