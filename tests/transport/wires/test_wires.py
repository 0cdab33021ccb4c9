"""Keep the same promises over every wire: memory, inproc, ipc, tcp (always with keys), and local with and without shared memory."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from ranvier.transport.format.errors import AddressError, LinkBroken, LinkClosed, ProtocolError
from ranvier.transport.format.header import Row
from ranvier.transport.format.host_id import host_id
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.format.tensors import from_buffer, to_buffer
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.links.link_state import Outbound, Received, SendingLink
from ranvier.transport.links.wire import ProcessWire, Wire
from ranvier.transport.wires import curve
from ranvier.transport.wires.local import LocalWire
from ranvier.transport.wires.testing import MemoryNetwork
from ranvier.transport.wires.zeromq import ZeroWire

SPEC = (("x", TensorSpec("float32", ("tokens", "width"))),)
MakeWire = Callable[[str], Wire]


@pytest.fixture(params=["memory", "inproc", "ipc", "tcp", "local", "local, shared"])
def make_wire(request: pytest.FixtureRequest) -> Iterator[MakeWire]:
    """Make wires that can reach each other; close them all afterwards."""
    made: list[Wire] = []
    network = MemoryNetwork()
    context: zmq.Context[Any] = zmq.Context()
    folder = tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp")
    curve.write(Path(folder.name) / "keys", ["a", "b", "c", "stranger"])
    address = {"inproc": "inproc://{}", "tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{folder.name}/{{}}"}

    def make(me: str) -> Wire:
        if request.param == "memory":
            wire: Wire = network.wire(me)
        elif request.param.startswith("local"):
            shared_from = 1 if "shared" in request.param else 0  # every tensor, however small
            wire = LocalWire(me, f"local://{folder.name}/{me}", max_frame_bytes=1 << 26, shared_from_bytes=shared_from)
        else:
            keys = curve.read(Path(folder.name) / "keys", me.partition(".")[0]) if request.param == "tcp" else None
            wire = ZeroWire(
                me, address[request.param].format(me), max_frame_bytes=1 << 26, keys=keys,
                context=context if request.param == "inproc" else None,
            )  # fmt: skip
        made.append(wire)
        return wire

    yield make
    for wire in made:
        wire.close()
    context.term()
    folder.cleanup()


def link(credits_messages: int = 4, credits_bytes: int = 1 << 20, **changes: Any) -> LinkSpec:
    """Return the specification of a link with these changes."""
    fields: dict[str, Any] = {
        "edge": 3, "name": "a.x -> b.x", "source": host_id("a.0.1"), "target": host_id("b.0.1"), "tensors": SPEC,
        "credits_messages": credits_messages, "credits_bytes": credits_bytes, **changes,
    }  # fmt: skip
    return LinkSpec(**fields)


class Peer:
    """Hold one process's transport: a wire and the state of its links, driven by the test."""

    def __init__(self, make_wire: MakeWire, me: str, spec: LinkSpec, graph: str = "g") -> None:
        self.wire = make_wire(me)
        self.exchange = Exchange(me, graph, [spec], time.monotonic_ns)
        self.taken: list[Received] = []
        self.errors: list[ProtocolError] = []

    @property
    def link(self) -> SendingLink:
        return next(iter(self.exchange.sending.values()))

    def turn(self, *, consume: bool = True, wait_s: float = 0.02) -> None:
        """Send what is due, and take what has arrived."""
        self.flush()
        while True:
            try:
                arrival = self.wire.receive(wait_s)
                if arrival is None:
                    break
                received = self.exchange.on_arrival(arrival)
            except ProtocolError as error:
                self.errors.append(error)
                received = None
            if received is not None:
                self.taken.append(received)
                if consume:
                    self.exchange.consumed(received.link, received.nbytes)
            self.flush()
            wait_s = 0
        self.exchange.idle()
        self.flush()

    def flush(self) -> None:
        """Send everything in the outbox."""
        for out in self.exchange.outbox:
            out.buffers = self.wire.send(out.peer, out.header, out.buffers)
        self.exchange.outbox.clear()

    def send(self, tensor: torch.Tensor, position: int = 0) -> None:
        meta, buffer = to_buffer("x", tensor)
        row = Row(1, 1, position, tensor.shape[0])
        self.exchange.send(self.link, Outbound((row,), (meta,), (buffer,), time.monotonic_ns()))


def pair(make_wire: MakeWire, spec: LinkSpec | None = None, **changes: Any) -> tuple[Peer, Peer]:
    """Connect two peers, and begin their handshake."""
    spec = spec or link()
    a, b = Peer(make_wire, "a.0.1", spec), Peer(make_wire, "b.0.1", changes.pop("theirs", spec), **changes)
    a.wire.connect("b.0.1", b.wire.address)
    b.wire.connect("a.0.1", a.wire.address)
    a.exchange.open()
    return a, b


def turns(*peers: Peer, until: Callable[[], bool], most: int = 200, **options: Any) -> None:
    """Take turns until `until` is true."""
    for _ in range(most):
        if until():
            return
        for peer in peers:
            peer.turn(**options)
    assert until(), "did not come true"


def opened(make_wire: MakeWire, spec: LinkSpec | None = None) -> tuple[Peer, Peer]:
    """Return two peers whose link is open."""
    a, b = pair(make_wire, spec)
    turns(a, b, until=lambda: a.exchange.ready and b.exchange.ready)
    return a, b


def test_messages_arrive_once_and_in_order(make_wire: MakeWire) -> None:
    """Deliver twenty messages through a window of four: all, once, in order, bit for bit."""
    a, b = opened(make_wire)
    sent = [torch.randn(n % 3 + 1, 5) for n in range(20)]
    for position, tensor in enumerate(sent):
        a.send(tensor, position)
    turns(a, b, until=lambda: len(b.taken) == 20)
    for position, (tensor, received) in enumerate(zip(sent, b.taken, strict=True)):
        header, buffers = received.header, received.buffers
        assert header.rows[0].position == position
        assert torch.equal(from_buffer(header.tensors[0], buffers[0]), tensor)
    turns(a, b, until=lambda: not a.exchange.unfinished())
    assert b.errors == []


def test_large_and_empty_tensors(make_wire: MakeWire) -> None:
    """Deliver 12 MiB without a copy, a tensor without elements, and one that is not contiguous."""
    a, b = opened(make_wire, link(credits_bytes=1 << 30))
    sent = [torch.randn(3, 1 << 20), torch.empty(0, 7), torch.randn(6, 4).t()]
    for tensor in sent:
        a.send(tensor)
    turns(a, b, until=lambda: len(b.taken) == 3)
    for tensor, received in zip(sent, b.taken, strict=True):
        assert torch.equal(from_buffer(received.header.tensors[0], received.buffers[0]), tensor)


def test_credit_bounds_what_is_on_its_way(make_wire: MakeWire) -> None:
    """Deliver only as many messages as the receiver granted, and the rest once it has consumed them."""
    a, b = opened(make_wire, link(credits_messages=3))
    for position in range(10):
        a.send(torch.ones(1, 1), position)
    for _ in range(5):
        a.turn(wait_s=0.01)
        b.turn(consume=False, wait_s=0.01)
    assert len(b.taken) == 3
    assert a.exchange.waiting
    assert a.exchange.counters["credit_waits"] == 7
    for received in b.taken:
        b.exchange.consumed(received.link, received.nbytes)
    turns(a, b, until=lambda: len(b.taken) == 10)
    assert not a.exchange.waiting


def test_credit_in_bytes(make_wire: MakeWire) -> None:
    """Limit the bytes as well, and send a message larger than the whole window alone."""
    a, b = opened(make_wire, link(credits_messages=100, credits_bytes=1000))
    for position, floats in enumerate([100, 100, 100, 600, 1]):
        a.send(torch.ones(1, floats), position)
    for _ in range(5):
        a.turn(wait_s=0.01)
        b.turn(consume=False, wait_s=0.01)
    assert len(b.taken) == 2
    for count in (3, 4, 5):
        for received in b.taken[-1 if count > 3 else 0 :]:
            b.exchange.consumed(received.link, received.nbytes)
        for _ in range(5):
            b.turn(consume=False, wait_s=0.01)
            a.turn(wait_s=0.01)
        assert len(b.taken) == count


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"graph": "other"}, "b.0.1 runs graph other, a.0.1 runs graph g"),
        ({"theirs": link(edge=9)}, "b.0.1 has no edge 'a.x -> b.x' from a.0.1"),
        ({"theirs": link(tensors=(("x", TensorSpec("float16", ("tokens", 3))),))}, "float16.*a.0.1 offers.*float32"),
    ],
)
def test_a_handshake_that_differs_names_both_sides_case_20(
    make_wire: MakeWire, changes: dict[str, Any], words: str
) -> None:
    """Name both sides if their graph, edge or specification differs."""
    a, b = pair(make_wire, **changes)

    def refused() -> bool:
        try:
            return a.exchange.ready and False
        except LinkBroken:
            return True

    turns(a, b, until=refused)
    with pytest.raises(LinkBroken, match=words):
        _ = a.exchange.ready
    assert b.exchange.counters["refused"] >= 1
    assert "handshake refused" in str(b.errors[0])


def test_another_wire_version_is_refused_case_20(make_wire: MakeWire) -> None:
    """Refuse a message of another wire version, and keep the link."""
    import msgpack

    a, b = opened(make_wire)
    a.wire.send("b.0.1", msgpack.packb([2, 3, 3, 0, "g", "a.x -> b.x", (), "a.0.1", "b.0.1"]), ())
    turns(a, b, until=lambda: len(b.errors) == 1)
    assert "expected wire version 1, got 2" in str(b.errors[0])
    a.send(torch.ones(1, 1))
    turns(a, b, until=lambda: len(b.taken) == 1)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ((b"\x80\x04}.",), "header"),
        ((b"x" * 70_000,), "at most 65536 bytes"),
        ((b"", b"body"), "header"),
    ],
)
def test_rubbish_is_refused_and_the_link_goes_on(make_wire: MakeWire, frames: tuple[bytes, ...], words: str) -> None:
    """Refuse an invalid header, and keep the link.

    It is a pickle (case 41), too large, or empty."""
    a, b = opened(make_wire)
    a.wire.send("b.0.1", frames[0], frames[1:])
    turns(a, b, until=lambda: len(b.errors) == 1)
    assert words in str(b.errors[0])
    a.send(torch.ones(2, 2))
    turns(a, b, until=lambda: len(b.taken) == 1)


def test_too_many_frames_are_refused(make_wire: MakeWire) -> None:
    """Drop a message of a thousand frames, and take the next."""
    a, b = opened(make_wire)
    a.send(torch.ones(1, 1))
    header = a.exchange.outbox[0].header
    a.exchange.outbox.clear()
    try:
        a.wire.send("b.0.1", header, [b"x"] * 1000)
    except ProtocolError as error:  # `local` refuses them where they are sent
        b.errors.append(error)
    for _ in range(10):
        try:
            b.turn()
        except ProtocolError as error:
            b.errors.append(error)
        if b.errors:
            break
    assert "tensor frames" in str(b.errors[0])
    a.exchange.tick()  # requests what was lost again
    turns(a, b, until=lambda: len(b.taken) == 1)


def test_a_closed_wire_says_so(make_wire: MakeWire) -> None:
    """Raise LinkClosed on a wire that is closed."""
    wire = make_wire("a.0.1")
    wire.close()
    wire.close()
    with pytest.raises(LinkClosed):
        wire.receive(0)


@pytest.fixture(params=["ipc", "local"])
def at_path(request: pytest.FixtureRequest) -> Iterator[Callable[..., ProcessWire]]:
    """`at_path(me, name)`: a wire with a socket of that name in one folder; all are closed afterwards."""
    made: list[ProcessWire] = []
    with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp") as folder:

        def make(me: str, name: str, max_frame_bytes: int = 1 << 20) -> ProcessWire:
            kind: Any = {"ipc": ZeroWire, "local": LocalWire}[request.param]
            made.append(kind(me, f"{request.param}://{folder}/{name}", max_frame_bytes=max_frame_bytes))
            return made[-1]

        yield make
        for wire in made:
            wire.close()


def test_a_sender_before_its_receiver_loses_nothing_case_21(at_path: Callable[..., ProcessWire]) -> None:
    """Case 21: the sender connects, offers its link and has a message before the receiver is bound."""

    def make(me: str) -> Wire:
        return at_path(me, me)

    a = Peer(make, "a.0.1", link())
    a.wire.connect("b.0.1", a.wire.address.replace("a.0.1", "b.0.1"))
    a.exchange.open()
    a.send(torch.ones(1, 2))
    a.flush()
    b = Peer(make, "b.0.1", link())
    b.wire.connect("a.0.1", a.wire.address)
    turns(a, b, until=lambda: len(b.taken) == 1)
    assert b.taken[0].header.sequence == 1


def test_a_wake_interrupts_a_blocked_receive(at_path: Callable[..., ProcessWire]) -> None:
    """Another thread's wake ends a receive that would wait forever, and one before it ends the next."""
    import threading

    wire = at_path("a.0.1", "a")
    waker = wire.waker()
    thread = threading.Thread(target=waker.wake)
    thread.start()
    assert wire.receive(None) is None
    thread.join()
    waker.wake()
    assert wire.receive(None) is None
    waker.close()


def test_a_wake_hides_no_messages(at_path: Callable[..., ProcessWire]) -> None:
    """Give all messages that have arrived to a caller that looks until there are none, whatever wakes came between them."""
    wire, other = at_path("a.0.1", "a"), at_path("b.0.1", "b")
    other.connect("a.0.1", wire.address)
    waker = wire.waker()
    for number in range(5):
        waker.wake()
        other.send("a.0.1", b"%d" % number, [b"x"])
        time.sleep(0.02)  # so that each wake lies between two messages
    waker.wake()
    arrival, found = wire.receive(5), []
    while arrival is not None:
        found.append(bytes(arrival.header))
        arrival = wire.receive(0)
    assert found == [b"0", b"1", b"2", b"3", b"4"]
    waker.close()


def test_an_address_in_use_is_not_stolen(at_path: Callable[..., ProcessWire]) -> None:
    """Refuse a path that another wire holds; ZeroMQ itself would take it over."""
    at_path("a.0.1", "a")
    with pytest.raises(AddressError, match="another process listens there"):
        at_path("b.0.1", "a")
    with pytest.raises(AddressError):
        at_path("b.0.1", "nowhere/a")


def test_a_frame_over_the_limit_drops_the_peer_case_19(at_path: Callable[..., ProcessWire]) -> None:
    """Case 19: the connection of a peer whose frame is over the limit ends; nothing of it arrives, and others are served."""
    wire, big, good = (at_path(me, me, 1 << 16) for me in ("a.0.1", "big.0.1", "good.0.1"))
    big.connect("a.0.1", wire.address)
    big.send("a.0.1", b"header", [bytes(1 << 22)])
    with contextlib.suppress(ProtocolError):
        assert wire.receive(0.3) is None
    good.connect("a.0.1", wire.address)
    good.send("a.0.1", b"header", [])
    arrival = wire.receive(5)
    assert arrival is not None
    assert arrival.peer == "good.0.1"


def test_an_answer_to_one_who_has_gone_is_dropped(at_path: Callable[..., ProcessWire]) -> None:
    """It spoke and went away before it was answered: nobody waits, and the wire goes on."""
    wire, gone = at_path("a.0.1", "a"), at_path("gone.0.1", "b")
    gone.connect("a.0.1", wire.address)
    gone.send("a.0.1", b"header", [])
    arrival = wire.receive(5)
    assert arrival is not None
    gone.close()
    wire.send("never seen", b"no", [])
    for _ in range(100):  # before the wire has noticed that the connection is gone, and after
        wire.send("gone.0.1", b"no", [])
        assert wire.receive(0.002) is None
    other = at_path("other.0.1", "c")
    other.connect("a.0.1", wire.address)
    other.send("a.0.1", b"header", [])
    arrival = wire.receive(5)
    assert arrival is not None
    assert arrival.peer == "other.0.1"
