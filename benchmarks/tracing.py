"""What the trace of every message costs: sixteen streams through four actors, with it and without.

The actors are bound to their cores, since where the system places four of them on two moves the figure by a third; and
there are three times as many rounds as asked for: the difference is smaller than the machine's own unrest.
"""

from __future__ import annotations

from contestants import in_turn, ours
from report import Answer, Goal

BOUND = {
    "embed": {"kind": "embedding", "cpus": [0]},
    "lower": {"kind": "blocks", "layers": "0-18", "cpus": [0]},
    "upper": {"kind": "blocks", "layers": "19-29", "cpus": [1]},
    "head": {"kind": "head", "cpus": [1]},
}


def ask(rounds: int) -> Answer:
    makers = {"trace on": lambda: ours(BOUND, 16), "trace off": lambda: ours(BOUND, 16, trace=False)}
    return Answer("tokens/s", in_turn(makers, 3 * rounds), [Goal("trace on", "trace off", 0.98)])
