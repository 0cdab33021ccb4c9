"""A graph over tcp with keys, from the command that makes them to the tokens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import zmq

import ranvier
from ranvier.graph.errors import GraphError

PROMPT = [1, 17, 40, 9, 300, 12, 77]


def test_a_graph_with_keys(
    tiny: Callable[..., tuple[Path, Any]], split: Callable[[int, int], dict[str, Any]], graph_file: Callable[..., Path],
    exact: Callable[..., list[int]], runs: Path,
) -> None:  # fmt: skip
    """Without keys the check says how to make them; with them the tokens are those of transformers, beside strangers who try,
    and through a restart."""
    folder, _ = tiny("llama")
    path = graph_file(
        model={"source": "./set", "dtype": "float32"}, transport="tcp://127.0.0.1", keys="keys", **split(2, 6)
    )
    source = {"model.source": str(folder)}
    with pytest.raises(
        GraphError, match=r"keys/gateway\.key: No such file or directory; make keys with `ranvier keys new`"
    ):
        ranvier.load(path, overrides=source)
    outside = path.with_name("outside.yaml")
    outside.write_text(path.read_text().replace('"keys": "keys"', '"keys": "../keys"'))
    with pytest.raises(GraphError, match=r"keys '\.\./keys' leaves the graph's folder; give it by --set keys=PATH"):
        ranvier.load(outside, overrides=source)
    made = subprocess.run(
        [sys.executable, "-m", "ranvier.graph.entry", "keys", "new", str(path)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert [Path(line).name for line in made.stdout.split()] == [
        "gateway.key", "gateway.pub", "first.key", "first.pub", "last.key", "last.pub"
    ]  # fmt: skip

    async def main() -> None:
        with trio.fail_after(60):
            async with ranvier.launch(ranvier.load(path, overrides=source), runs=runs) as run:
                address = run._supervisor.supervision.hosts["first.0.1"].address
                assert address is not None
                with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
                    stranger.linger = 0
                    stranger.setsockopt(zmq.IDENTITY, b"gateway.0.1")
                    stranger.connect(address)
                    stranger.send(b"evil")
                    got = []
                    async for token in run.generate(PROMPT, max_tokens=100, stop_tokens=()):
                        got.append(token.id)
                        if len(got) == 5:
                            os.kill(run.pids["last.0.1"], signal.SIGKILL)
                assert got == exact(PROMPT, 100)
                assert "evil" not in (run.dir / "logs" / "supervisor.jsonl").read_text()
                assert [recovered.actor for recovered in run.recoveries] == ["last.0"]

    trio.run(main)
