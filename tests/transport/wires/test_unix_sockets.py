"""Carry messages over Unix sockets: in order whatever their size, never lost where they do not fit, never trusted."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ranvier.transport.format.errors import AddressError, LinkClosed, ProtocolError
from ranvier.transport.links.wire import Arrival
from ranvier.transport.wires import packets, unix_sockets
from ranvier.transport.wires.endpoint import MAX_PATH_BYTES
from ranvier.transport.wires.local import LocalWire
from ranvier.transport.wires.zeromq import ZeroWire

Make = Callable[..., LocalWire]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def wire(folder: Path) -> Iterator[Make]:
    """`wire(me)`: a local wire that shares no memory."""
    made: list[LocalWire] = []

    def make(me: str) -> LocalWire:
        made.append(LocalWire(me, f"local://{folder}/{me}", max_frame_bytes=1 << 26))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def pair(wire: Make) -> tuple[LocalWire, LocalWire]:
    a, b = wire("a.0.1"), wire("b.0.1")
    a.connect("b.0.1", b.address)
    return a, b


def taken(wire: LocalWire, count: int, sender: LocalWire | None = None) -> list[Arrival]:
    """Return what arrives, up to `count` messages.

    A sender sends on what its socket had no room for when it receives from its own wire.
    """
    arrivals = []
    deadline = time.monotonic() + 20
    while len(arrivals) < count and time.monotonic() < deadline:
        if sender is not None:
            assert sender.receive(0) is None
        arrival = wire.receive(0.01)
        if arrival is not None:
            arrivals.append(arrival)
    return arrivals


def numbers(arrivals: list[Arrival]) -> list[int]:
    return [int(bytes(arrival.header)[6:]) for arrival in arrivals]


def test_small_and_large_ones_come_in_the_order_they_were_sent(pair: tuple[LocalWire, LocalWire]) -> None:
    """Keep the order whether a message takes one packet or many, and give every byte back."""
    a, b = pair
    sizes = [10, 300_000, 20, 400_000, 500_000, 30, 1_000_000, 5, 5, 300_000]
    data = os.urandom(1_000_000)
    for number, size in enumerate(sizes * 5):
        a.send("b.0.1", b"number%d" % number, [data[:size], b"last"])
    arrivals = taken(b, 50, sender=a)
    assert numbers(arrivals) == list(range(50))
    for arrival, size in zip(arrivals, sizes * 5, strict=True):
        assert bytes(arrival.buffers[0]) == data[:size]
        assert bytes(arrival.buffers[1]) == b"last"
    assert a.counters["in_pieces"] == 5 * 5


@pytest.mark.parametrize("around", [0, 16, 200_000, 256 << 10, 512 << 10])
def test_every_size_around_that_of_a_packet(around: int, pair: tuple[LocalWire, LocalWire]) -> None:
    """Lose no byte where a message just fits into its packets, or just does not."""
    a, b = pair
    most = a._sockets._out["b.0.1"].most_bytes
    for size in range(max(0, min(around, 2 * most) - 40), min(around, 2 * most) + 40):
        data = os.urandom(size)
        a.send("b.0.1", b"number%d" % size, [data, b"", data[:7]])
        [arrival] = taken(b, 1, sender=a)
        assert [bytes(buffer) for buffer in arrival.buffers] == [data, b"", data[:7]]


def test_tensors_can_be_read_in_place(pair: tuple[LocalWire, LocalWire]) -> None:
    """Begin each buffer at a multiple of 16 bytes, writable as ZeroMQ's are, whether it came in one packet or in several."""
    a, b = pair
    for first in (b"x" * 3, b"x" * 1_000_003):
        a.send("b.0.1", b"an odd header", [first, b"y" * 7, b"z" * 64])
        [arrival] = taken(b, 1, sender=a)
        for buffer, expected in zip(arrival.buffers, (first, b"y" * 7, b"z" * 64), strict=True):
            assert bytes(buffer) == expected
            assert np.frombuffer(buffer, np.uint8).ctypes.data % packets.ALIGN == 0
            assert not memoryview(buffer).readonly


def test_what_waits_for_room_cannot_be_changed(pair: tuple[LocalWire, LocalWire]) -> None:
    """A caller that fills its buffer again changes nothing that it has sent before."""
    a, b = pair
    data = np.full(3_000_000, 7, np.uint8)
    a.send("b.0.1", b"number0", [data.data])
    assert a._sockets._out["b.0.1"].backlog, "the socket is full"
    data[:] = 9
    [arrival] = taken(b, 1, sender=a)
    assert set(bytes(arrival.buffers[0])) == {7}


def test_what_a_full_socket_has_no_room_for_waits_in_order(pair: tuple[LocalWire, LocalWire]) -> None:
    """The sender never blocks; the rest goes out as the receiver reads."""
    a, b = pair
    for number in range(300):
        a.send("b.0.1", b"number%d" % number, [b"x" * (300_000 if number % 100 == 99 else 50_000)])
    out = a._sockets._out["b.0.1"]
    assert out.backlog, "the socket was full"
    assert numbers(taken(b, 300, sender=a)) == list(range(300))
    assert a.receive(0) is None
    assert not out.backlog
    a.send("b.0.1", b"number300", [b"x"])
    assert numbers(taken(b, 1)) == [300]


def test_a_path_that_is_too_long_is_refused(folder: Path) -> None:
    name = "n" * (MAX_PATH_BYTES + 1 - len(f"{folder}/"))
    with pytest.raises(AddressError, match=f"at most {MAX_PATH_BYTES} are possible"):
        LocalWire("a.0.1", f"local://{folder}/{name}", max_frame_bytes=1 << 20)


def test_a_process_has_one_wire(folder: Path, wire: Make) -> None:
    """Neither wire takes the address of the other."""
    a = wire("a.0.1")
    with pytest.raises(AddressError, match=r"expected an address local:///path, got ipc://"):
        a.connect("b.0.1", f"ipc://{folder}/b")
    b = ZeroWire("b.0.1", f"ipc://{folder}/b", max_frame_bytes=1 << 20)
    with pytest.raises(AddressError, match=r"expected an ipc, tcp or inproc address, got local://"):
        b.connect("a.0.1", a.address)
    b.close()


def test_a_peer_that_has_gone_is_an_error_for_nobody(pair: tuple[LocalWire, LocalWire], wire: Make) -> None:
    """What was sent to it is lost, as on any broken connection; the links above send it again. What it sent before counts."""
    a, b = pair
    c = wire("c.0.1")
    c.connect("b.0.1", b.address)
    a.send("b.0.1", b"number1", [b"x"])
    a.send("b.0.1", b"number2", [b"x" * 150_000])
    a.close()
    assert numbers(taken(b, 2)) == [1, 2]
    b.close()
    for _ in range(3):
        c.send("b.0.1", b"number4", [b"x"])
    assert c._sockets._out["b.0.1"].socket is None
    with pytest.raises(LinkClosed):
        b.receive(0)
    with pytest.raises(LinkClosed):
        a.send("z.0.1", b"number1", [])


def test_a_peer_that_comes_back_is_reached_again(pair: tuple[LocalWire, LocalWire], folder: Path) -> None:
    """A connection that broke is made anew, and nothing of a message that it cut in two is taken for another one."""
    a, b = pair
    a.send("b.0.1", b"number1", [b"x" * 4_000_000])  # more than fits: the rest waits
    assert b.receive(0) is None
    b.close()
    a.send("b.0.1", b"number2", [b"x" * 4_000_000])
    again = LocalWire("b.0.1", f"local://{folder}/b.0.1", max_frame_bytes=1 << 26)
    deadline = time.monotonic() + 10
    arrivals: list[Arrival] = []
    number = 3
    while not arrivals and time.monotonic() < deadline:
        a.send("b.0.1", b"number%d" % number, [b"y"])
        number += 1
        assert a.receive(0.01) is None
        arrival = again.receive(0.01)
        arrivals += [arrival] if arrival is not None else []
    assert arrivals
    assert bytes(arrivals[0].buffers[0]) in (b"y", b"x" * 4_000_000)
    again.close()


@pytest.mark.parametrize(
    "packet",
    [
        b"\x01", struct.pack("<HI", 1, 5), struct.pack("<H", 60_000), struct.pack("<HI", 1, 1 << 31) + b"x",
        struct.pack("<HII", 2, 3, 3) + b"abcdef", b"\x00\x00", struct.pack("<HI", 1, 3) + b"abcd", b"x" * 300_000,
        struct.pack("<HHI", 0xFFFF, 1, (1 << 32) - 1), struct.pack("<HH", 0xFFFF, 0), struct.pack("<H", 0xFFFF),
        struct.pack("<HHI", 0xFFFF, 1, 1000) + b"too much",
    ],
)  # fmt: skip
def test_a_packet_that_is_no_message_ends_that_peer_alone(
    packet: bytes, pair: tuple[LocalWire, LocalWire], folder: Path
) -> None:
    """The error names both sides, memory is not taken for what is only announced, and others are read on."""
    a, b = pair
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        stranger.connect(f"{folder}/b.0.1")
        stranger.send(b"stranger.0.1")
        stranger.send(packet)
        with pytest.raises(ProtocolError, match=r"b\.0\.1: expected a message from stranger\.0\.1.* got a packet of"):
            taken(b, 1)
        with pytest.raises(BrokenPipeError):
            stranger.send(b"more")
    a.send("b.0.1", b"number1", [b"x"])
    assert numbers(taken(b, 1)) == [1]


def test_without_descriptors_a_connection_waits_and_uses_no_core(wire: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that cannot be accepted is accepted later; until then the wire sleeps between its attempts."""
    b = wire("b.0.1")
    accept, refused = b._sockets._listener.accept, []

    class Full:
        def accept(self) -> tuple[socket.socket, object]:
            if len(refused) < 3:
                refused.append(time.monotonic())
                raise OSError(24, "Too many open files")
            return accept()

        def __getattr__(self, name: str) -> object:
            return getattr(listener, name)

    listener = b._sockets._listener
    monkeypatch.setattr(b._sockets, "_listener", Full())
    a = wire("a.0.1")
    a.connect("b.0.1", b.address)
    a.send("b.0.1", b"number1", [b"x"])
    assert numbers(taken(b, 1)) == [1]
    assert len(refused) == 3
    assert refused[2] - refused[0] >= unix_sockets.RETRY_S


def test_nothing_is_left_behind(wire: Make, folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for round_number in range(20):
        a, b = wire(f"a.0.{round_number}"), wire(f"b.0.{round_number}")
        a.connect(b.me, b.address)
        waker = a.waker()
        a.send(b.me, b"number1", [b"x"])
        assert numbers(taken(b, 1)) == [1]
        a.disconnect(b.me)
        waker.close()
        a.close()
        b.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert not [path for path in folder.iterdir() if path.is_socket()]


def test_a_socket_left_by_a_process_that_was_killed_is_taken_over(folder: Path) -> None:
    left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (folder / "b.lock").touch()  # that process claimed the path first
    left.bind(f"{folder}/b")
    left.close()
    b = LocalWire("b.0.2", f"local://{folder}/b", max_frame_bytes=1 << 20)
    a = LocalWire("a.0.1", f"local://{folder}/a", max_frame_bytes=1 << 20)
    a.connect("b.0.2", b.address)
    a.send("b.0.2", b"number1", [b"x"])
    assert numbers(taken(b, 1)) == [1]
    a.close()
    b.close()
