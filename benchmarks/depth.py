"""Measure what a long context adds to a token: at 7,000 tokens over 256, in milliseconds, four actors in one process.

The weights are bfloat16, with one thread and with two. The figure is the median time between tokens at the greater depth, less
that at the smaller one. Beside it stands what two threads take to read as many bytes as 6,744 positions have in the cache.
"""

from __future__ import annotations

import json
import sys
from functools import partial

from contestants import FOUR, PROMPT, Contestant, Makers, graph_of, in_one_host, in_turn
from memory_rate import READER
from report import Answer, Goal

NEAR, FAR = 256, 7000
CACHED = 30 * 2 * 3 * 64 * 2
"""Bytes of one position in all layers: keys and values of 3 heads of 64, in bfloat16."""
READING = READER.replace(
    "print(40 * held.nbytes / (time.perf_counter() - began) / 1e9", "print((time.perf_counter() - began) * 25"
)
"""Prints the milliseconds of one pass."""
OURS = """
import json, pathlib, statistics, sys, time, trio, ranvier
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
prompt, depths = json.loads(sys.argv[2]), json.loads(sys.argv[3])
async def main():
    async with ranvier.launch(ranvier.load(file), runs=file.parent) as run:
        while await trio.to_thread.run_sync(sys.stdin.readline):
            found = []
            for depth in depths:
                times = []
                long = (prompt * (depth // len(prompt) + 1))[:depth]
                async for _ in run.generate(long, max_tokens=40, stop_tokens=()):
                    times.append(time.perf_counter())
                found.append(statistics.median(b - a for a, b in zip(times, times[1:])))
            print(1000 * (found[1] - found[0]), flush=True)
trio.run(main)
"""


def ask(rounds: int) -> Answer:
    def graph(threads: int) -> str:
        return graph_of({name: {**given, "threads": threads} for name, given in in_one_host(FOUR).items()})

    makers: Makers = {
        f"{threads} threads": partial(
            Contestant, sys.executable, OURS, graph(threads), json.dumps(PROMPT), json.dumps([NEAR, FAR])
        )
        for threads in (1, 2)
    }
    makers = {**makers, "reading the cache": partial(Contestant, sys.executable, READING, str(CACHED * (FAR - NEAR)))}
    return Answer(
        "milliseconds", in_turn(makers, rounds), [Goal(["1 threads", "2 threads"], "reading the cache", less=True)]
    )
