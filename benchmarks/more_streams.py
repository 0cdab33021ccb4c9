"""Measure whether more streams at once ever give fewer tokens per second: 1, 4, 16 and 64 through two stages.

The weights are bfloat16, and each stage has one thread. A note shows how long each stream waits for a token.
"""

from __future__ import annotations

import itertools
import statistics
from functools import partial

from contestants import TWO, Makers, in_turn, ours
from report import Answer, Goal

STREAMS = (1, 4, 16, 64)


def ask(rounds: int) -> Answer:
    makers: Makers = {f"{count} streams": partial(ours, TWO, count) for count in STREAMS}
    figures = in_turn(makers, rounds)
    waits = {count: 1000 * count / statistics.median(figures[f"{count} streams"]) for count in STREAMS}
    return Answer(
        "tokens/s",
        figures,
        [Goal(f"{more} streams", f"{fewer} streams", 1.0) for fewer, more in itertools.pairwise(STREAMS)],
        ["milliseconds per token of one stream: " + ", ".join(f"{count}: {wait:.1f}" for count, wait in waits.items())],
    )
