"""Measure sixteen streams on two cores: the splits that Ranvier offers against one process with two threads.

The splits are two stages, two replicas, and four actors, with one thread per actor. They are compared at the same
weights, and also the best with the best.
"""

from __future__ import annotations

from functools import partial

from contestants import FOUR, ONE, TWO, Makers, in_turn, ours
from report import Answer, Goal

SPLITS = {"two stages": TWO, "two replicas": {"model": {"kind": "model", "replicas": 2}}, "four actors": FOUR}
WEIGHTS = ("bfloat16", "stored")


def ask(rounds: int) -> Answer:
    makers: Makers = {
        **{f"{name}, {w}": partial(ours, split, 16, weights=w) for w in WEIGHTS for name, split in SPLITS.items()},
        **{f"one process, two threads, {w}": partial(ours, ONE, 16, threads=2, weights=w) for w in WEIGHTS},
    }
    splits = {w: [f"{name}, {w}" for name in SPLITS] for w in WEIGHTS}
    threads = {w: f"one process, two threads, {w}" for w in WEIGHTS}
    goals = [
        Goal([name for w in WEIGHTS for name in splits[w]], list(threads.values()), 1.1),
        *(Goal(splits[w], threads[w]) for w in WEIGHTS),
    ]
    return Answer("tokens/s", in_turn(makers, rounds), goals)
