"""Provide contestants over HTTP: `ranvier serve`, and llama.cpp's server. Their clients are http_client.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peers
from contestants import TWO, Contestant, graph_of

CLIENT = str(Path(__file__).with_name("http_client.py"))
GREEDY = {
    "model": "bench",
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}
"""All bodies have these fields. No answer ends before its last token, so that all have the same length."""
ASKING = """
import json, subprocess, sys
def client(address):
    return subprocess.Popen([sys.executable, sys.argv[1], address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
def asked(process):
    process.stdin.write(sys.argv[2] + "\\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())
def show(figures):
    print(figures[sys.argv[3]], flush=True)
"""
_OURS = (
    ASKING
    + """
import pathlib, statistics, time, trio, ranvier
from ranvier.graph.serve.server import Options, serving
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[4])
async def first_ms(run, body):
    began, came = time.perf_counter(), 0.0
    async for token in run.generate(body["messages"], max_tokens=body["max_tokens"], stop_tokens=()):
        came = came or (time.perf_counter() if token.text else 0.0)
    return 1000 * (came - began)
def most_mib():
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
async def main():
    async with ranvier.launch(ranvier.load(file), runs=file.parent) as run, serving({"bench": run}, Options(port=0)) as url:
        process, before = client(url.removeprefix("http://")), most_mib()
        while await trio.to_thread.run_sync(sys.stdin.readline):
            if sys.argv[3] == "later_ms":
                body = json.loads(sys.argv[2])["body"]
                later = []
                for _ in range(15):
                    over = (await trio.to_thread.run_sync(asked, process))["first_ms"]
                    later.append(over - await first_ms(run, body))
                show({"later_ms": statistics.median(later)})
            else:
                show({**await trio.to_thread.run_sync(asked, process), "server_mib": most_mib() - before})
        process.kill()
trio.run(main)
"""
)
_PEER = (
    ASKING
    + """
process = client(sys.argv[4])
for _ in sys.stdin:
    show(asked(process))
process.kill()
"""
)


def asking(count: int, path: str, body: Mapping[str, Any], slow: int = 0) -> str:
    """Return what http_client.py is asked for."""
    return json.dumps({"count": count, "path": path, "body": {**GREEDY, **body}, "slow": slow})


def served(asked: str, figure: str = "tokens_s") -> Contestant:
    """Return `ranvier serve` on the stored model in two stages.

    `figure` is one of http_client.py's, `later_ms`, or `server_mib`.
    """
    return Contestant(sys.executable, _OURS, CLIENT, asked, figure, graph_of(TWO, "stored"))


def llama_server(form: str, streams: int, asked: str, figure: str = "tokens_s") -> Contestant:
    """Return llama.cpp's server with two threads and a slot for each stream."""
    command, port = peers.server(form, streams)
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        peers.until_healthy(port)
    except peers.Missing:
        started.kill()
        raise
    own = json.loads(asked)
    own["body"]["cache_prompt"] = False  # the same prompt comes again in each turn
    asked = json.dumps(own)
    return Contestant(sys.executable, _PEER, CLIENT, asked, figure, f"127.0.0.1:{port}", with_it=[started])
