"""Measure what a cut costs one stream: four actors, in one process or in four, and sixteen in sixteen, against one actor.

Each side runs with one and with two threads per actor, and the better result counts.
"""

from __future__ import annotations

from functools import partial

from contestants import FOUR, ONE, Makers, cut_into, in_one_host, in_turn, ours
from report import Answer, Goal

WEIGHTS = ("bfloat16", "stored")
CUTS = {"four actors, one process": in_one_host(FOUR), "four processes": FOUR, "sixteen processes": cut_into(16)}
BOUNDS = {"four actors, one process": 0.97, "four processes": None, "sixteen processes": 0.65}


def ask(rounds: int) -> Answer:
    makers: Makers = {
        f"{name}, {w}, {threads} threads": partial(ours, cut, 1, weights=w, threads=threads)
        for w in WEIGHTS
        for name, cut in {**CUTS, "one actor": ONE}.items()
        for threads in (1, 2)
    }

    def either(name: str, weights: str) -> list[str]:
        return [f"{name}, {weights}, {threads} threads" for threads in (1, 2)]

    return Answer(
        "tokens/s",
        in_turn(makers, rounds),
        [
            Goal(either(name, w), either("one actor", w), None if (w, name) == ("bfloat16", "sixteen processes") else bound)
            for w in WEIGHTS for name, bound in BOUNDS.items()
        ],
    )  # fmt: skip
