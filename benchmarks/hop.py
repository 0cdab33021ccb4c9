"""What does one hop cost? Ours actor to actor with everything on, bare pyzmq, and torch.distributed over gloo.

Each plays a tensor to and fro between two processes on the same cores and gives the median time of half a round trip.
All stand ready from the start and take turns of a fraction of a second, so that a machine that drifts treats all
alike; the ratio is taken turn by turn. `python benchmarks/hop.py --rounds 15` prints and saves.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report

HERE = Path(__file__).parent
SIZES = {"576 bfloat16 values": (576, 1000), "16 MiB": (8 << 20, 10)}

OURS = """
import sys, torch, trio, ranvier
graph = ranvier.load(sys.argv[1], allow_code=True, overrides={"actors.player.args.bounces": sys.argv[4]})
async def main():
    async with ranvier.launch(graph, runs=sys.argv[2] + "/runs") as run:
        while await trio.to_thread.run_sync(sys.stdin.readline):
            times = (await run.call(x=torch.zeros(1, int(sys.argv[3]), dtype=torch.bfloat16)))["times"]
            print(float((times[1:] - times[:-1]).median()) / 2e3, flush=True)
trio.run(main)
"""

PYZMQ = """
import multiprocessing, statistics, sys, time, zmq
path, size, bounces = "ipc://" + sys.argv[2] + "/pair", int(sys.argv[3]) * 2, int(sys.argv[4])
copy = size < 65536  # copy=False costs more than it saves for what is small
def wall():
    socket = zmq.Context().socket(zmq.PAIR)
    socket.connect(path)
    while True:
        got = socket.recv(copy=copy)
        socket.send(got if copy else got.buffer, copy=copy)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=wall, daemon=True).start()
    socket = zmq.Context().socket(zmq.PAIR)
    socket.bind(path)
    for _ in sys.stdin:
        times, got = [], bytearray(size)
        for _ in range(bounces + 1):
            socket.send(got if copy or not times else got.buffer, copy=copy)
            got = socket.recv(copy=copy)
            times.append(time.monotonic_ns())
        print(statistics.median(b - a for a, b in zip(times, times[1:])) / 2e3, flush=True)
"""

GLOO = """
import multiprocessing, statistics, sys, time, torch, torch.distributed as dist
store, width, bounces = "file://" + sys.argv[2] + "/store", int(sys.argv[3]), int(sys.argv[4])
def join(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    return torch.zeros(width, dtype=torch.bfloat16)
def wall():
    ball = join(1)
    while True:
        dist.recv(ball, 0)
        dist.send(ball, 0)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=wall, daemon=True).start()
    ball = join(0)
    for _ in sys.stdin:
        times = []
        for _ in range(bounces + 1):
            dist.send(ball, 1)
            dist.recv(ball, 1)
            times.append(time.monotonic_ns())
        print(statistics.median(b - a for a, b in zip(times, times[1:])) / 2e3, flush=True)
"""

SCRIPTS = {"bare pyzmq": PYZMQ, "ranvier": OURS, "gloo": GLOO}


class Contestant:
    """A process that plays one turn for each line it is given, and answers with microseconds a hop."""

    def __init__(self, script: str, width: int, bounces: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranvier-bench-")
        file = Path(self._folder.name) / "contestant.py"
        file.write_text(script)
        arguments = [str(HERE / "bounce" / "graph.yaml"), self._folder.name, str(width), str(bounces)]
        self._process = subprocess.Popen(
            [sys.executable, str(file), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("a contestant is gone; its own error stands above")
        return float(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()


def measure(width: int, bounces: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds a hop by contestant, one figure a round; the first turn of each is to get warm."""
    contestants = {name: Contestant(script, width, bounces) for name, script in SCRIPTS.items()}
    try:
        for contestant in contestants.values():
            contestant.turn()
        return report.in_turn({name: contestant.turn for name, contestant in contestants.items()}, rounds)
    finally:
        for contestant in contestants.values():
            contestant.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    told: dict[str, object] = {}
    began = time.monotonic()
    print(f"one hop, {rounds} rounds in turn, {len(os.sched_getaffinity(0))} cores: median of a round (least to most)")
    for name, (width, bounces) in SIZES.items():
        figures = measure(width, bounces, rounds)
        print(f"\n{name}")
        for contestant, values in figures.items():
            print(f"  {contestant:12s} {report.spread(values, 'µs')}")
        against = {peer: report.ratios(figures, "ranvier", peer) for peer in ("bare pyzmq", "gloo")}
        for peer, values in against.items():
            print(f"  ranvier / {peer:12s} {statistics.median(values):.2f}  ({min(values):.2f} to {max(values):.2f})")
        told[name] = {"microseconds": figures, "ratio": against}
    file = report.save("hop", {"rounds": rounds, "sizes": told})
    print(f"\nsaved {file.relative_to(HERE.parent)} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
