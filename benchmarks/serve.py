"""Measure what HTTP costs: `ranvier serve` against the same run in its own process, at 1, 16 and 64 streams.

The clients of the server are in a process of their own. Each keeps its connection, and reads events from its socket as they
come. The figure is tokens per second of whole requests, and all answers have the same length. `later` is how much later the
first text of a chat of 20 tokens arrives, in milliseconds: the median of the differences of pairs.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from functools import partial

from contestants import NEW, PROMPT, TWO, Contestant, Makers, graph_of, in_turn, ours
from report import Answer, Goal

BOUNDS = {1: 0.97, 16: 0.97, 64: 0.93}
MOST_LATER_MS = 2.0
QUESTION = "What is the capital of France?"
CLIENT = r"""
import asyncio, json, sys, time
host, port = sys.argv[1].split(":")
async def stream(connection, path, body):
    reader, writer = connection
    data, began, first, came = json.dumps(body).encode(), time.perf_counter(), 0.0, b""
    writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                 % (path.encode(), len(data), data))
    while not came.endswith(b"\r\n0\r\n\r\n"):
        new = await reader.read(1 << 16)
        assert new, came
        came += new
        if not first and any(map(shown, events(came))):
            first = time.perf_counter()
    return first - began, events(came)[-1]["usage"]["completion_tokens"]
def events(data):
    return [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {") and line.endswith(b"}")]
def shown(event):
    return any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event["choices"])
async def main():
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        count, path, body = json.loads(line)
        connections = [await asyncio.open_connection(host, int(port), limit=1 << 20) for _ in range(count)]
        began = time.perf_counter()
        made = await asyncio.gather(*(stream(each, path, body) for each in connections))
        took = time.perf_counter() - began
        for _, writer in connections:
            writer.close()
        print(json.dumps([took, sum(tokens for _, tokens in made), [first for first, _ in made]]), flush=True)
asyncio.run(main())
"""
SERVED = """
import json, pathlib, statistics, subprocess, sys, time, trio, ranvier
from ranvier.graph.serve.server import Options, serving
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[1])
streams, path, body, client = int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), sys.argv[5]
body = {"model": "bench", "temperature": 0, "ignore_eos": True, "stream": True,
         "stream_options": {"include_usage": True}, **body}
async def first(run):
    began, came = time.perf_counter(), 0.0
    async for token in run.generate(body["messages"], max_tokens=body["max_tokens"], stop_tokens=()):
        came = came or (time.perf_counter() if token.text else 0.0)
    return came - began
async def main():
    async with ranvier.launch(ranvier.load(file), runs=file.parent) as run, serving({"bench": run}, Options(port=0)) as url:
        process = subprocess.Popen([sys.executable, "-c", client, url.removeprefix("http://")],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        def asked():
            process.stdin.write(json.dumps([streams, path, body]) + "\\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        while await trio.to_thread.run_sync(sys.stdin.readline):
            if sys.argv[6] == "later":
                pairs = [((await trio.to_thread.run_sync(asked))[2][0], await first(run)) for _ in range(15)]
                print(1000 * statistics.median(over - here for over, here in pairs), flush=True)
            else:
                took, tokens, _ = await trio.to_thread.run_sync(asked)
                print(tokens / took, flush=True)
        process.kill()
trio.run(main)
"""


def served(streams: int, path: str, body: Mapping[str, object], figure: str = "") -> Contestant:
    """Return a contestant that asks a server for so many streams at once."""
    return Contestant(
        sys.executable, SERVED, graph_of(TWO, "stored"), str(streams), path, json.dumps(body), CLIENT, figure
    )  # fmt: skip


def ask(rounds: int) -> Answer:
    plain = {"prompt": PROMPT, "max_tokens": NEW}
    chat = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20}
    makers: Makers = {
        **{f"in process, {n} streams": partial(ours, TWO, n, weights="stored") for n in BOUNDS},
        **{f"over HTTP, {n} streams": partial(served, n, "/v1/completions", plain) for n in BOUNDS},
    }
    figures = in_turn(makers, rounds)
    later = in_turn({"later": partial(served, 1, "/v1/chat/completions", chat, "later")}, rounds)
    found = statistics.median(later.get("later") or [float("nan")])
    said = f"the first text is {found:.2f} ms later over HTTP, at most {MOST_LATER_MS}"
    return Answer(
        "tokens/s",
        figures,
        [Goal(f"over HTTP, {n} streams", f"in process, {n} streams", bound) for n, bound in BOUNDS.items()],
        [f"{said}: {'holds' if found <= MOST_LATER_MS else 'MISSED'}"],
    )
