"""Check what `ranvier top` shows of a real run, that it leaves nothing behind, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from linux import only_linux
from rich.console import Console

import ranvier
from ranvier.graph.commands import top
from ranvier.graph.trace.tail import Tail

COMMAND = [sys.executable, "-m", "ranvier", "top"]


def graph_of(tiny: Any, graph_file: Callable[..., Path], split: Any) -> ranvier.Graph:
    """Return a graph of a small llama in two actors."""
    path = graph_file(model={"source": "unset", "dtype": "float32"}, **split(2, 6))
    return ranvier.load(path, overrides={"model.source": str(tiny("llama")[0])})


def files(folder: Path) -> set[str]:
    """Return the paths of everything in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


async def stream(run: ranvier.Run, prompt: list[int]) -> None:
    """Generate tokens to the end."""
    async for _ in run.generate(prompt, max_tokens=480, stop_tokens=()):
        pass


@only_linux
def test_what_it_shows_of_a_run(tiny: Any, graph_file: Callable[..., Path], split: Any, runs: Path) -> None:
    """Show states, processes, rates, KV use and edges of a run with two streams, and leave no file in its folder."""
    graph = graph_of(tiny, graph_file, split)

    async def main() -> tuple[dict[str, Any], dict[str, int]]:
        with trio.fail_after(60):
            async with ranvier.launch(graph, runs=runs) as run, trio.open_nursery() as nursery:

                async def for_ever(prompt: list[int]) -> None:
                    while True:
                        await stream(run, prompt)

                nursery.start_soon(for_ever, [1, 2, 3])
                nursery.start_soon(for_ever, [4, 5])
                tail = Tail(run.dir)
                while len(tail.actors()) < len(run.pids) + 1:  # records are shipped every 0.4 s
                    await trio.sleep(0.05)
                    tail.read()
                before = files(run.dir)
                done = await trio.run_process([*COMMAND, str(run.dir), "--json"], capture_stdout=True)
                assert files(run.dir) == before
                nursery.cancel_scope.cancel()
                return json.loads(done.stdout), dict(run.pids)
        raise AssertionError

    told, pids = trio.run(main)
    assert {host["label"]: host["pid"] for host in told["hosts"]} == {
        key.rpartition(".")[0]: pid for key, pid in pids.items()
    }
    assert 0 <= told["sessions"] <= 2
    for host in told["hosts"]:
        assert host["state"] == "running"
        assert host["tokens_per_second"] > 1
        assert 1 <= host["tokens_a_step"]["p50"] <= 2
        assert 0 < host["busy"] <= 1
        assert host["resident_bytes"] > 1 << 20
    assert any(0 < (host["kv_use"] or 0) < 1 for host in told["hosts"])
    assert all(edge["messages_per_second"] > 0 and edge["wire_us"]["p50"] > 0 for edge in told["edges"])
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(top.view(told))
    text = captured.get()
    for word in ("tok/s", "running", *(host["label"] for host in told["hosts"]), told["edges"][0]["edge"]):
        assert word in text


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the run ends", "ctrl-c"])
def test_it_ends(how: str, tiny: Any, graph_file: Callable[..., Path], split: Any, runs: Path) -> None:
    """End in a real terminal, with the run or by Ctrl-C, and restore the screen."""
    graph = graph_of(tiny, graph_file, split)
    here, there = pty.openpty()
    pieces: list[bytes] = []

    def watch() -> None:  # as a terminal does, because a process whose output is not read is blocked
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(here, 1 << 16):
                pieces.append(data)

    watcher = threading.Thread(target=watch)

    async def main() -> subprocess.Popen[bytes]:
        with trio.fail_after(60):
            async with ranvier.launch(graph, runs=runs) as run:
                process = subprocess.Popen([*COMMAND, str(run.dir), "--interval", "0.2"], stdout=there, stderr=there)
                os.close(there)
                watcher.start()
                await stream(run, [1, 2, 3])
                while b"tok/s" not in b"".join(pieces):
                    await trio.sleep(0.02)
                if how == "ctrl-c":
                    process.send_signal(signal.SIGINT)
                    await trio.to_thread.run_sync(process.wait, 10)
        return process

    process = trio.run(main)
    watcher.join(10)
    os.close(here)
    drawn = b"".join(pieces)
    assert process.wait(10) == (130 if how == "ctrl-c" else 0), drawn.decode()
    assert b"tok/s" in drawn
    assert b"\x1b[?1049h" in drawn and b"\x1b[?1049l" in drawn
    assert b"Traceback" not in drawn
    assert (b"the run is over" in drawn) == (how != "ctrl-c")


def test_a_run_that_is_over(tmp_path: Path) -> None:
    """Refuse a run that is over."""
    (tmp_path / "plan.json").write_text("{}")
    done = subprocess.run([*COMMAND, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (2, f"ranvier: {tmp_path}: this run is over")


def test_a_line_that_is_not_whole_yet_is_read_later(tmp_path: Path) -> None:
    """Leave an incomplete line of the trace for the next read."""
    (tmp_path / "plan.json").write_text(json.dumps({"edges": [{"name": "a.y -> b.x"}]}))
    (tmp_path / "trace").mkdir()
    line = json.dumps(["done", 0, 1, 8, 1000, 2000, 3000, 1_000_003_000, 1, [[1, 1, 0, 3]], "a.0.1"])
    file = tmp_path / "trace" / "b.0.jsonl"
    file.write_text(json.dumps({"actor": "b.0"}) + "\n" + line[:20])
    tail = Tail(tmp_path)
    tail.read()
    assert tail.actors() == {}
    with file.open("a") as more:
        more.write(line[20:] + "\n")
    tail.read()
    assert tail.actors()["b.0"]["tokens_per_second"] == pytest.approx(3)
    assert tail.edges()[0]["wire_us"]["p50"] == 1.0
