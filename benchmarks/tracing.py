"""What the trace of every message costs: one and sixteen streams through four actors, with it and without.

The actors are bound to their cores, since where the system places four of them on two moves the figure by a third; and
there are three times as many rounds as asked for: the difference is smaller than the machine's own unrest, with sixteen
streams by far (they fall into batches by chance), so that one stream's figure says more.
"""

from __future__ import annotations

from functools import partial

from contestants import Makers, in_turn, ours
from report import Answer, Goal

BOUND = {
    "embed": {"kind": "embedding", "cpus": [0]},
    "lower": {"kind": "blocks", "layers": "0-18", "cpus": [0]},
    "upper": {"kind": "blocks", "layers": "19-29", "cpus": [1]},
    "head": {"kind": "head", "cpus": [1]},
}


def ask(rounds: int) -> Answer:
    makers: Makers = {
        f"trace {how}, {streams} streams": partial(ours, BOUND, streams, trace=how == "on")
        for streams in (1, 16)
        for how in ("on", "off")
    }
    goals = [Goal(f"trace on, {streams} streams", f"trace off, {streams} streams", 0.98) for streams in (1, 16)]
    return Answer("tokens/s", in_turn(makers, 3 * rounds), goals)
