"""2,000 tokens in, one out: how soon the first token comes, two stages against transformers with two threads.

bfloat16; two groups of fifteen layers, so that both stages have the same to do with a prompt (the head sees its last token).
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
