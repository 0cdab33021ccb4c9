"""Measure sixteen streams through a model cut in two: two actors against llama.cpp's two `ggml-rpc-server` on loopback.

The files and threads are those of cut_one_stream.py.
"""

from __future__ import annotations

import cut_one_stream
from report import Answer


def ask(rounds: int) -> Answer:
    return cut_one_stream.ask(rounds, streams=16, bound=1.6)
