"""Measure whether more streams at once give more tokens per second: 1, 4, 16 and 64 through two stages.

The weights are bfloat16, or `stored` (Q4_1). The stages have a process each with one thread, or share one with two; the better
cut counts for each number of streams. A note shows how long each stream waits for a token. 64 streams should give 1.5 times
the tokens of 16 where the processor has AMX; without it, not fewer.
"""

from __future__ import annotations

import itertools
import statistics
from functools import partial

import report
from contestants import TWO, Makers, in_one_host, in_turn, ours
from report import Answer, Goal

STREAMS = (1, 4, 16, 64)
WEIGHTS = ("bfloat16", "stored")
CUTS = {"two processes": (TWO, 1), "one process": (in_one_host(TWO), 2)}


def ask(rounds: int) -> Answer:
    makers: Makers = {
        f"{count} streams, {w}, {name}": partial(ours, cut, count, weights=w, threads=threads)
        for w in WEIGHTS for count in STREAMS for name, (cut, threads) in CUTS.items()
    }  # fmt: skip

    def best(count: int, weights: str) -> list[str]:
        return [f"{count} streams, {weights}, {name}" for name in CUTS]

    figures = in_turn(makers, rounds)
    amx = "amx_bf16" in report.machine()["vectors"]
    goals = [
        Goal(best(more, w), best(fewer, w), 1.5 if more == 64 and amx else 1.0)
        for w in WEIGHTS for fewer, more in itertools.pairwise(STREAMS)
    ]  # fmt: skip
    waits = [
        f"{name}: {1000 * int(name.split()[0]) / statistics.median(values):.1f}" for name, values in figures.items()
    ]
    return Answer("tokens/s", figures, goals, ["milliseconds per token of one stream: " + "; ".join(waits)])
