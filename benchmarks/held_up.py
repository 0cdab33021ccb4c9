"""Measure how long a prompt of 2,000 tokens holds up a stream that decodes: the longest wait for a token.

A stream decodes alone, and then while the prompt comes in. A prompt of 128 tokens (one chunk, `prefill_chunk`) alone is
the peer. At each stage, a decoding token waits at most for the chunk that is being computed, and then shares a step
with one chunk.
"""

from __future__ import annotations

import json
import sys
from functools import partial

from contestants import PROMPT, SOURCE, TWO, Contestant, Makers, in_turn
from report import Answer, Goal

CODE = """
import json, pathlib, statistics, sys, time, trio, ranvier
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
what, short, long = sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
async def one(run, prompt, new, times, begun):
    async for _ in run.generate(prompt, max_tokens=new, stop_tokens=()):
        times.append(time.perf_counter())
        if len(times) == 20:
            begun.set()
async def main():
    async with ranvier.launch(ranvier.load(file), runs=file.parent) as run:
        while await trio.to_thread.run_sync(sys.stdin.readline):
            if what == "part":
                began, times = time.perf_counter(), []
                await one(run, long[:128], 1, times, trio.Event())
                print(1000 * (times[0] - began), flush=True)
                continue
            times, begun = [], trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, run, short, 200, times, begun)
                await begun.wait()
                if what == "beside":
                    nursery.start_soon(one, run, long, 1, [], trio.Event())
            print(1000 * max(b - a for a, b in zip(times[20:], times[21:])), flush=True)
trio.run(main)
"""


def _made(what: str) -> Contestant:
    graph = {
        "ranvier": 1, "name": "bench", "model": {"source": SOURCE, "dtype": "bfloat16"},
        "actors": {name: {"threads": 1, **given} for name, given in TWO.items()}, "pipeline": list(TWO),
    }  # fmt: skip
    long = [PROMPT[i % len(PROMPT)] for i in range(2000)]
    return Contestant(sys.executable, CODE, json.dumps(graph), what, json.dumps(PROMPT), json.dumps(long))


def ask(rounds: int) -> Answer:
    makers: Makers = {
        "longest wait, alone": partial(_made, "alone"),
        "longest wait, beside 2,000 tokens": partial(_made, "beside"),
        "128 tokens through both stages": partial(_made, "part"),
    }
    goal = Goal("longest wait, beside 2,000 tokens", "128 tokens through both stages", 2.0, less=True)
    return Answer("milliseconds", in_turn(makers, rounds), [goal])
