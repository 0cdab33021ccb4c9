"""Measure one stream: four actors against transformers and llama.cpp, each in one process on the same two cores.

The model is SmolLM2-135M, with 11 tokens in and 64 out, greedy. The figure is tokens per second of the whole request.
Ours has two threads per actor, because only one actor is busy at a time. `stored` is the Q4_1 file as it is, which is
what llama.cpp runs. Messages go over ZeroMQ, or with `local` over Unix sockets.
"""

from __future__ import annotations

from functools import partial

from contestants import FOUR, Makers, in_turn, llama_cpp, ours, transformers
from report import Answer, Goal


def ask(rounds: int) -> Answer:
    makers: Makers = {
        **{weights: partial(ours, FOUR, 1, weights=weights, threads=2) for weights in ("bfloat16", "int8", "stored")},
        **{
            f"{weights}, local": partial(ours, FOUR, 1, weights=weights, threads=2, transport="local")
            for weights in ("bfloat16", "stored")
        },
        **{f"transformers, {threads} threads": partial(transformers, threads, 1) for threads in (1, 2)},
        **{f"llama.cpp, {threads} threads": partial(llama_cpp, threads, 1) for threads in (1, 2)},
    }
    return Answer(
        "tokens/s",
        in_turn(makers, rounds),
        [
            Goal("bfloat16", ["transformers, 1 threads", "transformers, 2 threads"], 1.5),
            Goal("stored", ["llama.cpp, 1 threads", "llama.cpp, 2 threads"], 1.0),
            *(Goal(f"{weights}, local", weights) for weights in ("bfloat16", "stored")),
        ],
    )
