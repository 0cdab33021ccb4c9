"""What the trace of every message costs: sixteen streams through four actors, with it and without.

Three times as many rounds as asked for: the difference is smaller than the machine's own unrest.
"""

from __future__ import annotations

from contestants import FOUR, in_turn, ours
from report import Answer, Goal


def ask(rounds: int) -> Answer:
    makers = {"trace on": lambda: ours(FOUR, 16), "trace off": lambda: ours(FOUR, 16, trace=False)}
    return Answer("tokens/s", in_turn(makers, 3 * rounds), [Goal("trace on", "trace off", 0.98)])
