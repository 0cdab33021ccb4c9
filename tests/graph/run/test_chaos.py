"""Give transformers' tokens over bad networks between real processes.

The case numbers are those of the faults in docs/reliability.md."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import zmq

import ranvier
from ranvier.graph.file.errors import GraphError
from ranvier.graph.run import chaos
from ranvier.transport.wires import curve

PROMPT = [1, 17, 40, 9, 300, 12, 77]
TCP = "tcp://127.0.0.1"
Tiny = Callable[..., tuple[Path, Any]]
MakeTcp = Callable[..., ranvier.Graph]


@pytest.fixture
def over_tcp(tiny: Tiny, split: Callable[[int, int], dict[str, Any]], graph_file: Callable[..., Path]) -> MakeTcp:
    """Provide a function that returns a graph of a small llama in two actors, with TCP between them."""
    folder, _ = tiny("llama")

    def make(transport: str = TCP, **settings: Any) -> ranvier.Graph:
        path = graph_file(model={"source": "./set", "dtype": "float32"}, transport=transport, **split(2, 6), **settings)
        return ranvier.load(path, overrides={"model.source": str(folder)})

    return make


@pytest.mark.parametrize(
    ("faults", "happened", "count"),
    [
        pytest.param({"cut_after_s": 0.2, "cut_for_s": 0.1}, "cut", 120, id="cut_for_100_ms_case_11"),
        pytest.param({"cut_after_s": 0.2, "cut_for_s": 10}, "refused", 120, id="cut_for_10_s_case_11", marks=pytest.mark.slow),
        pytest.param({"reset_after_bytes": 10_001}, "reset", 120, id="reset_in_a_frame_case_12"),
        pytest.param({"hole_after_s": 0.2, "hole_for_s": 1}, "swallowed", 120, id="black_hole_case_13", marks=pytest.mark.slow),
        pytest.param({"jitter_s": 0.2}, "delayed", 20, id="jitter_case_14", marks=pytest.mark.slow),
        pytest.param({"repeat": 1.0}, "repeated", 30, id="every_message_twice_case_15"),
        pytest.param({"reorder": 0.3}, "reordered", 30, id="out_of_order_case_16", marks=pytest.mark.slow),
        pytest.param({"flip": 0.3}, "flipped", 30, id="flipped_bits_case_17", marks=pytest.mark.slow),
        pytest.param({"slice_bytes": 7}, "sliced", 10, id="sliced"),
    ],
)  # fmt: skip
def test_a_bad_link(
    faults: dict[str, float], happened: str, count: int, over_tcp: MakeTcp, exact: Callable[..., list[int]],
    runs: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Give exact tokens over bad links.

    They are between the stages, and to the first stage, from the gateway and the last stage."""
    bad = tmp_path / "chaos.yaml"
    bad.write_text(
        json.dumps({"links": [{"from": "first", "to": "last", **faults}, {"to": "first", **faults, "seed": 3}]})
    )

    async def main() -> None:
        with trio.fail_after(60):
            async with ranvier.launch(over_tcp(), runs=runs, chaos=bad) as run:
                ids = [token.id async for token in run.generate(PROMPT, max_tokens=count, stop_tokens=())]
                assert ids == exact(PROMPT, count)
                assert run.counters["chaos"][happened] > 0
                assert not run.recoveries

    trio.run(main)


def test_a_frame_that_is_cut_off_or_too_long_ends_that_connection_alone_cases_18_19(
    over_tcp: MakeTcp, exact: Callable[..., list[int]], runs: Path
) -> None:
    """Close only the connection that sends a truncated or oversized frame.

    Instead of a handshake, raw connections to an inbox send half a frame, and a frame that claims 2^62 bytes. A member
    of the run, with its own key, sends a frame over the limit and a message of a million frames. The actor stays alive,
    and uses less than 200 MiB more memory."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15 + 1 + 31)
    assert len(greeting) == 64
    truncated = b"\x04" + bytes([200]) + b"\x05HELLO" + b"x" * 100
    endless = b"\x02" + struct.pack(">Q", 1 << 62) + b"x" * 100

    async def main() -> None:
        with trio.fail_after(60):
            async with ranvier.launch(over_tcp(max_frame_bytes=1 << 20), runs=runs) as run:
                first = run._supervisor.supervision.hosts["first.0.1"]
                assert first.address is not None
                port = int(first.address.rpartition(":")[2])
                before, log = memory(run.pids["first.0.1"]), run.dir / "logs" / "supervisor.jsonl"
                with contextlib.ExitStack() as stack:  # an end that is closed at once would discard what it has sent
                    for evil in (truncated, endless):
                        raw = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                        await trio.to_thread.run_sync(send, raw, greeting, evil)
                        ids = [token.id async for token in run.generate(PROMPT, max_tokens=4, stop_tokens=())]
                        assert ids == exact(PROMPT, 4)
                    context = stack.enter_context(zmq.Context())
                    for name, frames in ((b"last.8.8", [bytes(2 << 20)]), (b"last.9.9", [b"x"] * 1_000_000)):
                        member = stack.enter_context(context.socket(zmq.DEALER))
                        member.linger = 0
                        member.setsockopt(zmq.IDENTITY, name)
                        curve.present(member, curve.read(run.dir / "keys", "last"), "first.0.1")
                        member.connect(first.address)
                        await trio.to_thread.run_sync(member.send_multipart, frames)
                        ids = [token.id async for token in run.generate(PROMPT, max_tokens=4, stop_tokens=())]
                        assert ids == exact(PROMPT, 4)
                    while "expected at most 64 tensor frames from b'last.9.9'" not in log.read_text():
                        await trio.sleep(0.05)
                ids = [token.id async for token in run.generate(PROMPT, max_tokens=4, stop_tokens=())]
                assert ids == exact(PROMPT, 4)
                assert memory(run.pids["first.0.1"]) - before < 200 << 20

    trio.run(main)


def send(raw: socket.socket, greeting: bytes, data: bytes) -> None:
    """Send the greeting, wait for the peer's greeting, and send the data."""
    raw.settimeout(10)
    raw.sendall(greeting)
    while len(raw.recv(64, socket.MSG_PEEK)) < 64:  # the peer's version must arrive before the data is sent
        pass
    try:
        raw.sendall(data)
    except OSError:  # the peer has closed the connection, as it should
        return


def memory(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_what_a_chaos_file_says_wrongly(
    tmp_path: Path, over_tcp: MakeTcp, graph_file: Callable[..., Path], runs: Path
) -> None:
    """Report line and column of an error in a chaos file, and refuse a graph without TCP links."""
    bad = tmp_path / "chaos.yaml"
    bad.write_text("links:\n  - {from: a, flip: 2}\n  - {speed: 1}\n")
    with pytest.raises(GraphError) as caught:
        chaos.read(bad)
    assert f"{bad}:2:21: links.0.flip: Input should be less than or equal to 1" in str(caught.value)
    assert f"{bad}:3:13: links.1.speed: Extra inputs are not permitted" in str(caught.value)
    bad.write_text("links:\n  - {flip: 0.5}\n")
    local = over_tcp("ipc")

    async def main() -> None:
        async with ranvier.launch(local, runs=runs, chaos=bad):
            raise AssertionError("not reached")

    with pytest.raises(ranvier.RequestError, match="chaos is for tcp links, and this graph has none"):
        trio.run(main)
