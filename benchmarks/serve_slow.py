"""Measure whether slow clients delay others: 200 clients of `ranvier serve`, of which 20 read little at a time.

The figure is the 99th percentile of the gaps between two texts of the other 180 clients, in milliseconds, against 200 clients
that all read at once.
"""

from __future__ import annotations

from functools import partial

from contestants import PROMPT, Makers, in_turn
from report import Answer, Goal
from served import asking, served

CLIENTS, SLOW = 200, 20


def ask(rounds: int) -> Answer:
    body = {"prompt": PROMPT, "max_tokens": 32}
    makers: Makers = {
        f"{CLIENTS} clients, {slow} slow": partial(served, asking(CLIENTS, "/v1/completions", body, slow), "gap_ms")
        for slow in (0, SLOW)
    }
    slow, none = f"{CLIENTS} clients, {SLOW} slow", f"{CLIENTS} clients, 0 slow"
    return Answer("milliseconds", in_turn(makers, rounds), [Goal(slow, none, 1.1, less=True)])
