"""Refuse peers on TCP with no key, a wrong key or another's key, without disturbing valid peers.

The case numbers are those of the faults in docs/reliability.md."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from ranvier.transport.format.errors import AddressError, KeyFileError, ProtocolError
from ranvier.transport.wires import curve
from ranvier.transport.wires.curve import Keys
from ranvier.transport.wires.zeromq import ZeroWire

TCP = "tcp://127.0.0.1:0"
Wires = Callable[..., ZeroWire]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Provide a folder with the keys of a, b and c."""
    curve.write(tmp_path / "keys", ["a", "b", "c"])
    return tmp_path / "keys"


@pytest.fixture
def wires() -> Iterator[Wires]:
    """Provide a function that makes TCP wires, which are closed afterwards."""
    with contextlib.ExitStack() as stack:

        def make(me: str, keys: Keys | None) -> ZeroWire:
            wire = ZeroWire(me, TCP, max_frame_bytes=1 << 20, keys=keys)
            stack.callback(wire.close)
            return wire

        yield make


@pytest.fixture
def pair(folder: Path, wires: Wires) -> tuple[ZeroWire, ZeroWire]:
    """Provide `a`, which sends to `b`."""
    a, b = wires("a.0.1", curve.read(folder, "a")), wires("b.0.1", curve.read(folder, "b"))
    a.connect("b.0.1", b.address)
    return a, b


def check_that_it_works(pair: tuple[ZeroWire, ZeroWire], text: bytes = b"hello") -> None:
    """Check that `b` receives a message of `a`."""
    a, b = pair
    a.send("b.0.1", text, [b"12"])
    arrival = b.receive(5)
    assert arrival is not None
    assert (arrival.peer, bytes(arrival.header), bytes(arrival.buffers[0])) == ("a.0.1", text, b"12")


def check_that_nothing_comes(wire: ZeroWire, seconds: float = 0.5) -> None:
    """Check that nothing arrives for some time."""
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0:
        assert wire.receive(left_s) is None


def dealer(context: zmq.Context[zmq.Socket[bytes]], name: str, address: str, keys: Keys | None) -> zmq.Socket[bytes]:
    """Connect a peer with these keys to the inbox of `b`, and send a message."""
    made = context.socket(zmq.DEALER)
    made.linger = 0
    made.setsockopt(zmq.IDENTITY, name.encode())
    if keys is not None:
        curve.present(made, keys, "b.0.1")
    made.connect(address)
    made.send_multipart([b"evil", b"34"])
    return made


def test_a_wrong_key_is_refused_and_the_others_go_on_case_36(pair: tuple[ZeroWire, ZeroWire], folder: Path) -> None:
    """Refuse a wrong key, and serve the valid peers."""
    check_that_it_works(pair)
    known = curve.read(folder, "a")
    public, secret = zmq.curve_keypair()
    with zmq.Context() as context:
        stranger = dealer(context, "a.0.1", pair[1].address, Keys("a", public, secret, known.publics))
        check_that_nothing_comes(pair[1])
        check_that_it_works(pair, b"again")
        stranger.close()


def test_when_nobody_answers_who_may_connect_nobody_gets_in_case_37(
    folder: Path, wires: Wires, pair: tuple[ZeroWire, ZeroWire]
) -> None:
    """Admit no new peer once the check of keys has stopped."""
    _, b = pair
    check_that_it_works(pair)
    assert b._doorkeeper is not None
    b._doorkeeper.stop()
    c = wires("c.0.1", curve.read(folder, "c"))
    c.connect("b.0.1", b.address)
    c.send("b.0.1", b"evil", [])
    check_that_nothing_comes(b)


def test_a_plain_peer_is_refused_case_38(pair: tuple[ZeroWire, ZeroWire]) -> None:
    """Refuse a peer without encryption."""
    with zmq.Context() as context:
        plain = dealer(context, "a.0.1", pair[1].address, None)
        check_that_nothing_comes(pair[1])
        plain.close()
    check_that_it_works(pair)


def until_refused(sender: zmq.Socket[bytes], inbox: ZeroWire) -> None:
    """Send until the message is refused.

    While two peers claim one name, each replaces the other's connection."""
    until_s = time.monotonic() + 10
    while time.monotonic() < until_s:
        sender.send_multipart([b"evil"])
        assert inbox.receive(0.1) is None


@pytest.mark.slow
def test_a_key_speaks_as_its_own_actor_alone_case_39(pair: tuple[ZeroWire, ZeroWire], folder: Path) -> None:
    """Refuse a message that has another actor's name than its key."""
    b = pair[1]
    with zmq.Context() as context:
        other = dealer(context, "a.0.1", b.address, curve.read(folder, "c"))
        for _ in range(2):
            words = r"b.0.1: expected c to speak as itself, got a message from b'a.0.1' with its key"
            with pytest.raises(ProtocolError, match=words):
                until_refused(other, b)
        other.close()
    until_s, arrival = time.monotonic() + 10, None
    # The other peer took over the name, so the valid peer connects again.
    while arrival is None and time.monotonic() < until_s:
        pair[0].send("b.0.1", b"hello", [])
        with contextlib.suppress(ProtocolError):  # what the other peer had sent before
            arrival = b.receive(0.1)
    assert arrival is not None
    assert bytes(arrival.header) == b"hello"


def test_recorded_bytes_are_refused_when_played_again_case_40(folder: Path, wires: Wires) -> None:
    """Refuse recorded bytes that are sent again.

    They are all that a sender sent to an inbox, its handshake included."""
    a, b = wires("a.0.1", curve.read(folder, "a")), wires("b.0.1", curve.read(folder, "b"))
    port = int(b.address.rpartition(":")[2])
    recorded = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, keep: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                keep += data
                sink.sendall(data)

    def between() -> None:
        near, _ = listener.accept()
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            threading.Thread(target=pump, args=(far, near, bytearray()), daemon=True).start()
            pump(near, far, recorded)

    threading.Thread(target=between, daemon=True).start()
    a.connect("b.0.1", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    for text in (b"one", b"two"):
        check_that_it_works((a, b), text)
    assert len(recorded) > 400
    assert b"one" not in recorded, "it was encrypted"
    for piece_bytes in (len(recorded), 64):  # all at once, or first the greeting
        with socket.create_connection(("127.0.0.1", port)) as again:
            again.sendall(recorded[:piece_bytes])
            again.settimeout(5)
            with contextlib.suppress(OSError):  # it is refused in between
                again.recv(10)  # the inbox has begun to answer, or has closed the connection
                again.sendall(recorded[piece_bytes:])
            check_that_nothing_comes(b)
    check_that_it_works((a, b), b"three")
    listener.close()


@pytest.mark.slow
def test_a_thousand_idle_connections_do_not_keep_the_real_peers_out_case_44(folder: Path, wires: Wires) -> None:
    """Serve valid peers beside a thousand idle connections."""
    b = wires("b.0.1", curve.read(folder, "b"))
    port = int(b.address.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        a = wires("a.0.1", curve.read(folder, "a"))
        a.connect("b.0.1", b.address)
        check_that_it_works((a, b))
        assert len(os.listdir("/proc/self/fd")) > 2000
    check_that_it_works((a, b), b"again")


def test_key_files_that_may_not_be_used(folder: Path) -> None:
    """Name the file, what was expected, and what to do."""
    secret = folder / "a.key"
    assert oct(secret.stat().st_mode & 0o777) == "0o600"
    before = secret.read_bytes()
    assert curve.write(folder, ["a", "d"]) == [folder / "d.key", folder / "d.pub"]
    assert secret.read_bytes() == before, "what is there stays"
    secret.chmod(0o640)
    with pytest.raises(
        KeyFileError, match=r"a\.key: expected mode 0600, got 0640: other users can read it; run chmod 600"
    ):
        curve.read(folder, "a")
    secret.chmod(0o600)
    secret.write_bytes((folder / "b.key").read_bytes())
    with pytest.raises(
        KeyFileError, match=r"a\.key: expected the secret key of a\.pub, got the secret key of another pair"
    ):
        curve.read(folder, "a")
    secret.write_text("short")
    with pytest.raises(KeyFileError, match=r"a\.key: expected a key of 40 characters, got 5"):
        curve.read(folder, "a")
    secret.write_text("\x7f" * 40)
    with pytest.raises(KeyFileError, match=r"a\.key: expected a key in Z85, got other characters"):
        curve.read(folder, "a")
    secret.unlink()
    with pytest.raises(KeyFileError, match=r"a\.key: No such file or directory; make keys with `ranvier keys new`"):
        curve.read(folder, "a")
    with pytest.raises(KeyFileError, match="no key of z; make one with"):
        curve.read(folder, "b").of("z.0.1")


def test_beyond_loopback_needs_keys(folder: Path) -> None:
    """Refuse an address beyond loopback without keys."""
    with pytest.raises(AddressError, match="is not loopback, and tcp beyond loopback needs CURVE keys"):
        ZeroWire("a.0.1", "tcp://192.0.2.1:5555", max_frame_bytes=1 << 20)
    with pytest.raises(AddressError, match="cannot bind"):  # allowed, but this machine has no such address
        ZeroWire("a.0.1", "tcp://192.0.2.1:5555", max_frame_bytes=1 << 20, keys=curve.read(folder, "a"))
