"""Small messages past ZeroMQ: in order with the large ones, never lost where they do not fit, never trusted."""

from __future__ import annotations

import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ranvier.transport.format.errors import LinkClosed, ProtocolError
from ranvier.transport.links.link import Arrival
from ranvier.transport.wires import unix_sockets
from ranvier.transport.wires.endpoint import MAX_IPC_PATH_BYTES
from ranvier.transport.wires.zeromq import ZeroWire

Make = Callable[..., ZeroWire]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def wire(folder: Path) -> Iterator[Make]:
    """`wire(me)`: a wire at an ipc address with direct sockets, or without."""
    made: list[ZeroWire] = []

    def make(me: str, direct: bool = True) -> ZeroWire:
        made.append(ZeroWire(me, f"ipc://{folder}/{me}", max_frame_bytes=1 << 26, direct=direct))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def pair(wire: Make) -> tuple[ZeroWire, ZeroWire]:
    a, b = wire("a.0.1"), wire("b.0.1")
    a.connect("b.0.1", b.address)
    return a, b


def taken(wire: ZeroWire, count: int) -> list[Arrival]:
    arrivals = []
    deadline = time.monotonic() + 10
    while len(arrivals) < count and time.monotonic() < deadline:
        arrival = wire.receive(0.05)
        if arrival is not None:
            arrivals.append(arrival)
    return arrivals


def numbers(arrivals: list[Arrival]) -> list[int]:
    return [int(bytes(arrival.header)[6:]) for arrival in arrivals]


def test_small_and_large_ones_come_in_the_order_they_were_sent(pair: tuple[ZeroWire, ZeroWire]) -> None:
    """Whatever way each goes, and however many of them are large in a row."""
    a, b = pair
    sizes = [10, 300_000, 20, 400_000, 500_000, 30, 1_000_000, 5, 5, 300_000]
    for number, size in enumerate(sizes * 5):
        a.send("b.0.1", b"number%d" % number, [bytes([number]) * size, b"last"])
    arrivals = taken(b, 50)
    assert numbers(arrivals) == list(range(50))
    for number, (arrival, size) in enumerate(zip(arrivals, sizes * 5, strict=True)):
        assert bytes(arrival.buffers[0]) == bytes([number]) * size
        assert bytes(arrival.buffers[1]) == b"last"
    assert a.counters["direct_sent"] == 5 * 5


def test_tensors_can_be_read_in_place(pair: tuple[ZeroWire, ZeroWire]) -> None:
    """Each buffer begins at a multiple of 16 bytes and may be written to, as ZeroMQ's."""
    a, b = pair
    a.send("b.0.1", b"an odd header", [b"x" * 3, b"y" * 7, b"z" * 64])
    [arrival] = taken(b, 1)
    for buffer, expected in zip(arrival.buffers, (b"x" * 3, b"y" * 7, b"z" * 64), strict=True):
        assert bytes(buffer) == expected
        assert np.frombuffer(buffer, np.uint8).ctypes.data % unix_sockets.ALIGN == 0
        assert not memoryview(buffer).readonly


def test_what_a_full_socket_has_no_room_for_waits_in_order(pair: tuple[ZeroWire, ZeroWire]) -> None:
    """The sender never blocks; what is left goes out as the receiver reads, large ones in their places."""
    a, b = pair
    for number in range(300):
        a.send("b.0.1", b"number%d" % number, [b"x" * (300_000 if number % 100 == 99 else 50_000)])
    assert a._direct is not None
    assert a._direct._out["b.0.1"].backlog, "the socket was full"
    arrivals = []
    deadline = time.monotonic() + 20
    while len(arrivals) < 300 and time.monotonic() < deadline:
        assert a.receive(0) is None  # a host looks at its wire between its steps
        arrival = b.receive(0.01)
        if arrival is not None:
            arrivals.append(arrival)
    assert numbers(arrivals) == list(range(300))
    assert a.receive(0) is None
    assert not a._direct._out["b.0.1"].backlog
    a.send("b.0.1", b"number300", [b"x"])
    assert numbers(taken(b, 1)) == [300]


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_one_that_has_no_direct_sockets_is_reached_through_zeromq(which: str, wire: Make) -> None:
    a, b = wire("a.0.1", which != "sender"), wire("b.0.1", which != "receiver")
    a.connect("b.0.1", b.address)
    a.send("b.0.1", b"number1", [b"x"])
    a.send("b.0.1", b"number2", [b"x" * 1_000_000])
    assert numbers(taken(b, 2)) == [1, 2]
    assert a.counters["direct_sent"] == 0


def test_a_path_that_is_just_short_enough_for_zeromq(folder: Path) -> None:
    """No room for the suffix: all goes through ZeroMQ."""
    name = "n" * (MAX_IPC_PATH_BYTES - len(f"{folder}/"))
    a = ZeroWire("a.0.1", f"ipc://{folder}/a", max_frame_bytes=1 << 20, direct=True)
    b = ZeroWire("b.0.1", f"ipc://{folder}/{name}", max_frame_bytes=1 << 20, direct=True)
    try:
        a.connect("b.0.1", b.address)
        a.send("b.0.1", b"number1", [b"x"])
        assert numbers(taken(b, 1)) == [1]
        assert a.counters["direct_sent"] == 0
    finally:
        a.close()
        b.close()


def test_a_peer_that_has_gone_is_an_error_for_nobody(pair: tuple[ZeroWire, ZeroWire], wire: Make) -> None:
    """What was sent to it is lost, as on any broken connection; the links above send it again. What it sent before counts."""
    a, b = pair
    c = wire("c.0.1")
    c.connect("b.0.1", b.address)
    a.send("b.0.1", b"number1", [b"x"])
    a.send("b.0.1", b"number2", [b"x" * 1_000_000])
    a.send("b.0.1", b"number3", [b"x"])
    time.sleep(0.2)
    a.close()
    assert numbers(taken(b, 3)) == [1, 2, 3]
    b.close()
    for _ in range(3):
        c.send("b.0.1", b"number4", [b"x"])
    assert c._direct is not None
    assert not c._direct.reaches("b.0.1")
    with pytest.raises(LinkClosed):
        b.receive(0)


def test_a_large_message_that_is_lost_holds_the_next_only_so_long(
    pair: tuple[ZeroWire, ZeroWire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection broke. What comes after it is let go, and the gap is seen by who counts."""
    a, b = pair
    monkeypatch.setattr(unix_sockets, "BEHIND_S", 0.2)
    assert a._direct is not None
    assert a._direct.send("b.0.1", [b"number1", b"x" * 1_000_000]) is not None  # and never through ZeroMQ
    a.send("b.0.1", b"number2", [b"x"])
    assert b.receive(0.3) is None
    a.send("b.0.1", b"number3", [b"x"])
    assert numbers(taken(b, 2)) == [2, 3]
    a.send("b.0.1", b"number4", [b"x" * 1_000_000])
    a.send("b.0.1", b"number5", [b"x"])
    assert numbers(taken(b, 2)) == [4, 5]


@pytest.mark.parametrize(
    "packet",
    [
        b"\x01", struct.pack("<HI", 1, 5), struct.pack("<H", 60_000), struct.pack("<HI", 1, 1 << 31) + b"x",
        struct.pack("<HII", 2, 3, 3) + b"abcdef", b"\x00\x00", struct.pack("<HI", 1, 3) + b"abcd", b"x" * 300_000,
    ],
)  # fmt: skip
def test_a_packet_that_is_no_message_ends_that_peer_alone(
    packet: bytes, pair: tuple[ZeroWire, ZeroWire], folder: Path
) -> None:
    """The error names both sides; others are read on."""
    a, b = pair
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        stranger.connect(f"{folder}/b.0.1{unix_sockets.SUFFIX}")
        stranger.send(b"stranger.0.1")
        stranger.send(packet)
        with pytest.raises(ProtocolError, match=r"b\.0\.1: expected a message from stranger\.0\.1, got a packet of"):
            taken(b, 1)
        with pytest.raises(BrokenPipeError):
            stranger.send(b"more")
    a.send("b.0.1", b"number1", [b"x"])
    assert numbers(taken(b, 1)) == [1]


def test_nothing_is_left_behind(wire: Make, folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for round_number in range(20):
        a, b = wire(f"a.0.{round_number}"), wire(f"b.0.{round_number}")
        a.connect(b.me, b.address)
        a.send(b.me, b"number1", [b"x"])
        assert numbers(taken(b, 1)) == [1]
        a.disconnect(b.me)
        a.close()
        b.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert not list(folder.glob(f"*{unix_sockets.SUFFIX}"))


def test_a_socket_left_by_a_process_that_was_killed_is_taken_over(folder: Path) -> None:
    left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (folder / "b.lock").touch()  # that process claimed the place first
    left.bind(f"{folder}/b{unix_sockets.SUFFIX}")
    left.close()
    b = ZeroWire("b.0.2", f"ipc://{folder}/b", max_frame_bytes=1 << 20, direct=True)
    a = ZeroWire("a.0.1", f"ipc://{folder}/a", max_frame_bytes=1 << 20, direct=True)
    a.connect("b.0.2", b.address)
    a.send("b.0.2", b"number1", [b"x"])
    assert numbers(taken(b, 1)) == [1]
    assert a.counters["direct_sent"] == 1
    a.close()
    b.close()
