"""Lend large tensors through shared memory once, take them back with the last view, and send them over the socket where memory cannot be shared."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from linux import only_linux

from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.links.wire import Arrival
from ranvier.transport.wires import shared_memory
from ranvier.transport.wires.local import LocalWire
from ranvier.transport.wires.shared_memory import Borrower, Lender, Loan

MIB = 1 << 20
Pair = tuple[LocalWire, LocalWire]


@pytest.fixture
def wires() -> Iterator[Callable[..., Pair]]:
    """Two local wires that know each other and share from 64 KiB on."""
    folder = tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp")
    made: list[LocalWire] = []

    def make(theirs: int = 1 << 16) -> Pair:
        for name, from_bytes in (("a.0.1", 1 << 16), ("b.0.1", theirs)):
            made.append(
                LocalWire(name, f"local://{folder.name}/{name}", max_frame_bytes=1 << 26, shared_from_bytes=from_bytes)
            )
        a, b = made
        a.connect("b.0.1", b.address)
        b.connect("a.0.1", a.address)
        return a, b

    yield make
    for wire in made:
        wire.close()
    folder.cleanup()


def data(value: int, nbytes: int = MIB) -> memoryview:
    return torch.full((nbytes,), value, dtype=torch.uint8).numpy().data


def hop(a: LocalWire, b: LocalWire, value: int, nbytes: int = MIB) -> Arrival:
    """One message from a to b, and time for what the wires tell each other."""
    a.send("b.0.1", b"header", [data(value, nbytes)])
    arrival = None
    deadline = time.monotonic() + 10
    while arrival is None and time.monotonic() < deadline:
        assert a.receive(0) is None  # pieces that its socket has no room for go out as it looks
        arrival = b.receive(0.01)
    assert arrival is not None
    assert bytes(arrival.header) == b"header"
    assert len(arrival.buffers[0]) == nbytes
    assert set(arrival.buffers[0][::4096]) == {value}
    settle(a, b)
    return arrival


def settle(a: LocalWire, b: LocalWire) -> None:
    for _ in range(2):
        assert b.receive(0.005) is None
        assert a.receive(0.005) is None


def test_the_first_goes_over_the_wire_and_the_others_share_two_segments(wires: Callable[..., Pair]) -> None:
    """What both say first is who can read whose memory. One message after the other needs no more than two segments."""
    a, b = wires()
    hop(a, b, 1)
    assert a.counters["shared_sent"] == 0
    for value in range(2, 12):
        hop(a, b, value)
    assert a.counters["shared_sent"] == 10
    # one is still held while the next is sent; and there are the random bytes of the beginning
    assert a._sharing.lender.held_bytes <= 2 * MIB + shared_memory.ROUND_BYTES
    hop(a, b, 12, 1000)
    assert a.counters["shared_sent"] == 10, "small ones are not worth it"


def test_a_view_keeps_its_bytes_as_long_as_anyone_holds_it(wires: Callable[..., Pair]) -> None:
    """A tensor that an actor keeps is never written over, whatever comes after it."""
    a, b = wires()
    hop(a, b, 0)
    kept = [torch.frombuffer(hop(a, b, value).buffers[0], dtype=torch.uint8)[5:] for value in range(1, 6)]
    for value in range(100, 120):
        hop(a, b, value)
    for value, tensor in enumerate(kept, 1):
        assert int(tensor.min()) == int(tensor.max()) == value
    held = a._sharing.lender.held_bytes
    kept.clear()
    settle(a, b)
    for value in range(120, 126):
        hop(a, b, value)
    assert a._sharing.lender.held_bytes == held, "what was given back is lent again"


def test_writing_into_what_one_was_lent_changes_nobody_elses(wires: Callable[..., Pair]) -> None:
    a, b = wires()
    hop(a, b, 0)
    source = torch.full((MIB,), 7, dtype=torch.uint8)
    a.send("b.0.1", b"header", [source.numpy().data])
    arrival = b.receive(5)
    assert arrival is not None
    torch.frombuffer(arrival.buffers[0], dtype=torch.uint8).fill_(9)
    assert int(source.max()) == 7
    del arrival
    settle(a, b)
    hop(a, b, 8)


def test_more_than_may_be_lent_goes_over_the_wire(wires: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = wires()
    a._sharing.lender = Lender(most_bytes=2 * MIB + shared_memory.ROUND_BYTES)
    hop(a, b, 0)
    kept = [hop(a, b, value) for value in range(1, 6)]
    assert (a.counters["shared_sent"], a.counters["shared_full"]) == (2, 3)
    assert a._sharing.lender.held_bytes <= 2 * MIB + shared_memory.ROUND_BYTES
    kept.clear()
    settle(a, b)
    hop(a, b, 9)
    assert a.counters["shared_sent"] == 3


@pytest.mark.parametrize("how", ["not open", "not enough memory"])
def test_where_memory_cannot_be_shared_nothing_is_lost(
    how: str, wires: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's process, or none left of what segments are made of: the tensors go over the wire."""
    if how == "not open":
        monkeypatch.setattr(shared_memory, "_map", lambda peer, loan: (_ for _ in ()).throw(ProtocolError("not yours")))
    else:
        monkeypatch.setattr(os, "memfd_create", lambda *_: (_ for _ in ()).throw(OSError(24, "too many open files")))
    a, b = wires()
    for value in range(5):
        hop(a, b, value)
    assert a.counters["shared_sent"] == 0


def test_a_peer_that_stops_reading_is_sent_the_next_over_the_wire(
    wires: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message whose loan could not be mapped is refused (the link asks for it again), and none after it."""
    a, b = wires()
    hop(a, b, 0)
    with monkeypatch.context() as patched:
        patched.setattr(
            shared_memory, "_map", lambda peer, loan: (_ for _ in ()).throw(ProtocolError("out of descriptors"))
        )
        a.send("b.0.1", b"header", [data(1)])
        with pytest.raises(ProtocolError, match="out of descriptors"):
            b.receive(5)
    settle(a, b)
    hop(a, b, 2)
    assert a.counters["shared_sent"] == 1


def test_segments_are_bounded_and_leave_nothing(wires: Callable[..., Pair]) -> None:
    """Many sizes: what is idle stays under its bound, what is dropped is unmapped at the other end, descriptors go back."""
    a, b = wires()
    before = len(os.listdir("/proc/self/fd"))
    a._sharing.lender = Lender(most_bytes=8 * MIB, most_idle_bytes=4 * MIB)
    for size in [*range(1, 6), *range(5, 0, -1)] * 3:
        hop(a, b, size, size * MIB)
    assert a.counters["shared_sent"] >= 20
    assert a._sharing.lender.held_bytes <= 4 * MIB + shared_memory.ROUND_BYTES
    mapped = sum(len(memory) for memory in b._sharing.borrower._mapped.values())
    assert mapped <= a._sharing.lender.held_bytes, "the last are unmapped though nothing is sent any more"
    b.disconnect("a.0.1")
    a.disconnect("b.0.1")
    a._sharing.lender.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert not [path for path in Path("/dev/shm").iterdir() if "ranvier" in path.name]


def test_a_peer_that_is_gone_takes_its_loans_along() -> None:
    lender = Lender()
    loans = [lent[0] for number in range(3) if (lent := lender.lend("b", data(number))) is not None]
    held = lender.held_bytes
    assert held == 3 * MIB
    lender.returned("c", [loan.segment for loan in loans])
    lender.forget("b")
    assert lender.lend("c", data(9)) is not None
    assert lender.held_bytes == held
    lender.close()


@only_linux
@pytest.mark.parametrize("what", ["another size", "not sealed", "no such descriptor", "more than it holds"])
def test_a_loan_that_is_not_what_it_says(what: str) -> None:
    """Nothing is mapped that could be pulled away, and nothing past its end."""
    lender, borrower = Lender(), Borrower()
    lent = lender.lend("b", data(1))
    assert lent is not None
    loan = lent[0]
    unsealed = os.memfd_create("test")
    os.ftruncate(unsealed, loan.size)
    wrong = {
        "another size": loan._replace(size=2 * loan.size), "not sealed": loan._replace(fd=unsealed),
        "no such descriptor": loan._replace(fd=9999), "more than it holds": loan._replace(nbytes=loan.size + 1),
    }[what]  # fmt: skip
    with pytest.raises(ProtocolError, match="a segment of a"):
        borrower.view("a", wrong)
    os.close(unsealed)
    lender.close()


@pytest.mark.parametrize(
    "frames",
    [
        [b"\x93"],
        [msgspec.msgpack.encode([4, [[0, [1, 2, 3, 4, 5]]]])],
        [msgspec.msgpack.encode([4, [[5, [1, 2, 3, 4, 5]]]]), b"header", b""],
        [msgspec.msgpack.encode([4, [[0, [-1, 2, 3, 4, 5]]]]), b"header", b"not empty"],
        [msgspec.msgpack.encode([9, 1]), b"header"],
        [b"x" * 70_000, b"header"],
    ],
)
def test_rubbish_of_a_wires_own_is_refused(frames: list[bytes], wires: Callable[..., Pair]) -> None:
    a, b = wires()
    a.send("b.0.1", b"", frames)
    with pytest.raises(ProtocolError, match=r"b\.0\.1: expected"):
        b.receive(5)
    hop(a, b, 1)


def test_the_senders_own_view_stays_as_it_is_until_it_ends() -> None:
    """What may have to be sent again is not written over when the receiver has given it back."""
    lender = Lender()
    first = lender.lend("b", data(1))
    assert first is not None
    lender.returned("b", [first[0].segment])
    second = lender.lend("b", data(2))
    assert second is not None
    assert second[0].segment != first[0].segment
    assert set(first[1][::4096]) == {1}
    lender.returned("b", [second[0].segment])
    number = first[0].segment
    del first
    third = lender.lend("b", data(3))
    assert third is not None
    assert third[0].segment == number
    lender.close()


def test_a_loan_is_plain_numbers() -> None:
    loan = Loan(1, 2, 3, 4, 5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(loan), type=Loan) == loan
