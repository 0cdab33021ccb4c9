"""Measure what it costs to look inside: eight streams of which the odd ones are steered, or read, against eight plain ones.

All figures come from one run, in turn: two runs differ by more, because of where their memory happens to lie.
"""

from __future__ import annotations

import sys

import report
from contestants import PROMPT, TWO, Contestant, graph_of
from report import Answer, Goal

STREAMS, NEW = 8, 96
_OURS = """
import itertools, pathlib, sys, time, torch, trio, ranvier
from ranvier import ops
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
streams, new, prompt = int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
vector = torch.randn(576, generator=torch.Generator().manual_seed(1)) / 24
HOW = {
    "plain": {},
    "steered": {"edits": [ops.add("hidden 12", vector, scale=4)]},
    "read": {"reads": ["hidden 12"]},
    "head": {"edits": [ops.zero("layer 12 heads", heads=3)]},
}
async def stream(run, options):
    async for _ in run.generate(prompt, max_tokens=new, stop_tokens=(), **options):
        pass
async def main():
    async with ranvier.launch(ranvier.load(file), runs=file.parent) as run:
        for how in itertools.chain(("plain",), itertools.cycle(HOW)):  # the first time is not measured
            if not await trio.to_thread.run_sync(sys.stdin.readline):
                return
            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for index in range(streams):
                    nursery.start_soon(stream, run, HOW[how] if index % 2 else {})
            print(streams * new / (time.perf_counter() - began), flush=True)
trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
"""
HOW = ("plain", "steered", "read", "head")
NAMES = dict(
    zip(HOW, ("plain", "odd ones steered", "odd ones read", "odd ones without a head, through torch"), strict=True)
)


def ask(rounds: int) -> Answer:
    contestant = Contestant(
        sys.executable, _OURS, graph_of(TWO, "stored"), str(STREAMS), str(NEW), str(PROMPT)
    )  # fmt: skip
    try:
        figures = report.in_turn(dict.fromkeys(NAMES.values(), contestant.measure), 3 * rounds)
    finally:
        contestant.close()
    bounds = {"steered": 0.95, "read": None, "head": None}
    goals = [Goal(NAMES[how], NAMES["plain"], bound) for how, bound in bounds.items()]
    return Answer("tokens/s", figures, goals)
