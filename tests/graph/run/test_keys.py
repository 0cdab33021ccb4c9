"""Run a graph over TCP with keys, from the command that makes them to the tokens."""

from __future__ import annotations

import contextlib
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
from ranvier.graph.file.errors import GraphError
from ranvier.transport.format.errors import AddressError
from ranvier.transport.format.header import Header, Row, TensorMeta
from ranvier.transport.wires.zeromq import ZeroWire

PROMPT = [1, 17, 40, 9, 300, 12, 77]


@pytest.mark.slow
def test_a_graph_with_keys(
    tiny: Callable[..., tuple[Path, Any]], split: Callable[[int, int], dict[str, Any]], graph_file: Callable[..., Path],
    exact: Callable[..., list[int]], runs: Path,
) -> None:  # fmt: skip
    """Give transformers' tokens with keys, while a stranger connects, and through a restart.

    Without keys, the check says how to make them."""
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
        [sys.executable, "-m", "ranvier", "keys", "new", str(path)],
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


def test_loopback_is_no_boundary_case_60(
    tiny: Callable[..., tuple[Path, Any]], split: Callable[[int, int], dict[str, Any]], graph_file: Callable[..., Path],
    exact: Callable[..., list[int]], runs: Path,
) -> None:  # fmt: skip
    """Make keys for a run whose graph has none, and delete them with the run.

    Other users cannot read them. A process without keys poses as an actor at every inbox all the time, and nothing that
    it sends is accepted."""
    folder, _ = tiny("llama")
    path = graph_file(model={"source": "./set", "dtype": "float32"}, transport="tcp://127.0.0.1", **split(2, 6))
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    forged = Header(1, 0, 2, 1, (Row(1, 1, len(PROMPT), 1),), (TensorMeta("sampled", 8, (1,), 0, 8),), 1, 1, 0).encode()

    async def main() -> Path:
        with trio.fail_after(60):
            async with ranvier.launch(graph, runs=runs) as run:
                keys = run.dir / "keys"
                assert keys.stat().st_mode & 0o777 == 0o700
                assert {file.stat().st_mode & 0o777 for file in keys.glob("*.key")} == {0o600}
                hosts = run._supervisor.supervision.hosts
                places = [host.address for host in hosts.values()] + [run._own.wire.wire.address]
                with zmq.Context() as context, contextlib.ExitStack() as stack:
                    evil = []
                    for address in places:
                        for name in (b"last.0.1", b"first.0.1", b"gateway.0.1"):
                            socket = stack.enter_context(context.socket(zmq.DEALER))
                            socket.linger = 0
                            socket.setsockopt(zmq.IDENTITY, name)
                            assert address is not None
                            assert address.startswith("tcp://127.0.0.1:")
                            socket.connect(address)
                            evil.append(socket)
                    for _ in range(3):
                        got = []
                        async for token in run.generate(PROMPT, max_tokens=20, stop_tokens=()):
                            got.append(token.id)
                            for socket in evil:
                                with contextlib.suppress(zmq.Again):
                                    socket.send_multipart([forged, bytes(8)], zmq.DONTWAIT)
                        assert got == exact(PROMPT, 20)
                assert not run.recoveries
                assert run.counters["gateway.0"].get("tokens_refused", 0) == 0
                return run.dir

    assert not (trio.run(main) / "keys").exists()


def test_tcp_without_keys_does_not_exist_case_60(tmp_path: Path) -> None:
    """Refuse to bind or connect over TCP without keys, even for code that uses the wires directly."""
    with pytest.raises(AddressError, match="tcp needs keys, on loopback, too"):
        ZeroWire("a.0.1", "tcp://127.0.0.1:0", max_frame_bytes=1 << 20)
    local = ZeroWire("a.0.1", f"ipc://{tmp_path}/a", max_frame_bytes=1 << 20)
    with pytest.raises(AddressError, match="tcp needs keys"):
        local.connect("b.0.1", "tcp://127.0.0.1:5555")
    local.close()
