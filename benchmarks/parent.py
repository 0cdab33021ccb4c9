"""Measure how much processor time the parent process spends per token: 16 and 64 streams through two stages.

The figure is microseconds of all threads of the process that holds gateway and supervisor, per token of the whole requests.
With 64 streams it should be at most 100.
"""

from __future__ import annotations

import json
import statistics
import sys
from functools import partial

from contestants import NEW, PROMPT, TWO, Contestant, Makers, graph_of, in_turn
from report import Answer

MOST = 100
OURS = """
import json, pathlib, sys, time, trio, ranvier
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
streams, prompt, new = int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
async def stream(run):
    async for _ in run.generate(prompt, max_tokens=new, stop_tokens=()):
        pass
async def main():
    async with ranvier.launch(ranvier.load(file), runs=file.parent) as run:
        while await trio.to_thread.run_sync(sys.stdin.readline):
            began = time.process_time()
            async with trio.open_nursery() as nursery:
                for _ in range(streams):
                    nursery.start_soon(stream, run)
            print(1e6 * (time.process_time() - began) / (streams * new), flush=True)
trio.run(main)
"""


def ask(rounds: int) -> Answer:
    makers: Makers = {
        f"{streams} streams": partial(
            Contestant, sys.executable, OURS, graph_of(TWO, "stored"), str(streams), json.dumps(PROMPT), str(NEW)
        )
        for streams in (16, 64)
    }
    figures = in_turn(makers, rounds)
    most = statistics.median(figures.get("64 streams", [float("nan")]))
    return Answer(
        "microseconds",
        figures,
        [],
        [f"{most:.0f} microseconds with 64 streams, at most {MOST}: {'holds' if most <= MOST else 'MISSED'}"],
    )
