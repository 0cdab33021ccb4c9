"""Be clients of a server, in a process of their own: `http_client.py HOST:PORT`.

Each line of input is a JSON object: `count` clients send `body` to `path` at once, and read the events of their answers; `slow`
of them read little at a time, with pauses. The answer is a line, too: tokens per second of all, the median time to the first
text, and the 99th percentile of the gaps between two texts, both in milliseconds and without the slow ones.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import statistics
import sys
import time
from typing import Any

HOST, PORT = sys.argv[1].rsplit(":", 1)
LITTLE, PAUSE_S = 512, 0.2
TEXT = re.compile(rb'"(?:content|text)":"(?!")')
"""Found in events that bring text, and only there. To parse every event would take time from the server."""


def events(data: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {") and line.endswith(b"}")]


async def connected(slow: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    made = socket.socket()
    if slow:  # before it connects: the system then takes little that is not read
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, (HOST, int(PORT)))
    return await asyncio.open_connection(sock=made, limit=LITTLE if slow else 1 << 20)


async def answer(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], path: str, data: bytes, slow: bool
) -> tuple[float, list[float], int]:
    """Return the time to the first text, the gaps after it, and the number of tokens."""
    reader, writer = connection
    began, came, begun, times = time.perf_counter(), b"", b"", list[float]()
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (path.encode(), len(data), data)
    )
    while not came.endswith(b"\r\n0\r\n\r\n"):
        new = await reader.read(LITTLE if slow else 1 << 16)
        assert new, came
        came += new
        assert came.startswith(b"HTTP/1.1 200"[: len(came)]), came  # other answers end in other ways
        if slow:
            await asyncio.sleep(PAUSE_S)
            continue
        begun += new
        whole, _, begun = begun.rpartition(b"\n\n")
        if TEXT.search(whole):
            times.append(time.perf_counter())
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return times[0] - began if times else 0.0, gaps, events(came)[-1]["usage"]["completion_tokens"]


async def ask(count: int, path: str, body: Any, slow: int = 0) -> dict[str, float]:
    connections = [await connected(index < slow) for index in range(count)]
    began = time.perf_counter()
    data = json.dumps(body).encode()
    made = await asyncio.gather(*(answer(each, path, data, index < slow) for index, each in enumerate(connections)))
    took = time.perf_counter() - began
    for _, writer in connections:
        writer.close()
    gaps = sorted(gap for _, gaps, _ in made[slow:] for gap in gaps)
    return {
        "tokens_s": sum(tokens for _, _, tokens in made) / took,
        "first_ms": 1000 * statistics.median(first for first, _, _ in made[slow:]),
        "gap_ms": 1000 * gaps[int(0.99 * len(gaps))],
    }


async def main() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await ask(**json.loads(line))), flush=True)


asyncio.run(main())
