"""The ZeroMQ wire. The only file that sees a `ZMQError`.

Between processes of one machine a large tensor may go through shared memory: what the wires say to each other for that begins
with an empty frame (lending.py).

One ROUTER inbox, bound; one DEALER for each peer, connected, its identity this process's own. Everything that comes in
(data, acknowledgements, wakes) comes through the inbox, so that the step thread waits on a single socket: waiting on
two needs a poller, and a poll before each receive doubled the time of a hop (18 to 37 µs, one core).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import zmq

from ..format.errors import AddressError, LinkBroken, LinkClosed, ProtocolError
from ..format.header import MAX_TENSORS
from ..format.message import COPY_BELOW_BYTES, Buffer, stable
from ..links.link import Arrival
from . import endpoint
from .curve import Doorkeeper, Keys, guard, present
from .descriptors import OF_A_PEER, OF_A_WIRE, claim, make_sure_of_descriptors
from .lending import Sharing
from .unix_sockets import SUFFIX, Direct, is_mark

LINGER_MS = 500
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 5000
"""Over tcp a peer that is silent for so long has gone, though its connection was never closed."""
AWAKE_NS = 500_000
"""Where the last message came within so long, the next is waited for awake, yielding to whoever else can run: a core
that falls asleep wakes late and cold (1.2 kB over ipc: 100 µs a hop instead of 165; benchmarks/hop.py)."""
_MORE = int(zmq.SNDMORE | zmq.DONTWAIT)
_LAST = int(zmq.DONTWAIT)
_READABLE = int(zmq.POLLIN)
_WAKE = b"\x00wake"
_send: Any = zmq.backend.Socket.send  # without the sugar for DRAFT sockets: 0.8 µs less a frame
_serial = itertools.count()


MAX_FRAMES = MAX_TENSORS + 3
"""Behind the first frame: wires' own, a header, tensors. How many tensors a message may have is its header's to say."""


class ZeroWire:
    """A `link.Wire` over ZeroMQ. Owned by the thread that uses it.

    Args:
        me: identity others see, `actor.replica.epoch`.
        address: where to bind; `tcp://127.0.0.1:0` binds any free port (see `address`).
        max_frame_bytes: a peer that sends a larger frame is disconnected by ZeroMQ.
        context: shared by wires that talk over inproc; one of its own if None.
        shared_from_bytes: tensors of so many bytes and more go through shared memory to peers at ipc addresses that can read
            it; 0: none do. `counters` says how many did.
        keys: for tcp: only connections with keys are taken and made (curve.py). Without them tcp is refused.
        direct: at an ipc address, exchange small messages with wires that do so, too, past ZeroMQ (unix_sockets.py).

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
        shared_from_bytes: int = 0,
        direct: bool = False,
        keys: Keys | None = None,
    ) -> None:
        place = endpoint.parse(address, guarded=keys is not None)
        if place.scheme == "tcp" and keys is None:
            raise AddressError(f"{me}: {place}: tcp needs keys, on loopback, too: others use this machine; give `keys`")
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
        self._inbox.setsockopt(zmq.RCVHWM, 0)  # credits bound what is on its way; ZeroMQ's marks must never drop
        self._inbox.setsockopt(zmq.SNDHWM, 0)
        self._wake_address = f"inproc://wake-{os.getpid()}-{next(_serial)}"
        self._lock: int | None = None
        self._timeout_s: float | None = None
        self._quick = False
        self._woken = False
        self._sharing = Sharing(me, shared_from_bytes)
        self._direct: Direct | None = None
        self._pair_bytes = min(COPY_BELOW_BYTES, shared_from_bytes or COPY_BELOW_BYTES)
        self._look = True
        try:
            if place.scheme == "ipc":
                self._lock = claim(place.place, place.place + SUFFIX)
            if place.scheme == "tcp":
                _notices_half_open(self._inbox)
                assert keys is not None
                self._doorkeeper = Doorkeeper(self._context, keys)
                self._doorkeeper.start()
                guard(self._inbox, keys)
                # who comes back is not kept out by its own dead connection
                self._inbox.setsockopt(zmq.ROUTER_HANDOVER, 1)
            self._inbox.bind(f"tcp://{place.place}:*" if place.scheme == "tcp" and not place.port else str(place))
            bound = self._inbox.getsockopt(zmq.LAST_ENDPOINT)
            assert isinstance(bound, bytes)
            self._address = bound.rstrip(b"\x00").decode() if place.scheme == "tcp" else str(place)
            self._inbox.bind(self._wake_address)
            if direct and place.scheme == "ipc":
                with contextlib.suppress(OSError):  # then all goes through ZeroMQ
                    self._direct = Direct(me, place.place + SUFFIX, int(self._inbox.getsockopt(zmq.FD)))
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(f"{me}: cannot bind {place}: {error.strerror}") from error
        except AddressError:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self._address

    @property
    def counters(self) -> Counter[str]:
        """What went another way than through ZeroMQ: `shared_sent`, `shared_full`, `direct_sent`."""
        direct = self._direct
        return self._sharing.counters + Counter(direct_sent=direct.sent if direct is not None else 0)

    @property
    def fd(self) -> int:
        """Edge-triggered as ZeroMQ's is, so look (`receive(0)`) before and after every wait on it."""
        return self._direct.fd if self._direct is not None else int(self._inbox.getsockopt(zmq.FD))

    def connect(self, peer: str, address: str) -> None:
        place = endpoint.parse(address, guarded=self._keys is not None)
        if peer in self._dealers:
            return
        if place.scheme == "tcp" and self._keys is None:
            raise AddressError(f"{self.me}: {peer} at {place}: tcp needs keys; give `keys`")
        make_sure_of_descriptors(self.me, OF_A_PEER * (len(self._dealers) + 1))
        try:
            dealer = self._context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.setsockopt(zmq.IDENTITY, self.me.encode())
            dealer.setsockopt(zmq.SNDHWM, 0)
            if place.scheme == "tcp":
                _notices_half_open(dealer)
                assert self._keys is not None
                present(dealer, self._keys, peer)
            dealer.connect(str(place))
        except zmq.ZMQError as error:
            raise LinkBroken(f"{self.me}: cannot connect to {peer} at {place}: {error.strerror}") from error
        self._dealers[peer] = dealer
        if place.scheme == "ipc":
            self._sharing.join(peer)
            if self._direct is not None:
                self._direct.connect(peer, place.place + SUFFIX)

    def disconnect(self, peer: str) -> None:
        self._sharing.leave(peer)
        if self._direct is not None:
            self._direct.disconnect(peer)
        dealer = self._dealers.pop(peer, None)
        if dealer is not None:
            dealer.close(linger=0)

    def send(self, peer: str, header: bytes, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        direct = self._direct
        if direct is not None and len(buffers) == 1 and len(buffers[0]) < self._pair_bytes:
            [tensor] = buffers
            if direct.send_pair(peer, header, tensor):
                return buffers
        if peer not in self._dealers:
            self._answer(peer, header)
            return buffers
        if not buffers:
            self._put(peer, (header,))
            return buffers
        loans = None
        if self._sharing.from_bytes and self._sharing.concerns(peer, buffers):
            loans, sent, kept = self._sharing.lend(peer, buffers)
        if loans is None:  # they go by reference, and are kept until they are acknowledged
            for buffer in buffers:
                if buffer.__class__ is not bytes:
                    buffers = tuple(map(stable, buffers))
                    break
            self._put(peer, (header, *buffers))
            return buffers
        self._put(peer, (b"", loans, header, *sent))
        return kept

    def _put(self, peer: str, frames: Sequence[Buffer]) -> None:
        """The one way out to peers that are connected."""
        direct = self._direct
        if direct is not None and direct.reaches(peer):
            mark = direct.send(peer, frames)
            if mark is None:
                return
            frames = (mark, *frames)
        dealer, last = self._dealers[peer], len(frames) - 1
        try:
            for index, frame in enumerate(frames):
                flags = _LAST if index == last else _MORE
                _send(dealer, frame, flags, copy=len(frame) < COPY_BELOW_BYTES)
        except zmq.ZMQError as error:
            raise LinkBroken(f"{self.me}: cannot send to {peer}: {error.strerror}") from error

    def _answer(self, peer: str, header: bytes) -> None:
        """To one who spoke first and is not of this graph: a refusal."""
        self._look = True  # what comes in meanwhile may not be told of again
        try:
            with contextlib.suppress(zmq.Again):
                self._inbox.send(peer.encode("latin-1"), _MORE)
                self._inbox.send(header, _LAST)
        except zmq.ZMQError as error:
            if self._inbox.closed:
                raise LinkClosed(f"{self.me}: this wire is closed") from None
            if error.errno != zmq.EHOSTUNREACH:  # it has gone since, and nobody waits for the answer
                raise LinkBroken(f"{self.me}: cannot send to {peer}: {error.strerror}") from error

    def receive(self, timeout_s: float | None) -> Arrival | None:
        sharing = self._sharing
        if sharing.borrower.let_go or sharing.outbox:
            self._tell()
        arrival = self._receive(timeout_s)
        if arrival is None or len(arrival.header) or not sharing.from_bytes:
            return arrival
        until_s = time.monotonic() + timeout_s if timeout_s else None
        while arrival is not None and not len(arrival.header):
            whole = sharing.take(arrival)
            if whole is not None:
                return whole
            self._tell()
            if until_s is not None:
                timeout_s = max(0.0, until_s - time.monotonic())
            arrival = self._receive(timeout_s)
        return arrival

    def _tell(self) -> None:
        """What the wires have to say to each other about shared memory."""
        sharing = self._sharing
        sharing.give_back()
        while sharing.outbox:
            peer, frame = sharing.outbox.popleft()
            if peer in self._dealers:
                self._put(peer, (b"", frame))

    def _receive(self, timeout_s: float | None) -> Arrival | None:
        return (
            self._receive_zeromq(timeout_s) if self._direct is None else self._receive_either(self._direct, timeout_s)
        )

    def _receive_either(self, direct: Direct, timeout_s: float | None) -> Arrival | None:
        """The next from a direct socket or from ZeroMQ."""
        if direct.ready:
            return direct.ready.popleft()
        waits = timeout_s != 0
        began_ns = time.monotonic_ns() if waits else 0
        awake_until_ns = began_ns + AWAKE_NS if waits and self._quick and not self._look else 0
        left_s = timeout_s
        while True:
            self._look = direct.wait(0 if self._look else left_s, began_ns, awake_until_ns) or self._look
            awake_until_ns = 0
            woken = self._look and self._drain(direct, began_ns)
            if waits:
                took_ns = time.monotonic_ns() - began_ns
                self._quick = took_ns < AWAKE_NS
                left_s = timeout_s - took_ns / 1e9 if timeout_s is not None else None
            if direct.ready:
                return direct.ready.popleft()
            if woken or not waits or (left_s is not None and left_s <= 0):
                return None

    def _drain(self, direct: Direct, waiting_since_ns: int) -> bool:
        """Take in all that ZeroMQ has, as its descriptor tells of it once. Whether a wake was among it."""
        woken = False
        while True:
            arrival = self._receive_zeromq(0, waiting_since_ns)
            if arrival is None:
                if not self._woken:
                    break
                woken = True
            elif is_mark(arrival.header):
                peer, buffers = arrival.peer, arrival.buffers
                if not buffers:
                    raise ProtocolError(f"{self.me}: expected a message behind a mark from {peer}, got none")
                direct.otherwise(peer, arrival.header, Arrival(peer, buffers[0], buffers[1:], waiting_since_ns))
            else:
                direct.ready.append(arrival)
        self._look = False
        return woken

    def _receive_zeromq(self, timeout_s: float | None, began_ns: int = 0) -> Arrival | None:
        inbox = self._inbox
        self._woken = False
        try:
            # The socket's own time limit, not a poll before the receive: that took 18 µs a hop more on one core.
            if timeout_s == 0:
                identity = inbox.recv(_LAST)
            else:
                if timeout_s != self._timeout_s:
                    inbox.setsockopt(zmq.RCVTIMEO, -1 if timeout_s is None else int(timeout_s * 1000))
                    self._timeout_s = timeout_s
                began_ns = time.monotonic_ns()
                if self._quick:
                    self._wait_awake(began_ns + AWAKE_NS)
                identity = inbox.recv()
                self._quick = time.monotonic_ns() - began_ns < AWAKE_NS
            header = inbox.recv(copy=False)  # a ROUTER's message has at least one frame after the identity
            if self._doorkeeper is not None and identity != _WAKE:
                self._check_speaker(identity, header)
            if not header.more:
                if identity == _WAKE:
                    self._woken = True
                    return None
                return Arrival(identity.decode("latin-1"), header.buffer, ())
            buffers = []
            more = True
            while more:
                frame = inbox.recv(copy=False)
                more = frame.more
                buffers.append(frame.buffer)
                if len(buffers) > MAX_FRAMES:
                    self._drop_rest(more)
                    if self._direct is not None and is_mark(header.buffer):
                        self._direct.otherwise(identity.decode("latin-1"), header.buffer, None)
                    raise ProtocolError(
                        f"{self.me}: expected at most {MAX_TENSORS} tensor frames from {identity!r}, got more"
                    )
        except zmq.Again:
            self._quick = False
            return None
        except zmq.ZMQError as error:
            if inbox.closed or isinstance(error, zmq.ContextTerminated):
                raise LinkClosed(f"{self.me}: this wire is closed") from None
            raise LinkBroken(f"{self.me}: cannot receive: {error.strerror}") from error
        return Arrival(identity.decode("latin-1"), header.buffer, tuple(buffers), began_ns)

    def _check_speaker(self, identity: bytes, header: zmq.Frame) -> None:
        """The key of a connection says as which actor it may speak.

        Raises:
            ProtocolError: it speaks as another.
        """
        actor = header.get("User-Id")
        if identity.partition(b".")[0].decode("latin-1") != actor:
            self._drop_rest(header.more)
            raise ProtocolError(
                f"{self.me}: expected {actor} to speak as itself, got a message from {identity!r} with its key"
            )

    def _wait_awake(self, until_ns: int) -> None:
        inbox, event = self._inbox, zmq.EVENTS
        while not int(inbox.getsockopt(event)) & _READABLE and time.monotonic_ns() < until_ns:
            os.sched_yield()

    def _drop_rest(self, more: bool) -> None:
        while more:
            more = self._inbox.recv(copy=False).more

    def waker(self) -> ZeroWaker:
        """A handle with which one other thread can interrupt `receive`."""
        return ZeroWaker(self._context, self._wake_address)

    def close(self) -> None:
        for socket in self._dealers.values():
            # data was acknowledged before; a refusal or last words may still be on their way
            socket.close(linger=LINGER_MS)
        self._dealers.clear()
        self._inbox.close(linger=0)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.close(self._lock)
            self._lock = None
        self._sharing.close()
        if self._direct is not None:
            self._direct.close()
            self._direct = None
        if self._doorkeeper is not None:
            self._doorkeeper.stop()
        if self._own_context:
            self._context.term()


def _notices_half_open(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def ask(me: str, address: str, question: bytes, timeout_s: float) -> Buffer | None:
    """Send one message to a wire that listens at `address`, and wait for its answer; None if there is none in time.

    Raises:
        AddressError: the address may not be used.
    """
    place = endpoint.parse(address)
    with zmq.Context(io_threads=1) as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.setsockopt(zmq.IDENTITY, me.encode())
        dealer.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
        dealer.connect(str(place))
        dealer.send(question)
        try:
            return dealer.recv()
        except zmq.Again:
            return None


class ZeroWaker:
    """Wakes one `ZeroWire` from one other thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.IDENTITY, _WAKE)
        self._socket.connect(address)

    def wake(self) -> None:
        # closed, or the wire is: nobody is left to wake
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(b"", _LAST)

    def close(self) -> None:
        self._socket.close(linger=0)
