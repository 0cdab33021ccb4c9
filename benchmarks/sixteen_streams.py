"""Measure sixteen streams: four actors against transformers' batch of 16 and llama.cpp's 16 sequences, on two cores.

The requests are those of one_stream.py, 16 at once. llama.cpp decodes one token of all sequences per call. Ours has one
thread per actor. Messages go over ZeroMQ, or with `local` over Unix sockets.
"""

from __future__ import annotations

from functools import partial

from contestants import FOUR, Makers, in_turn, llama_cpp, ours, transformers
from report import Answer, Goal


def ask(rounds: int) -> Answer:
    makers: Makers = {
        **{weights: partial(ours, FOUR, 16, weights=weights) for weights in ("bfloat16", "int8", "stored")},
        **{
            f"{weights}, local": partial(ours, FOUR, 16, weights=weights, transport="local")
            for weights in ("bfloat16", "stored")
        },
        "transformers, 2 threads": partial(transformers, 2, 16),
        "llama.cpp, 2 threads": partial(llama_cpp, 2, 16),
    }
    return Answer(
        "tokens/s",
        in_turn(makers, rounds),
        [
            Goal("bfloat16", "transformers, 2 threads", 1.7),
            Goal(["int8", "stored"], "llama.cpp, 2 threads", 2.0),
            *(Goal(f"{weights}, local", weights) for weights in ("bfloat16", "stored")),
        ],
    )
