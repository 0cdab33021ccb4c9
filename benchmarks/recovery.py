"""Measure how long a stream stands still when a blocks actor is killed, with a cold restart and with a warm spare.

The actor is killed with SIGKILL in the middle of one stream of SmolLM2 through four actors. The figure is the time to
the next token, which takes one prefill of all tokens so far. Notes show what the time was spent on. The backoff before
the first restart is off.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

from contestants import FOUR, Contestant, graph_of
from report import Answer, Goal, in_turn

KILLER = """
import json, os, pathlib, signal, sys, time, torch, trio, ranvier
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
graph = ranvier.load(file)
async def main():
    async with ranvier.launch(graph, runs=file.parent) as run:
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            if json.loads(sys.argv[2]):
                while not any(h.spare and h.address for h in run._supervisor.supervision.hosts.values()):
                    await trio.sleep(0.05)
                await trio.sleep(0.5)
            before, there = len(run.recoveries), 0
            async for token in run.generate([504, 260, 1400], max_tokens=40, stop_tokens=()):
                there += 1
                if there == 20:
                    live = run._supervisor.supervision.hosts.values()
                    [key] = [h.spec.identity for h in live if h.spec.actor == "upper" and not h.joining]
                    os.kill(run.pids[key], signal.SIGKILL)
                    killed = time.monotonic()
                elif there == 21:
                    took = time.monotonic() - killed
            done = run.recoveries[before]
            parts = [done.fence_s, done.load_s, done.link_s, took - done.seconds]
            with (file.parent / "parts.jsonl").open("a") as told:
                print(json.dumps([1e3 * part for part in parts]), file=told)
            print(took * 1e3, flush=True)
trio.run(main)
"""


def _run(spares: int) -> Contestant:
    actors: dict[str, dict[str, Any]] = {name: {"threads": 1, **given} for name, given in FOUR.items()}
    actors["upper"] |= {"spares": spares}
    restart = {"max": 1000, "window_s": 60, "backoff_s": 0}
    return Contestant(sys.executable, KILLER, graph_of(actors, restart=restart), "true" if spares else "false")


COLD, WARM = "cold restart", "warm spare"


def ask(rounds: int) -> Answer:
    runs = {COLD: _run(0), WARM: _run(1)}
    try:
        figures = in_turn({name: run.measure for name, run in runs.items()}, 2 * rounds)
        notes = [_parts(name, (run.folder / "parts.jsonl").read_text()) for name, run in runs.items()]
    finally:
        for run in runs.values():
            run.close()
    for name, bound in ((COLD, 3000), (WARM, 300)):
        median = statistics.median(figures[name])
        notes.append(f"{name}: {median:.0f} ms, under {bound}: {'holds' if median < bound else 'MISSED'}")
    return Answer("milliseconds", figures, [Goal(WARM, COLD, less=True)], notes)


def _parts(name: str, told: str) -> str:
    medians = [statistics.median(part) for part in zip(*map(json.loads, told.splitlines()), strict=True)]
    words = ("notice and fence", "start and load", "link", "replay and the rest")
    return f"{name}: " + ", ".join(f"{word} {median:.0f}" for word, median in zip(words, medians, strict=True))
