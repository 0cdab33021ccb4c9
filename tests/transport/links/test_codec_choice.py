"""Check what `codec: auto` chooses for each size, speed and cost, and how it measures the speed of a link."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ranvier.transport.format.codec import Codec, Coding
from ranvier.transport.format.codec import parse as parse_codec
from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.header import Row, TensorMeta
from ranvier.transport.format.host_id import host_id
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links.codec_choice import LEAST_BYTES, MEASURED_BYTES, TRY_EVERY, Chooser, candidates
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.links.link_state import Outbound
from ranvier.transport.wires.testing import MemoryNetwork

BIG = 1_000_000
COSTS = {"raw": (0.0, 1.0), "raw+lz4": (0.5, 0.6), "raw+zstd": (4.0, 0.3)}
"""Nanoseconds to write a byte, and the share of the bytes that remains."""


def chooser(ns_a_byte: float | None, text: str = "auto") -> Chooser:
    """Return a chooser that has measured a link of this speed."""
    codecs = candidates(text)
    assert codecs is not None
    made = Chooser(codecs)
    if ns_a_byte is not None:
        made.measured(BIG, int(BIG * ns_a_byte))
    return made


def settle(made: Chooser) -> str:
    """Return what is chosen most, once every codec was tried."""
    chosen = []
    for _ in range(4 * TRY_EVERY):
        codec = made.choose(BIG)
        cost, ratio = COSTS.get(str(codec), (9.0, 0.9))
        made.learned(codec, Coding(BIG, int(BIG * cost), None), int(BIG * ratio))
        chosen.append(str(codec))
    assert set(COSTS) <= set(chosen), "each is looked at now and then"
    return max(set(chosen), key=chosen.count)


@pytest.mark.parametrize(
    ("ns_a_byte", "best"), [(0.1, "raw"), (1.0, "raw"), (5.0, "raw+lz4"), (20.0, "raw+lz4"), (100.0, "raw+zstd")]
)
def test_the_slower_the_link_the_more_it_is_worth(ns_a_byte: float, best: str) -> None:
    """Choose the codec with the least sum of writing, carrying and reading.

    The links have 10 GB/s, 1 GB/s, 200, 50 and 10 MB/s."""
    assert settle(chooser(ns_a_byte)) == best


def test_small_messages_and_unknown_links_are_raw() -> None:
    """Send small messages raw, and all messages on a link of unknown speed."""
    assert chooser(1000.0).choose(LEAST_BYTES - 1) == Codec()
    unknown = chooser(None)
    assert {unknown.choose(BIG) for _ in range(100)} == {Codec()}
    assert unknown.ns_a_byte is None


def test_a_link_that_changes_is_noticed() -> None:
    """Choose another codec when a link becomes slower."""
    made = chooser(0.1)
    assert settle(made) == "raw"
    for _ in range(20):
        made.measured(BIG, 100 * BIG)
    assert settle(made) == "raw+zstd"


def test_what_may_be_chosen() -> None:
    """Choose no lossy codec unless the edge names it."""
    assert [str(codec) for codec in candidates("auto") or ()] == ["raw", "raw+lz4", "raw+zstd"]
    assert [str(codec) for codec in candidates("auto:int8") or ()][3:] == ["int8", "int8+lz4", "int8+zstd"]
    assert [str(codec) for codec in candidates("auto:topk:0.5") or ()][3:5] == ["topk:0.5", "topk:0.5+lz4"]
    assert candidates("int8") is None
    for wrong in ("auto:", "auto:raw", "auto:int8+lz4", "auto:gzip"):
        with pytest.raises(ValueError, match="codec"):
            candidates(wrong)
    with pytest.raises(ValueError, match="does not exist"):
        parse_codec("auto")


@pytest.mark.parametrize("ahead_s", [0, 1000, -1000])
@pytest.mark.parametrize(("nbytes", "told"), [(MEASURED_BYTES, True), (MEASURED_BYTES - 4, False)])
def test_a_round_trip_says_how_long_a_large_message_took_case_76(nbytes: int, told: bool, ahead_s: int) -> None:
    """Measure the speed of a link from a large message that the receiver waited for.

    In virtual time it travels for 3 ms. A message that arrives while the receiver is busy is not measured. The clock of
    the receiver's machine makes no difference."""
    network = MemoryNetwork()
    network.now_ns = 10**13
    ahead_ns = {"a.0.1": 0, "b.0.1": ahead_s * 10**9}
    spec = LinkSpec(
        0,
        "a -> b",
        host_id("a.0.1"),
        host_id("b.0.1"),
        (("x", TensorSpec("float32", ("tokens",))),),
        8,
        1 << 30,
        codec="auto",
    )
    a, b = (Exchange(name, "g", [spec], lambda name=name: network.clock() + ahead_ns[name]) for name in ahead_ns)
    wires = {name: network.wire(name) for name in ahead_ns}

    def turn(busy: bool = False) -> None:
        for name, end in (("a.0.1", a), ("b.0.1", b)) * 3:
            while (arrival := wires[name].receive(0)) is not None:
                since_ns = 0 if busy and name == "b.0.1" else waiting_since_ns + ahead_ns[name]
                arrival = type(arrival)(arrival.peer, arrival.header, arrival.buffers, since_ns)
                end.on_arrival(arrival)
            for out in end.outbox:
                wires[name].send(out.peer, out.header, out.buffers)
            end.outbox.clear()

    waiting_since_ns = network.now_ns
    a.open()
    turn()
    link = a.sending[0, "b.0.1"]
    meta = TensorMeta("x", BY_NAME["float32"].number, (nbytes // 4,), 0, nbytes)
    network.advance(1.0)
    network.fault = lambda crossing: (
        [replace(crossing, delay_ns=3_000_000)] if crossing.source == "a.0.1" else [crossing]
    )
    for busy in (True, False):
        a.send(link, Outbound((Row(1, 1, 0, nbytes // 4),), (meta,), (bytes(nbytes),), network.now_ns))
        turn()
        network.advance(0.003)
        turn(busy)
        assert link.chooser is not None
        expected = 3_000_000 / nbytes if told and not busy else None
        assert link.chooser.ns_a_byte == pytest.approx(expected)
