"""Measure one stream through a model cut in two: two actors against llama.cpp's cut, two `ggml-rpc-server` on loopback.

Both run the Q4_1 file, and llama.cpp also Q4_0, which it repacks. Each process has one thread or two: the better counts.
"""

from __future__ import annotations

from functools import partial

from contestants import TWO, Makers, in_turn, ours
from peers import llama_cpp_cut
from report import Answer, Goal


def ask(rounds: int, streams: int = 1, bound: float = 1.1) -> Answer:
    own: Makers = {f"two actors, {t} threads": partial(ours, TWO, streams, weights="stored", threads=t) for t in (1, 2)}
    peers: Makers = {
        f"two servers of llama.cpp, {form}, {t} threads": partial(llama_cpp_cut, form, streams, t)
        for form in ("Q4_1", "Q4_0") for t in (1, 2)
    }  # fmt: skip
    return Answer("tokens/s", in_turn({**own, **peers}, rounds), [Goal(list(own), list(peers), bound)])
