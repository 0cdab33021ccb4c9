"""What does one hop cost? Ours actor to actor with everything on, bare pyzmq, and torch.distributed over gloo.

Each plays a tensor to and fro between two processes on the same cores and gives the median time of half a round trip.
The three take turns; the ratio is taken round by round. `python benchmarks/hop.py --rounds 7` prints and saves.
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
SIZES = {"576 bfloat16 values": (576, 2000), "16 MiB": (8 << 20, 30)}


def ours(width: int, bounces: int) -> float:
    """Microseconds a hop between two actors, header, credits, acknowledgements and trace all on."""
    script = f"""
import torch, trio, ranvier
graph = ranvier.load({str(HERE / "bounce" / "graph.yaml")!r}, allow_code=True,
                     overrides={{"actors.player.args.bounces": "{bounces}"}})
async def main():
    async with ranvier.launch(graph, runs={tempfile.gettempdir()!r} + "/ranvier-bench") as run:
        for _ in range(2):  # the first is to get warm
            times = (await run.call(x=torch.zeros(1, {width}, dtype=torch.bfloat16)))["times"]
        print(float((times[1:] - times[:-1]).median()) / 2e3)
trio.run(main)
"""
    return _measured(script)


def pyzmq(width: int, bounces: int) -> float:
    """Microseconds a hop between two PAIR sockets over ipc, nothing else; copy=False for what is large."""
    with tempfile.TemporaryDirectory() as folder:
        script = """
import sys, time, zmq
side, path, size, bounces = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
copy = size < 65536
socket = zmq.Context().socket(zmq.PAIR)
socket.bind(path) if side == "a" else socket.connect(path)
if side == "a":
    times = []
    socket.send(bytearray(size), copy=copy)
    for _ in range(bounces):
        got = socket.recv(copy=copy)
        times.append(time.monotonic_ns())
        socket.send(got if copy else got.buffer, copy=copy)
    socket.recv()
    steps = sorted(b - a for a, b in zip(times, times[1:]))
    print(steps[len(steps) // 2] / 2e3)
else:
    for _ in range(bounces + 1):
        got = socket.recv(copy=copy)
        socket.send(got if copy else got.buffer, copy=copy)
    time.sleep(0.2)
"""
        return _pair(script, f"ipc://{folder}/pair", width, bounces)


def gloo(width: int, bounces: int) -> float:
    """Microseconds a hop between two ranks of torch.distributed over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        script = """
import sys, time, torch, torch.distributed as dist
side, path, size, bounces = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=path, rank=0 if side == "a" else 1, world_size=2)
ball = torch.zeros(size // 2, dtype=torch.bfloat16)
times = []
for _ in range(bounces):
    if side == "a":
        dist.send(ball, 1); dist.recv(ball, 1); times.append(time.monotonic_ns())
    else:
        dist.recv(ball, 0); dist.send(ball, 0)
if side == "a":
    steps = sorted(b - a for a, b in zip(times, times[1:]))
    print(steps[len(steps) // 2] / 2e3)
dist.destroy_process_group()
"""
        return _pair(script, f"file://{folder}/store", width, bounces)


def _measured(script: str) -> float:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def _pair(script: str, path: str, width: int, bounces: int) -> float:
    arguments = [path, str(width * 2), str(bounces)]
    other = subprocess.Popen([sys.executable, "-c", script, "b", *arguments])
    done = subprocess.run([sys.executable, "-c", script, "a", *arguments], capture_output=True, text=True, check=False)
    other.wait()
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    told: dict[str, object] = {}
    began = time.monotonic()
    print(f"one hop, {rounds} rounds in turn, {len(os.sched_getaffinity(0))} cores: median of a round (least to most)")
    for name, (width, bounces) in SIZES.items():
        contestants = {
            "bare pyzmq": lambda w=width, b=bounces: pyzmq(w, b),
            "ranvier": lambda w=width, b=bounces: ours(w, b),
            "gloo": lambda w=width, b=bounces: gloo(w, b),
        }
        figures = report.in_turn(contestants, rounds)
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
