"""Compare `ranvier serve` with llama.cpp's server: 16 clients, the same file, two cores.

Both get prompts of 11 token ids, and make 64 tokens each. llama.cpp's server has two threads, a slot for each client, and the
file as Q4_1 and as Q4_0, which it repacks. The figure is tokens per second of whole requests. Notes give the median time to the
first text, and the 99th percentile of the gaps between two texts.
"""

from __future__ import annotations

import statistics
from functools import partial

from contestants import NEW, PROMPT, Makers, in_turn
from report import Answer, Goal
from served import asking, llama_server, served

STREAMS = 16
OTHERS = {"first_ms": "median milliseconds to the first text", "gap_ms": "99th percentile of gaps in milliseconds"}


def ask(rounds: int) -> Answer:
    asked = asking(STREAMS, "/v1/completions", {"prompt": PROMPT, "max_tokens": NEW})

    def makers(figure: str) -> Makers:
        return {
            "ranvier serve": partial(served, asked, figure),
            **{
                f"llama-server, {form}": partial(llama_server, form, STREAMS, asked, figure)
                for form in ("Q4_1", "Q4_0")
            },
        }

    notes = []
    for figure, words in OTHERS.items():
        found = in_turn(makers(figure), rounds)
        shown = "; ".join(f"{name} {statistics.median(values):.1f}" for name, values in found.items())
        notes.append(f"{words}: {shown}")
    peers = [name for name in makers("tokens_s") if name.startswith("llama")]
    return Answer("tokens/s", in_turn(makers("tokens_s"), rounds), [Goal("ranvier serve", peers)], notes)
