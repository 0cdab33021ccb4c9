"""Deliver everything once and in order over a wire that loses, repeats, reorders, delays and damages."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Row, TensorMeta
from ranvier.transport.format.host_id import host_id
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.format.tensors import from_buffer, to_buffer
from ranvier.transport.links.exchange import Exchange, RefusedMessage
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.links.link_state import Outbound
from ranvier.transport.wires.testing import Carried, Fault, MemoryNetwork

LINK = LinkSpec(
    0,
    "a.x -> b.x",
    host_id("a.0.1"),
    host_id("b.0.1"),
    (("x", TensorSpec("int64", ("tokens",))),),
    6,
    1 << 20,
    wire="tcp",
)


class Pair:
    """Hold both ends of one link on a memory network in virtual time."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.network = MemoryNetwork()
        self.wires = {me: self.network.wire(me) for me in ("a.0.1", "b.0.1")}
        self.ends = {me: Exchange(me, "g", [LINK], self.network.clock) for me in self.wires}
        self.got: list[int] = []
        self.errors: list[ProtocolError] = []
        self.ends["a.0.1"].open()
        self.network.fault = fault

    def send(self, number: int) -> None:
        """Send a message with this number from a to b."""
        a = self.ends["a.0.1"]
        meta, buffer = to_buffer("x", torch.tensor([number]))
        a.send(a.sending[0, "b.0.1"], Outbound((Row(1, 1, number, 1),), (meta,), (buffer,), self.network.clock()))

    def run(self, rounds: int) -> None:
        """Deliver messages for `rounds` half seconds."""
        for turn in range(rounds):
            for me, end in self.ends.items():
                wire = self.wires[me]
                while (arrival := wire.receive(0)) is not None:
                    try:
                        received = end.on_arrival(arrival)
                    except ProtocolError as error:
                        self.errors.append(error)
                        continue
                    if received is not None:
                        header, buffers = received.header, received.buffers
                        self.got += from_buffer(header.tensors[0], buffers[0]).tolist()
                        end.consumed(received.link, received.nbytes)
                end.idle()
                if turn % 4 == 3:
                    end.tick()
                for out in end.outbox:
                    wire.send(out.peer, out.header, out.buffers)
                end.outbox.clear()
            self.network.advance(0.5)


@pytest.mark.parametrize("seed", range(20))
def test_everything_arrives_once_and_in_order(seed: int) -> None:
    """Deliver everything once and in order, in virtual time (cases 14 to 17).

    A fifth is lost, and a tenth each is repeated, late or has a flipped bit, at random by a seed."""
    rng = random.Random(seed)
    happened: dict[str, int] = {"lost": 0, "twice": 0, "late": 0, "flipped": 0}

    def fault(crossing: Carried) -> Sequence[Carried]:
        dice = rng.random()
        if dice < 0.2:
            happened["lost"] += 1
            return []
        if dice < 0.3:
            happened["twice"] += 1
            return [crossing, crossing]
        if dice < 0.4:
            happened["late"] += 1
            return [
                Carried(
                    crossing.number, crossing.source, crossing.target, crossing.header, crossing.buffers, 900_000_000
                )
            ]
        if dice < 0.5 and crossing.buffers:
            happened["flipped"] += 1
            return [crossing.damaged(rng.randrange(8))]
        return [crossing]

    pair = Pair(fault)
    for number in range(60):
        pair.send(number)
    pair.run(1200)
    assert pair.got == list(range(60))
    assert all(happened.values()), happened
    counters = pair.ends["b.0.1"].counters
    assert counters["damaged"] > 0
    assert counters["duplicate"] > 0
    assert pair.ends["a.0.1"].counters["sent_again"] > 0
    assert not pair.ends["a.0.1"].unfinished()


def test_a_repeated_message_is_dropped_case_15() -> None:
    """Drop a repeated message."""
    pair = Pair(lambda crossing: [crossing, crossing])
    for number in range(10):
        pair.send(number)
    pair.run(20)
    assert pair.got == list(range(10))
    assert pair.ends["b.0.1"].counters["duplicate"] >= 10


def test_a_gap_is_asked_for_once_case_16() -> None:
    """Request a lost message once, and not again for each message after it."""
    lost: list[int] = []

    def fault(crossing: Carried) -> Sequence[Carried]:
        if crossing.buffers and not lost:
            lost.append(crossing.number)
            return []
        return [crossing]

    pair = Pair(fault)
    pair.run(2)
    for number in range(6):
        pair.send(number)
    pair.run(8)
    assert pair.got == list(range(6))
    assert len(lost) == 1
    assert pair.ends["b.0.1"].counters["asked_again"] == 1


def test_a_message_that_does_not_fit_its_edge_names_its_rows() -> None:
    """Name the rows of a message that does not fit its edge, and continue the link."""
    pair = Pair()
    pair.run(3)
    a = pair.ends["a.0.1"]
    link = a.sending[0, "b.0.1"]
    rows = (Row(7, 1, 0, 1),)
    meta = TensorMeta("x", 8, (1,), 0, 4)
    with pytest.raises(ProtocolError, match=r"edge a.x -> b.x: expected int64\[tokens\]"):
        a.send(link, Outbound(rows, (meta,), (b"0000",), 0))
    link.passed, link.nbytes = ((meta,), 1, 1), meta.nbytes  # a sender that does not check
    a.send(link, Outbound(rows, (meta,), (b"0000",), 0))
    pair.send(5)
    pair.run(5)
    [error] = pair.errors
    assert isinstance(error, RefusedMessage)
    assert error.rows == rows
    assert pair.got == [5]


def test_a_message_before_the_handshake_is_refused() -> None:
    """Refuse a message before the handshake."""
    pair = Pair()
    stranger = Exchange("a.0.1", "g", [LINK], pair.network.clock)
    link = stranger.sending[0, "b.0.1"]
    link.open = True
    link.window.grant(5, 1000)
    meta, buffer = to_buffer("x", torch.tensor([1]))
    stranger.send(link, Outbound((Row(1, 1, 0, 1),), (meta,), (buffer,), 0))
    [outgoing] = stranger.outbox
    pair.wires["a.0.1"].send(outgoing.peer, outgoing.header, outgoing.buffers)
    pair.run(1)
    assert "expected a handshake" in str(pair.errors[0])
    assert pair.got == []


def test_acknowledgements_ride_along() -> None:
    """Send acknowledgements with other messages while two links answer each other."""
    back = LinkSpec(1, "b.x -> a.x", host_id("b.0.1"), host_id("a.0.1"), LINK.tensors, 6, 1 << 20)
    network = MemoryNetwork()
    wires = {me: network.wire(me) for me in ("a.0.1", "b.0.1")}
    ends = {me: Exchange(me, "g", [LINK, back], network.clock) for me in wires}
    alone = 0

    def turn(answers: bool) -> None:
        nonlocal alone
        for me, end in ends.items():
            while (arrival := wires[me].receive(0)) is not None:
                received = end.on_arrival(arrival)
                if received is not None:
                    if answers:
                        [link] = end.sending.values()
                        header, buffers = received.header, received.buffers
                        end.send(link, Outbound(header.rows, header.tensors, buffers, 0))
                    end.consumed(received.link, received.nbytes)
            for out in end.outbox:
                alone += answers and not out.buffers
                wires[me].send(out.peer, out.header, out.buffers)
            end.outbox.clear()

    for end in ends.values():
        end.open()
    for _ in range(3):
        turn(answers=False)
    [link] = ends["a.0.1"].sending.values()
    meta, buffer = to_buffer("x", torch.tensor([1]))
    ends["a.0.1"].send(link, Outbound((Row(1, 1, 0, 1),), (meta,), (buffer,), 0))
    for _ in range(40):
        turn(answers=True)
    assert link.window.sequence > 15  # more than its credit, so credit was granted
    assert alone == 0
