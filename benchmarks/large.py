"""Measure what 16 MiB, and less, cost between two actors: over ZeroMQ, over Unix sockets, and in shared memory.

The figure is half a round trip in milliseconds, as in hop.py. `ipc` is ZeroMQ, and `local` has Unix sockets (with
`shared_from_bytes: 0`) or shared memory. With shared memory, ours copies once, into a segment that the receiver maps. One
memcpy goes back and forth between two buffers that were touched before, and that the third-level cache of a large
processor holds. The other goes round eight buffers, which that cache does not hold. The smaller sizes decided the default
of `shared_from_bytes`.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import hop
from contestants import Contestant, Makers, in_turn
from report import Answer, Goal

SIZES = {"64 KiB": 1 << 16, "256 KiB": 1 << 18, "1 MiB": 1 << 20, "16 MiB": 1 << 24}

MEMCPY = """
import ctypes, statistics, sys, time
size, bounces, count = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
buffers = [ctypes.create_string_buffer(bytes(size), size) for _ in range(count)]
for _ in sys.stdin:
    times = []
    for turn in range(2 * bounces):
        began = time.perf_counter_ns()
        ctypes.memmove(buffers[(turn + 1) % count], buffers[turn % count], size)
        times.append(time.perf_counter_ns() - began)
    print(statistics.median(times) / 1e6, flush=True)
"""


MILLI = 1e-3
OURS = {
    "shared memory": {"transport": "local", "shared_from_bytes": "1"},
    "local socket": {"transport": "local", "shared_from_bytes": "0"},
    "ipc": {"transport": "ipc"},
}


def _ours(nbytes: int, how: str) -> Contestant:
    bounces = max(20, min(500, (1 << 26) // nbytes))
    arguments = str(nbytes // 2), str(bounces), str(hop.GRAPH), json.dumps(OURS[how])
    return Contestant(sys.executable, hop.OURS, *arguments).times(MILLI)


def ask(rounds: int) -> Answer:
    makers: Makers = {
        **{f"{name}, {how}": partial(_ours, nbytes, how) for how in OURS for name, nbytes in SIZES.items()},
        "16 MiB, bare pyzmq": lambda: Contestant(sys.executable, hop.PYZMQ, str(1 << 23), "20", hop.FREE).times(MILLI),
        "16 MiB, gloo": lambda: Contestant(sys.executable, hop.GLOO, str(1 << 23), "20", hop.FREE).times(MILLI),
        "16 MiB, one memcpy": lambda: Contestant(sys.executable, MEMCPY, str(1 << 24), "20", "2"),
        "16 MiB, one memcpy, not cached": lambda: Contestant(sys.executable, MEMCPY, str(1 << 24), "20", "8"),
    }
    goals = [
        Goal("16 MiB, shared memory", "16 MiB, one memcpy", round(1 / 0.9, 2), less=True),
        Goal("16 MiB, shared memory", "16 MiB, one memcpy, not cached", less=True),
        Goal("16 MiB, ipc", "16 MiB, bare pyzmq", 1.6, less=True),
        Goal("16 MiB, ipc", "16 MiB, one memcpy", less=True),
        Goal("16 MiB, local socket", "16 MiB, one memcpy", less=True),
        *(Goal(f"{name}, shared memory", f"{name}, local socket", less=True) for name in SIZES),
        *(Goal(f"{name}, shared memory", f"{name}, ipc", less=True) for name in SIZES),
    ]
    return Answer("milliseconds", in_turn(makers, rounds), goals)
