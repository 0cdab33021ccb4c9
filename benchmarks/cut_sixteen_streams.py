"""Measure sixteen streams through a model cut in two: two actors against llama.cpp's two `ggml-rpc-server` on loopback.

Both use the same Q4_1 file, with one thread in each of the two processes.
"""

from __future__ import annotations

import cut_one_stream
from report import Answer


def ask(rounds: int) -> Answer:
    return cut_one_stream.ask(rounds, streams=16, bound=3.0)
