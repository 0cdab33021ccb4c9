"""Carry messages over ZeroMQ: inproc, ipc and tcp. Only this file sees a `ZMQError`.

A process binds one ROUTER as its inbox, and connects one DEALER to each peer, with the process's own identity. Everything
that comes in (data, acknowledgements, wakes) comes through the inbox, so that the step thread waits on a single socket.
Waiting on two sockets needs a poller. A poll before each receive doubled the time per hop (18 to 37 µs, on one core).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import zmq

from .. import system
from ..format.errors import AddressError, LinkBroken, LinkClosed, ProtocolError
from ..format.header import MAX_TENSORS
from ..format.host_id import claims_to_be
from ..format.message import COPY_BELOW_BYTES, Buffer, stable
from ..links.wire import Arrival
from . import endpoint
from .curve import Doorkeeper, Keys, guard, present
from .descriptors import OF_A_PEER, OF_A_WIRE, claim, make_sure_of_descriptors

LINGER_MS = 500
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 5000
"""Over tcp, a peer that is silent for longer than the timeout counts as gone, even if its connection is still open."""
AWAKE_NS = 500_000
"""If the last wait was shorter than this, the next one stays awake for this long, and yields to threads that can run.

A sleeping core wakes up late, with cold caches. Awake, a hop of 1.2 kB over ipc takes 100 µs instead of 165
(benchmarks/hop.py)."""
_MORE = int(zmq.SNDMORE | zmq.DONTWAIT)
_LAST = int(zmq.DONTWAIT)
_READABLE, _EVENTS = int(zmq.POLLIN), zmq.EVENTS
_WAKE = b"\x00wake"
_send: Any = zmq.backend.Socket.send  # skips pyzmq's code for DRAFT sockets: 0.8 µs less per frame
_serial = itertools.count()


class ZeroWire:
    """Carry messages over ZeroMQ (see `wire.ProcessWire`). The thread that uses a wire owns it.

    Args:
        me: the identity that others see, `actor.replica.epoch`.
        address: where to bind. `tcp://127.0.0.1:0` binds any free port (see the attribute `address`).
        max_frame_bytes: a peer that sends a larger frame is disconnected by ZeroMQ.
        context: shared by wires that talk over inproc. If None, the wire makes its own.
        keys: required for tcp. Only connections with keys are accepted and opened (curve.py).

    Raises:
        AddressError: the address may not be used or is in use.
        ResourceError: there are not enough descriptors.
    """

    def __init__(
        self,
        me: str,
        address: str,
        *,
        max_frame_bytes: int,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        keys: Keys | None = None,
    ) -> None:
        where = _endpoint(me, address, keys)
        make_sure_of_descriptors(me, OF_A_WIRE)
        self.me = me
        self._keys = keys
        self._doorkeeper: Doorkeeper | None = None
        self._own_context = context is None
        self._context = context or zmq.Context(io_threads=1)
        self._dealers: dict[str, zmq.Socket[bytes]] = {}
        self._inbox = self._context.socket(zmq.ROUTER)
        self._inbox.linger = 0
        self._inbox.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        self._inbox.setsockopt(zmq.RCVHWM, 0)  # credit bounds what is on its way; ZeroMQ must never drop a message
        self._inbox.setsockopt(zmq.SNDHWM, 0)
        self._wake_address = f"inproc://wake-{os.getpid()}-{next(_serial)}"
        self._lock: int | None = None
        self._timeout_s: float | None = None
        self._quick = False
        self._empty = False
        """True if nothing had come when ZeroMQ was asked last. Since then, its descriptor tells whether to ask again."""
        self._stirred = select.poll()
        self._stirred.register(self.fd, select.POLLIN)
        try:
            self._bind(where)
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(f"{me}: cannot bind {where}: {error.strerror}") from error
        except AddressError:
            self.close()
            raise

    def _bind(self, where: endpoint.Endpoint) -> None:
        if where.scheme == "ipc":
            self._lock = claim(where.location)
        if where.scheme == "tcp":
            _notices_half_open(self._inbox)
            assert self._keys is not None
            self._doorkeeper = Doorkeeper(self._context, self._keys)
            self._doorkeeper.start()
            guard(self._inbox, self._keys)
            # a peer that reconnects is not kept out by its own dead connection
            self._inbox.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._inbox.bind(f"tcp://{where.location}:*" if where.scheme == "tcp" and not where.port else str(where))
        bound = self._inbox.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self._address = bound.rstrip(b"\x00").decode() if where.scheme == "tcp" else str(where)
        self._inbox.bind(self._wake_address)

    @property
    def address(self) -> str:
        return self._address

    @property
    def counters(self) -> Counter[str]:
        """Return no counters: this wire only carries frames."""
        return Counter()

    @property
    def fd(self) -> int:
        """Return ZeroMQ's descriptor. It is edge-triggered: call `receive(0)` before and after every wait on it."""
        return int(self._inbox.getsockopt(zmq.FD))

    def connect(self, peer: str, address: str) -> None:
        where = _endpoint(f"{self.me}: {peer}", address, self._keys)
        if peer in self._dealers:
            return
        make_sure_of_descriptors(self.me, OF_A_PEER * (len(self._dealers) + 1))
        try:
            dealer = self._context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.setsockopt(zmq.IDENTITY, self.me.encode())
            dealer.setsockopt(zmq.SNDHWM, 0)
            if where.scheme == "tcp":
                _notices_half_open(dealer)
                assert self._keys is not None
                present(dealer, self._keys, peer)
            dealer.connect(str(where))
        except zmq.ZMQError as error:
            raise LinkBroken(f"{self.me}: cannot connect to {peer} at {where}: {error.strerror}") from error
        self._dealers[peer] = dealer

    def disconnect(self, peer: str) -> None:
        dealer = self._dealers.pop(peer, None)
        if dealer is not None:
            dealer.close(linger=0)

    def send(self, peer: str, header: bytes, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        dealer = self._dealers.get(peer)
        if dealer is None:
            self._answer(peer, header)
            return buffers
        try:
            if not buffers:
                _send(dealer, header, _LAST)
                return buffers
            for buffer in buffers:  # they are sent by reference, and kept until they are acknowledged
                if buffer.__class__ is not bytes:
                    buffers = tuple(map(stable, buffers))
                    break
            _send(dealer, header, _MORE)
            last = len(buffers) - 1
            for index, frame in enumerate(buffers):
                _send(dealer, frame, _LAST if index == last else _MORE, copy=len(frame) < COPY_BELOW_BYTES)
        except zmq.ZMQError as error:
            raise LinkBroken(f"{self.me}: cannot send to {peer}: {error.strerror}") from error
        return buffers

    def _answer(self, peer: str, header: bytes) -> None:
        """Send a refusal to a peer that sent the first message and does not belong to this graph."""
        self._empty = False  # sending takes note of what has come
        try:
            with contextlib.suppress(zmq.Again):
                self._inbox.send(peer.encode("latin-1"), _MORE)
                self._inbox.send(header, _LAST)
        except zmq.ZMQError as error:
            if self._inbox.closed:
                raise LinkClosed(f"{self.me}: this wire is closed") from None
            if error.errno != zmq.EHOSTUNREACH:  # the peer has gone meanwhile, and nobody waits for the answer
                raise LinkBroken(f"{self.me}: cannot send to {peer}: {error.strerror}") from error

    def receive(self, timeout_s: float | None) -> Arrival | None:
        if self._empty and timeout_s == 0 and not self._stirred.poll(0):
            return None  # asking ZeroMQ would take 12 µs, asking the system takes 1
        inbox, self._empty = self._inbox, False
        try:
            while True:
                began_ns, identity = (0, inbox.recv(_LAST)) if timeout_s == 0 else self._wait(timeout_s)
                header = inbox.recv(copy=False)  # a ROUTER's message has at least one frame after the identity
                if identity != _WAKE:
                    break
                timeout_s = 0  # a caller that receives until None must still get the messages behind a wake
            if self._doorkeeper is not None:
                self._check_speaker(identity, header)
            buffers = self._tensors(identity) if header.more else ()
            return Arrival(identity.decode("latin-1"), header.buffer, buffers, began_ns)
        except zmq.Again:
            self._quick, self._empty = False, True
            return None
        except zmq.ZMQError as error:
            if inbox.closed or isinstance(error, zmq.ContextTerminated):
                raise LinkClosed(f"{self.me}: this wire is closed") from None
            raise LinkBroken(f"{self.me}: cannot receive: {error.strerror}") from error

    def _wait(self, timeout_s: float | None) -> tuple[int, bytes]:
        """Wait for a message. Return when the wait began (ns), and the identity of the sender."""
        # Use the socket's own timeout: a poll before the receive took 18 µs more per hop on one core.
        inbox = self._inbox
        if timeout_s != self._timeout_s:
            inbox.setsockopt(zmq.RCVTIMEO, -1 if timeout_s is None else int(timeout_s * 1000))
            self._timeout_s = timeout_s
        began_ns = time.monotonic_ns()
        if self._quick:
            until_ns = began_ns + AWAKE_NS
            while not int(inbox.getsockopt(_EVENTS)) & _READABLE and time.monotonic_ns() < until_ns:
                system.yield_core()
        identity = inbox.recv()
        self._quick = time.monotonic_ns() - began_ns < AWAKE_NS
        return began_ns, identity

    def _tensors(self, identity: bytes) -> tuple[Buffer, ...]:
        """Return the frames behind the header.

        Raises:
            ProtocolError: there are more frames than a message may have. They are dropped.
        """
        buffers: list[Buffer] = []
        more = True
        while more:
            frame = self._inbox.recv(copy=False)
            more = frame.more
            buffers.append(frame.buffer)
            if len(buffers) > MAX_TENSORS:
                self._drop_rest(more)
                raise ProtocolError(
                    f"{self.me}: expected at most {MAX_TENSORS} tensor frames from {identity!r}, got more"
                )
        return tuple(buffers)

    def _check_speaker(self, identity: bytes, header: zmq.Frame) -> None:
        """Check that the identity of a peer is one of the actor that its key belongs to.

        Raises:
            ProtocolError: the identity is one of another actor.
        """
        actor = header.get("User-Id")
        if not claims_to_be(identity, str(actor)):
            self._drop_rest(header.more)
            raise ProtocolError(
                f"{self.me}: expected {actor} to speak as itself, got a message from {identity!r} with its key"
            )

    def _drop_rest(self, more: bool) -> None:
        while more:
            more = self._inbox.recv(copy=False).more

    def waker(self) -> ZeroWaker:
        """Return a handle with which one other thread can interrupt `receive`."""
        return ZeroWaker(self._context, self._wake_address)

    def close(self) -> None:
        for socket in self._dealers.values():
            # data was acknowledged before; a refusal or a final message may still be on its way
            socket.close(linger=LINGER_MS)
        self._dealers.clear()
        self._empty = False  # `receive` asks ZeroMQ from now on, and raises
        self._inbox.close(linger=0)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.close(self._lock)
            self._lock = None
        if self._doorkeeper is not None:
            self._doorkeeper.stop()
        if self._own_context:
            self._context.term()


def _endpoint(who: str, address: str, keys: Keys | None) -> endpoint.Endpoint:
    """Parse an address that may be used over ZeroMQ.

    Raises:
        AddressError: the address may not be used over ZeroMQ, or not without keys.
    """
    where = endpoint.parse(address, guarded=keys is not None)
    if where.scheme == "local":
        raise AddressError(
            f"{who}: expected an ipc, tcp or inproc address, got {where}; a process has one wire, "
            "so give all its edges the same transport"
        )
    if where.scheme == "tcp" and keys is None:
        raise AddressError(
            f"{who} at {where}: tcp needs keys, on loopback, too, because other users of this machine can connect; set `keys`"
        )
    return where


def _notices_half_open(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def ask(me: str, address: str, question: bytes, timeout_s: float) -> Buffer | None:
    """Send one message to the wire at `address`. Return its answer, or None if none comes within `timeout_s` seconds.

    Raises:
        AddressError: the address may not be used.
    """
    where = endpoint.parse(address)
    with zmq.Context(io_threads=1) as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.setsockopt(zmq.IDENTITY, me.encode())
        dealer.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
        dealer.connect(str(where))
        dealer.send(question)
        try:
            return dealer.recv()
        except zmq.Again:
            return None


class ZeroWaker:
    """Wake one `ZeroWire` from one other thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.IDENTITY, _WAKE)
        self._socket.connect(address)

    def wake(self) -> None:
        # the socket or the wire is closed: nobody is left to wake
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(b"", _LAST)

    def close(self) -> None:
        self._socket.close(linger=0)
