"""Measure how much memory all processes of a run hold, against transformers in one process.

The figure is the proportional set size, in which each process counts its share of shared memory, after one request of
64 tokens. The run has four actors with bfloat16 weights. `hosts` counts the processes of the actors and the process
that they are forked from; `all` also counts the client.
"""

from __future__ import annotations

import sys
from functools import partial

from contestants import FOUR, MEASURED, Contestant, Makers, graph_of, in_turn
from peers import transformers_code
from report import Answer, Goal

PSS = """
def pss_mib(pids):
    lines = [line for pid in pids for line in open(f"/proc/{pid}/smaps_rollup")]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
"""
OURS = (
    PSS
    + """
import json, os, pathlib, sys, trio, ranvier
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
async def main():
    async with ranvier.launch(ranvier.load(file), runs=file.parent) as run:
        while await trio.to_thread.run_sync(sys.stdin.readline):
            async for _ in run.generate(json.loads(sys.argv[2]), max_tokens=64, stop_tokens=()):
                pass
            hosts = list(run.pids.values())
            zygote = int(pathlib.Path(f"/proc/{hosts[0]}/stat").read_text().rpartition(")")[2].split()[1])
            print(pss_mib([*hosts, zygote, *[os.getpid()] * (sys.argv[3] == "all")]), flush=True)
trio.run(main)
"""
)


def _ours(what: str) -> Contestant:
    return Contestant(sys.executable, OURS, graph_of(FOUR), MEASURED, what)


def ask(rounds: int) -> Answer:
    makers: Makers = {
        "ranvier, hosts": partial(_ours, "hosts"),
        "ranvier, all": partial(_ours, "all"),
        "transformers": lambda: transformers_code(PSS, "pss_mib(['self'])"),
    }
    goals = [Goal(f"ranvier, {what}", "transformers", 1.0, less=True) for what in ("hosts", "all")]
    return Answer("MiB", in_turn(makers, rounds), goals)
