"""Measure whether slow clients delay others: 200 clients of `ranvier serve`, of which 20 read little at a time.

The figure is the 99th percentile of the gaps between two texts of the other 180 clients, in milliseconds, against 200 clients
that all read at once. Beside it, by how many MiB the memory of the server's process has grown at most. Each token comes with
the log-probabilities of five others, so that an answer is larger than what the system keeps for a slow reader.
"""

from __future__ import annotations

from functools import partial

from contestants import PROMPT, Makers, in_turn
from report import Answer, Goal
from served import asking, served

CLIENTS, SLOW = 200, 20


def ask(rounds: int) -> Answer:
    body = {"prompt": PROMPT, "max_tokens": 32, "logprobs": 5}
    makers: Makers = {
        f"{figure}, {slow} slow": partial(served, asking(CLIENTS, "/v1/completions", body, slow), figure)
        for figure in ("gap_ms", "server_mib")
        for slow in (0, SLOW)
    }
    goals = [
        Goal(f"{figure}, {SLOW} slow", f"{figure}, 0 slow", bound, less=True)
        for figure, bound in (("gap_ms", 1.1), ("server_mib", None))
    ]
    return Answer("milliseconds, or MiB", in_turn(makers, rounds), goals)
