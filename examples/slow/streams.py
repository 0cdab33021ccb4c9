"""Run eight streams at once through a graph file, and print their tokens per second: `python streams.py slow.yaml`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import trio

import ranvier

QUESTIONS = ("Why is the sky blue?", "Name three rivers.", "What is a neuron?", "Who wrote Faust?")
TOKENS = 48


async def ask(run: ranvier.Run, question: str) -> None:
    async for _ in run.generate(question, max_tokens=TOKENS, stop_tokens=()):
        pass


async def main(file: str) -> None:
    graph = ranvier.load(Path(file), allow_code=True)
    async with ranvier.launch(graph) as run:
        await ask(run, QUESTIONS[0])  # warm up
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            for question in QUESTIONS * 2:
                nursery.start_soon(ask, run, question)
        took = time.monotonic() - began
        print(f"{len(QUESTIONS) * 2 * TOKENS / took:.1f} tokens/s\nrun folder: {run.dir}")


if __name__ == "__main__":
    trio.run(main, sys.argv[1], restrict_keyboard_interrupt_to_checkpoints=True)
