"""The ZeroMQ wire. The only file that sees a `ZMQError`.

Between processes of one machine a large tensor may go through shared memory (shared.py): a message that begins with an empty
frame is the wires' own, what they lend and give back, or one with its loans before the header.

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

import msgspec
import zmq

from . import endpoint
from .errors import AddressError, LinkBroken, LinkClosed, ProtocolError
from .header import MAX_TENSORS
from .link import Arrival
from .message import COPY_BELOW_BYTES, Buffer
from .shared import Borrower, Lender, Loan

LINGER_MS = 500
AWAKE_NS = 500_000
"""Where the last message came within so long, the next is waited for awake, yielding to whoever else can run: a core
that falls asleep wakes late and cold (1.2 kB over ipc: 100 µs a hop instead of 165; benchmarks/hop.py)."""
_MORE = int(zmq.SNDMORE | zmq.DONTWAIT)
_LAST = int(zmq.DONTWAIT)
_READABLE = int(zmq.POLLIN)
_WAKE = b"\x00wake"
_send: Any = zmq.backend.Socket.send  # without the sugar for DRAFT sockets: 0.8 µs less a frame
_serial = itertools.count()


class _Offer(msgspec.Struct, tag=1, array_like=True):
    loan: Loan


class _Answer(msgspec.Struct, tag=2, array_like=True):
    read: bytes


class _Returned(msgspec.Struct, tag=3, array_like=True):
    segments: list[int]


class _Lent(msgspec.Struct, tag=4, array_like=True):
    """Which tensor frames are loans, and which segments are gone. The message follows, with empty frames in their places."""

    dropped: list[int]
    loans: list[tuple[int, Loan]]


_own = msgspec.msgpack.Decoder(_Offer | _Answer | _Returned | _Lent)
_encode = msgspec.msgpack.Encoder().encode
MAX_OWN_BYTES = 1 << 16
MAX_FRAMES = MAX_TENSORS + 2
"""Behind the first frame: a wire's own, a header, tensors. How many tensors a message may have is its header's to say."""


class ZeroWire:
    """A `link.Wire` over ZeroMQ. Owned by the thread that uses it.

    Args:
        me: identity others see, `actor.replica.epoch`.
        address: where to bind; `tcp://127.0.0.1:0` binds any free port (see `address`).
        max_frame_bytes: a peer that sends a larger frame is disconnected by ZeroMQ.
        context: shared by wires that talk over inproc; one of its own if None.
        shared_from_bytes: tensors of so many bytes and more go through shared memory to peers at ipc addresses that can read
            it; 0: none do. `counters` says how many did.

    Raises:
        AddressError: the address may not be used or is in use.
    """

    def __init__(
        self,
        me: str,
        address: str,
        *,
        max_frame_bytes: int,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        shared_from_bytes: int = 0,
    ) -> None:
        place = endpoint.parse(address)
        self.me = me
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
        self.counters: Counter[str] = Counter()
        self._shared_from = shared_from_bytes
        self._lender, self._borrower = Lender(), Borrower()
        self._nonces: dict[str, bytes] = {}
        self._shares: dict[str, bool] = {}
        try:
            if place.scheme == "ipc":
                self._lock = _claim(place.place)
            self._inbox.bind(f"tcp://{place.place}:*" if place.scheme == "tcp" and not place.port else str(place))
            bound = self._inbox.getsockopt(zmq.LAST_ENDPOINT)
            assert isinstance(bound, bytes)
            self._address = bound.rstrip(b"\x00").decode() if place.scheme == "tcp" else str(place)
            self._inbox.bind(self._wake_address)
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
    def fd(self) -> int:
        """ZeroMQ's descriptor: edge-triggered, so look (`receive(0)`) before and after every wait on it."""
        return int(self._inbox.getsockopt(zmq.FD))

    def connect(self, peer: str, address: str) -> None:
        place = endpoint.parse(address)
        if peer in self._dealers:
            return
        try:
            dealer = self._context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.setsockopt(zmq.IDENTITY, self.me.encode())
            dealer.setsockopt(zmq.SNDHWM, 0)
            dealer.connect(str(place))
        except zmq.ZMQError as error:
            raise LinkBroken(f"{self.me}: cannot connect to {peer} at {place}: {error.strerror}") from error
        self._dealers[peer] = dealer
        if self._shared_from and place.scheme == "ipc":
            self._shares[peer] = False

    def disconnect(self, peer: str) -> None:
        self._shares.pop(peer, None)
        self._nonces.pop(peer, None)
        self._lender.forget(peer)
        self._borrower.forget(peer)
        dealer = self._dealers.pop(peer, None)
        if dealer is not None:
            dealer.close(linger=0)

    def send(self, peer: str, header: bytes, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        dealer, kept = self._dealers.get(peer), buffers
        try:
            if dealer is None:
                # an answer to one who spoke first and is not of this graph: a refusal
                with contextlib.suppress(zmq.Again):
                    self._inbox.send(peer.encode("latin-1"), _MORE)
                    self._inbox.send(header, _LAST)
            elif not buffers:
                _send(dealer, header, _LAST)
            else:
                if self._shared_from and peer in self._shares and self._shared_from <= max(map(len, buffers)):
                    kept = list(buffers)
                    buffers = self._lend(peer, dealer, buffers, kept)
                _send(dealer, header, _MORE)
                last = len(buffers) - 1
                for index, buffer in enumerate(buffers):
                    flags = _LAST if index == last else _MORE
                    _send(dealer, buffer, flags, copy=len(buffer) < COPY_BELOW_BYTES)
        except zmq.ZMQError as error:
            if self._inbox.closed:
                raise LinkClosed(f"{self.me}: this wire is closed") from None
            if dealer is None and error.errno == zmq.EHOSTUNREACH:
                return kept  # it has gone since, and nobody waits for the answer
            raise LinkBroken(f"{self.me}: cannot send to {peer}: {error.strerror}") from error
        return kept

    def receive(self, timeout_s: float | None) -> Arrival | None:
        if self._borrower.let_go:
            self._give_back()
        arrival = self._receive(timeout_s)
        if arrival is None or len(arrival.header) or not self._shared_from:
            return arrival
        until_s = time.monotonic() + timeout_s if timeout_s else None
        while arrival is not None and not len(arrival.header):
            whole = self._own_affairs(arrival)
            if whole is not None:
                return whole
            if until_s is not None:
                timeout_s = max(0.0, until_s - time.monotonic())
            arrival = self._receive(timeout_s)
        return arrival

    # -- shared memory ------------------------------------------------------------------------------------------

    def _lend(
        self, peer: str, dealer: zmq.Socket[bytes], buffers: Sequence[Buffer], keep: list[Buffer]
    ) -> Sequence[Buffer]:
        """Lend what is large; what the message carries instead, after the frames that say so. The first such message to a
        peer goes over the wire, with an offer before it."""
        if not self._shares[peer]:
            if peer not in self._nonces and (made := self._lender.offer(peer)) is not None:
                self._nonces[peer] = made[1]
                self._tell(dealer, _Offer(made[0]))
            return buffers
        loans, left = [], list(buffers)
        for index, buffer in enumerate(buffers):
            if len(buffer) >= self._shared_from and (lent := self._lender.lend(peer, buffer)) is not None:
                loans.append((index, lent[0]))
                left[index], keep[index] = b"", lent[1]
        if not loans:
            self.counters["shared_full"] += 1
        else:
            self.counters["shared_sent"] += len(loans)
            _send(dealer, b"", _MORE)
            _send(dealer, _encode(_Lent(self._lender.dropped(peer), loans)), _MORE)
        return left

    def _tell(self, dealer: zmq.Socket[bytes], own: _Offer | _Answer | _Returned) -> None:
        _send(dealer, b"", _MORE)
        _send(dealer, _encode(own), _LAST)

    def _give_back(self) -> None:
        let_go: dict[str, list[int]] = {}
        while self._borrower.let_go:
            peer, segment = self._borrower.let_go.popleft()
            let_go.setdefault(peer, []).append(segment)
        for peer, segments in let_go.items():
            dealer = self._dealers.get(peer)
            if dealer is not None:
                self._tell(dealer, _Returned(segments))

    def _own_affairs(self, arrival: Arrival) -> Arrival | None:
        """A message of the wires' own: the whole message, if it comes with one.

        Raises:
            ProtocolError: it is none, or what it says is lent cannot be read.
        """
        peer, frames = arrival.peer, arrival.buffers
        dealer = self._dealers.get(peer)
        if dealer is None or not frames or len(frames[0]) > MAX_OWN_BYTES:
            raise ProtocolError(f"{self.me}: expected a header from {peer}, got an empty frame")
        try:
            own = _own.decode(frames[0])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"{self.me}: expected a header, or a wire's own frame, from {peer}: {error}") from None
        if isinstance(own, _Lent):
            if len(frames) < 2:
                raise ProtocolError(f"{self.me}: expected a message behind what {peer} lends, got none")
            return self._with_loans(arrival, own)
        if isinstance(own, _Returned):
            self._lender.returned(peer, own.segments)
        elif isinstance(own, _Answer):
            self._shares[peer] = own.read == self._nonces.get(peer) and peer in self._shares
        else:
            try:
                read = bytes(self._borrower.view(peer, own.loan))
            except ProtocolError:
                read = b""  # another user's, another machine's: tensors go over the wire
            self._tell(dealer, _Answer(read))
        return None

    def _with_loans(self, arrival: Arrival, lent: _Lent) -> Arrival:
        peer = arrival.peer
        header, buffers = arrival.buffers[1], list(arrival.buffers[2:])
        self._borrower.drop(peer, lent.dropped)
        for index, loan in lent.loans:
            if not 0 <= index < len(buffers) or len(buffers[index]):
                raise ProtocolError(f"{self.me}: expected the place of a tensor that {peer} lends, got {index}")
            try:
                buffers[index] = self._borrower.view(peer, loan)
            except ProtocolError:  # no descriptors, no memory: it will be asked for again, and come over the wire
                self._tell(self._dealers[peer], _Answer(b""))
                raise
        return Arrival(peer, header, tuple(buffers), arrival.waiting_since_ns)

    def _receive(self, timeout_s: float | None) -> Arrival | None:
        inbox = self._inbox
        try:
            began_ns = 0
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
            if not header.more:
                if identity == _WAKE:
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
        self._lender.close()
        if self._own_context:
            self._context.term()


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


def _claim(path: str) -> int:
    """Hold a lock beside the socket: binding a path that is in use would silently steal it.

    Raises:
        AddressError: another process holds it, or the folder is not there.
    """
    import fcntl

    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AddressError(f"ipc://{path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise AddressError(f"ipc://{path}: another process listens there") from None
    return lock
