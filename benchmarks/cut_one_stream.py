"""Measure one stream through a model cut in two: two actors against llama.cpp's cut, two `ggml-rpc-server` on loopback.

Both use the same Q4_1 file, with one thread in each of the two processes.
"""

from __future__ import annotations

from contestants import TWO, in_turn, llama_cpp_cut, ours
from report import Answer, Goal


def ask(rounds: int, streams: int = 1, bound: float = 1.1) -> Answer:
    makers = {
        "two actors": lambda: ours(TWO, streams, weights="stored"),
        "two servers of llama.cpp": lambda: llama_cpp_cut(streams),
    }
    return Answer("tokens/s", in_turn(makers, rounds), [Goal("two actors", "two servers of llama.cpp", bound)])
