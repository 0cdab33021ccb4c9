"""Measure how soon the first token comes after a prompt of 2,000: two stages against transformers with two threads.

The weights are bfloat16. Each stage has fifteen layers, so that both have the same work with a prompt: the head
computes only on its last token.
"""

from __future__ import annotations

from contestants import PROMPT, in_turn, ours, transformers
from report import Answer, Goal

LONG = [PROMPT[i % len(PROMPT)] for i in range(2000)]
HALVES = {"first": {"kind": "first_stage", "layers": "0-14"}, "last": {"kind": "last_stage", "layers": "15-29"}}


def ask(rounds: int) -> Answer:
    makers = {
        "two stages": lambda: ours(HALVES, 1, prompt=LONG, new=1),
        "transformers, 2 threads": lambda: transformers(2, 1, LONG, 1),
    }
    return Answer("first tokens/s", in_turn(makers, rounds), [Goal("two stages", "transformers, 2 threads", 1.3)])
