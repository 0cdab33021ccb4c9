"""Measure which share of the memory's speed one stream reaches: four actors in one process with two threads.

A token reads all matrices of blocks and head once, and the cache. The figure is these bytes per token times the tokens per
second, in GB/s, against two threads that add up as many bytes of large pages, again and again.
"""

from __future__ import annotations

import sys
from functools import partial

from contestants import FOUR, NEW, PROMPT, Contestant, Makers, graph_of, in_one_host, in_turn, ours
from report import Answer, Goal

BOUNDS = {"bfloat16": 0.9, "stored": 0.6}
READER = """
import sys, time, torch
from ranvier.actors.model.kernels.pages import fresh
torch.set_num_threads(2)
held = fresh(int(sys.argv[1]) // 4096 * 4096, large_from=0).view(torch.int64)
held.fill_(1)
for _ in sys.stdin:
    began = time.perf_counter()
    for _ in range(40):
        held.sum()
    print(40 * held.nbytes / (time.perf_counter() - began) / 1e9, flush=True)
"""
BYTES = """
import pathlib, sys, ranvier
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
hosts = ranvier.plan(ranvier.load(file)).hosts
read = sum(host.weight_bytes for host in hosts if host.kind != "embedding")
for _ in sys.stdin:
    print(read + int(sys.argv[2]) * sum(host.cache_bytes_per_token for host in hosts), flush=True)
"""


def bytes_per_token(weights: str) -> int:
    """Return the bytes that a token reads in the middle of a request, as the plan says."""
    asked = Contestant(sys.executable, BYTES, graph_of(FOUR, weights), str(len(PROMPT) + NEW // 2))
    found = int(asked.measure())
    asked.close()
    return found


def _ours(weights: str, read: int) -> Contestant:
    return ours(in_one_host(FOUR), 1, weights=weights, threads=2).times(read / 1e9)


def ask(rounds: int) -> Answer:
    makers: Makers = {}
    goals = []
    for weights, bound in BOUNDS.items():
        read = bytes_per_token(weights)
        mine, theirs = f"four actors, {weights}", f"reading {read / 1e6:.0f} MB"
        makers = {
            **makers,
            mine: partial(_ours, weights, read),
            theirs: partial(Contestant, sys.executable, READER, str(read)),
        }
        goals.append(Goal(mine, theirs, bound))
    return Answer("GB/s", in_turn(makers, rounds), goals)
