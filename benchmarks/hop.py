"""Measure what one small hop costs between actors, over each wire, against pyzmq, Unix sockets, gloo, and Ray.

576 bfloat16 values go back and forth between two processes. The figure is half a round trip in microseconds, the median
of a thousand. Ours has header, handshake, credits, acknowledgements and trace on, over `transport: ipc` (ZeroMQ) and over
`transport: local`. pyzmq is a PAIR without header or tensor, and gloo is `torch.distributed`. A blocking socket pair and
`multiprocessing.Pipe` are what a bare system gives. A bare Unix socket with an address carries packets without header or
tensor. It has two forms: one waits asleep, as pyzmq does, and the other waits as our wires do, without sleeping for half a
millisecond. Ray's compiled graphs have two forms. In one, the values go back and forth within
one graph, and the time to start and end a graph is subtracted. In the other, the caller sends to one actor, which sends to
another, which sends back to the caller.

Each of the two processes has its own core, as actors that compute do. In a second variant the system places them. Then
both processes of a bare peer often share one core, and no core has to be woken.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from contestants import PEERS, Contestant, Makers, in_turn
from report import Answer, Goal

GRAPH = Path(__file__).parent / "bounce" / "graph.yaml"
WIDTH, BOUNCES = 576, 1000

OURS = """
import json, pathlib, sys, torch, trio, ranvier
settings = {"actors.player.args.bounces": sys.argv[2], **json.loads(sys.argv[4])}
graph = ranvier.load(sys.argv[3], allow_code=True, overrides=settings)
async def main():
    async with ranvier.launch(graph, runs=pathlib.Path(__file__).parent) as run:
        while await trio.to_thread.run_sync(sys.stdin.readline):
            times = (await run.call(x=torch.zeros(1, int(sys.argv[1]), dtype=torch.bfloat16)))["times"]
            print(float((times[1:] - times[:-1]).median()) / 2e3, flush=True)
trio.run(main)
"""

PYZMQ = """
import multiprocessing, os, pathlib, statistics, sys, time, zmq
def take(core):
    if sys.argv[3] == "a core each":
        os.sched_setaffinity(0, {core})
path, size, bounces = f"ipc://{pathlib.Path(__file__).parent}/pair", int(sys.argv[1]) * 2, int(sys.argv[2])
copy = size < 65536  # for small messages, copy=False costs more than it saves
def wall():
    take(1)
    socket = zmq.Context().socket(zmq.PAIR)
    socket.connect(path)
    while True:
        got = socket.recv(copy=copy)
        socket.send(got if copy else got.buffer, copy=copy)
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=wall, daemon=True).start()
    take(0)
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

UNIX = """
import multiprocessing, os, pathlib, socket, statistics, sys, time
path, size, bounces = f"{pathlib.Path(__file__).parent}/unix", int(sys.argv[1]) * 2, int(sys.argv[2])
awake = sys.argv[4] == "awake"
def take(core):
    if sys.argv[3] == "a core each":
        os.sched_setaffinity(0, {core})
def receive(end, got):
    if awake:  # as our wires do: half a millisecond without sleeping
        until = time.monotonic_ns() + 500_000
        while time.monotonic_ns() < until:
            try:
                return end.recv_into(got, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()
    return end.recv_into(got)
def wall():
    take(1)
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.connect(path)
    got = bytearray(size)
    while receive(end, got):
        end.send(got)
if __name__ == "__main__":
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    multiprocessing.get_context("spawn").Process(target=wall, daemon=True).start()
    take(0)
    end, got = listener.accept()[0], bytearray(size)
    for _ in sys.stdin:
        times = []
        for _ in range(bounces + 1):
            end.send(got)
            receive(end, got)
            times.append(time.monotonic_ns())
        print(statistics.median(b - a for a, b in zip(times, times[1:])) / 2e3, flush=True)
"""

PAIR = """
import multiprocessing, os, socket, statistics, sys, time
size, bounces = int(sys.argv[1]) * 2, int(sys.argv[2])
def take(core):
    if sys.argv[3] == "a core each":
        os.sched_setaffinity(0, {core})
def wall(end):
    take(1)
    got = bytearray(size)
    while end.recv_into(got):
        end.send(got)
if __name__ == "__main__":
    end, other = socket.socketpair(socket.AF_UNIX, getattr(socket, sys.argv[4]))
    multiprocessing.get_context("spawn").Process(target=wall, args=(other,), daemon=True).start()
    other.close()
    take(0)
    got = bytearray(size)
    for _ in sys.stdin:
        times = []
        for _ in range(bounces + 1):
            end.send(got)
            assert end.recv_into(got) == size
            times.append(time.monotonic_ns())
        print(statistics.median(b - a for a, b in zip(times, times[1:])) / 2e3, flush=True)
"""

PIPE = """
import multiprocessing, os, statistics, sys, time
size, bounces = int(sys.argv[1]) * 2, int(sys.argv[2])
def take(core):
    if sys.argv[3] == "a core each":
        os.sched_setaffinity(0, {core})
def wall(end):
    take(1)
    while True:
        end.send_bytes(end.recv_bytes())
if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    end, other = spawn.Pipe()
    spawn.Process(target=wall, args=(other,), daemon=True).start()
    other.close()
    take(0)
    for _ in sys.stdin:
        times, got = [], bytes(size)
        for _ in range(bounces + 1):
            end.send_bytes(got)
            got = end.recv_bytes()
            times.append(time.monotonic_ns())
        assert len(got) == size
        print(statistics.median(b - a for a, b in zip(times, times[1:])) / 2e3, flush=True)
"""

GLOO = """
import multiprocessing, os, pathlib, statistics, sys, time, torch, torch.distributed as dist
store, width, bounces = f"file://{pathlib.Path(__file__).parent}/store", int(sys.argv[1]), int(sys.argv[2])
def join(rank):
    if sys.argv[3] == "a core each":
        os.sched_setaffinity(0, {rank})
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

RAY = """
import logging, os, statistics, sys, time, numpy, ray
from ray.dag import InputNode
ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, object_store_memory=200_000_000)
@ray.remote(num_cpus=0)
class Player:
    def take(self, core):
        os.sched_setaffinity(0, {core})
    def play(self, ball):
        return ball
players = [Player.remote(), Player.remote()]
ray.get([player.take.remote(core) for core, player in enumerate(players)])
def compiled(bounces):
    with InputNode() as ball:
        node = ball
        for turn in range(bounces):
            node = players[turn % 2].play.bind(node)
    return node.experimental_compile()
ball = numpy.zeros(int(sys.argv[1]), numpy.uint16)
def times(bounces, runs):
    graph = compiled(bounces)  # only for this turn: its actors spin while they wait, which would disturb the next contestant
    found = []
    for _ in range(runs):
        began = time.perf_counter()
        ray.get(graph.execute(ball))
        found.append(time.perf_counter() - began)
    graph.teardown()
    return statistics.median(found[runs // 3:])
few, many = 2, 42
for _ in sys.stdin:
    around = times(few, 300)
    if sys.argv[2] == "whole":
        print(around / (few + 1) * 1e6, flush=True)
    else:
        print((times(many, 75) - around) / (many - few) * 1e6, flush=True)
"""


EACH, FREE = "a core each", "placed by the system"
PINNED = {"actors.player.cpus": "[0]", "actors.wall.cpus": "[1]"}
WIRES = "ipc", "local"


def _ours(wire: str, placed: str) -> Contestant:
    settings = json.dumps({"transport": wire, **(PINNED if placed == EACH else {})})
    return Contestant(sys.executable, OURS, str(WIDTH), str(BOUNCES), str(GRAPH), settings)


def _peer(code: str, placed: str, how: str = "") -> Contestant:
    return Contestant(sys.executable, code, str(WIDTH), str(BOUNCES), placed, how)


def _ray(how: str) -> Contestant:
    return Contestant(PEERS / "bin" / "python", RAY, str(WIDTH), how)


def ask(rounds: int) -> Answer:
    makers: Makers = {
        **{f"{wire}, {placed}": partial(_ours, wire, placed) for wire in WIRES for placed in (EACH, FREE)},
        **{f"bare pyzmq, {placed}": partial(_peer, PYZMQ, placed) for placed in (EACH, FREE)},
        **{f"bare Unix socket, {placed}": partial(_peer, UNIX, placed) for placed in (EACH, FREE)},
        **{f"bare Unix socket awake, {placed}": partial(_peer, UNIX, placed, "awake") for placed in (EACH, FREE)},
        **{
            f"blocking socket pair, {placed}": partial(_peer, PAIR, placed, "SOCK_SEQPACKET") for placed in (EACH, FREE)
        },
        **{f"multiprocessing.Pipe, {placed}": partial(_peer, PIPE, placed) for placed in (EACH, FREE)},
        **{f"gloo, {placed}": partial(_peer, GLOO, placed) for placed in (EACH, FREE)},
        "Ray, within a compiled graph": partial(_ray, "within"),
        "Ray, a compiled graph called": partial(_ray, "whole"),
    }
    goals = [
        *(Goal(f"ipc, {placed}", f"bare pyzmq, {placed}", 1.4, less=True) for placed in (EACH, FREE)),
        *(Goal(f"local, {placed}", f"blocking socket pair, {placed}", 1.05, less=True) for placed in (EACH, FREE)),
        *(Goal(f"local, {placed}", f"multiprocessing.Pipe, {placed}", less=True) for placed in (EACH, FREE)),
        *(Goal(f"local, {placed}", f"bare Unix socket, {placed}", less=True) for placed in (EACH, FREE)),
        *(Goal(f"local, {placed}", f"bare Unix socket awake, {placed}", less=True) for placed in (EACH, FREE)),
        *(Goal(f"{wire}, {placed}", f"gloo, {placed}", 1.0, less=True) for wire in WIRES for placed in (EACH, FREE)),
        *(Goal(f"{wire}, {EACH}", peer, 0.33, less=True) for wire in WIRES for peer in list(makers)[-2:]),
        Goal(f"local, {EACH}", f"ipc, {EACH}", less=True),
    ]
    return Answer("microseconds", in_turn(makers, 3 * rounds), goals)
