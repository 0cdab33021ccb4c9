"""Measure what HTTP costs: `ranvier serve` against the same run in its own process, at 1, 16 and 64 streams.

The clients of the server are in a process of their own. Each keeps its connection, and reads events from its socket as they
come. The figure is tokens per second of whole requests, and all answers have the same length. Sixteen chats are also asked for
JSON that follows a schema. `later` is how much later the first text of a chat of 20 tokens arrives over HTTP, in milliseconds:
the median of the differences of pairs.
"""

from __future__ import annotations

import statistics
from functools import partial

from contestants import NEW, PROMPT, TWO, Makers, in_turn, ours
from report import Answer, Goal
from served import asking, served

BOUNDS = {1: 0.97, 16: 0.97, 64: 0.93}
MOST_LATER_MS = 2.0
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 200}
"""An answer that follows it has more tokens than any is asked for."""


def ask(rounds: int) -> Answer:
    text = {"prompt": PROMPT, "max_tokens": NEW}
    chat = {"messages": QUESTION, "max_tokens": NEW}
    form = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": SCHEMA}}
    wanted = {"response_format": form, "ignore_eos": False}
    makers: Makers = {
        **{f"in process, {n} streams": partial(ours, TWO, n, weights="stored") for n in BOUNDS},
        **{f"over HTTP, {n} streams": partial(served, asking(n, "/v1/completions", text)) for n in BOUNDS},
        "16 chats": partial(served, asking(16, "/v1/chat/completions", chat)),
        "16 chats, a schema": partial(served, asking(16, "/v1/chat/completions", {**chat, **wanted})),
    }
    figures = in_turn(makers, rounds)
    short = asking(1, "/v1/chat/completions", {"messages": QUESTION, "max_tokens": 20})
    later = in_turn({"later": partial(served, short, "later_ms")}, rounds)
    found = statistics.median(later.get("later") or [float("nan")])
    said = f"the first text is {found:.2f} ms later over HTTP, at most {MOST_LATER_MS}"
    return Answer(
        "tokens/s",
        figures,
        [
            *(Goal(f"over HTTP, {n} streams", f"in process, {n} streams", bound) for n, bound in BOUNDS.items()),
            Goal("16 chats, a schema", "16 chats", 0.97),
        ],
        [f"{said}: {'holds' if found <= MOST_LATER_MS else 'MISSED'}"],
    )
