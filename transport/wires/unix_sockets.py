"""Small messages between processes of one machine past ZeroMQ's threads: over Unix sockets that keep messages whole.

Through ZeroMQ a message is handed from the sender's thread to an I/O thread, by it to another in the receiver, and by that to
the receiver's: three threads to wake. Here it is one system call at each end, and one thread to wake (576 bfloat16 values
to and fro between two bare processes with a core each: 4 µs awake and 18 asleep, ZeroMQ 29).

What is large still goes through ZeroMQ, whose thread sends while the actor computes. A mark stands in its place here, so that
the order is kept: what comes behind a mark is held until the message that it announces has come the other way.

Any identity may be claimed, as with ZeroMQ: who may open the socket is of the same user, by the run folder's mode.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence

from ..format.errors import ProtocolError
from ..format.header import MAX_TENSORS
from ..format.message import Buffer
from ..links.link import Arrival

SUFFIX = ".d"
"""Behind the path of the ZeroMQ socket beside which it listens."""
MAX_PACKET_BYTES = 256 << 10
SEND_BUFFER_BYTES = 1 << 20
"""Asked for; the system gives less where its limit is lower, and then packets are smaller, too."""
BEHIND_S = 2.0
"""How long what came behind a mark is held; the message may have been lost with its connection."""
MAX_FRAMES = MAX_TENSORS + 3
"""A header and tensors, and what a wire puts before them of its own (lending.py)."""
BACKLOG = 128
MAX_EVENTS = 64
ALIGN = 16
_PAD = bytes(ALIGN)
_PADS = [_PAD[: -size % ALIGN] for size in range(ALIGN)]
_SIZES = [struct.Struct(f"<H{count}I") for count in range(MAX_FRAMES + 1)]
_COUNT = struct.Struct("<H")
_TWO = struct.Struct("<HII6x")
"""Before a header and one tensor, as far as where the header begins."""
_MARK = struct.Struct("<HI")
_OTHERWISE = struct.Struct("<xI")
"""The frame before a message that was announced by a mark; no header begins with a zero byte."""
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class _Out:
    """One peer that is sent to. `backlog` is what its socket had no room for."""

    def __init__(self, peer: str, connected: socket.socket) -> None:
        self.peer, self.socket = peer, connected
        room = connected.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.most_bytes = min(MAX_PACKET_BYTES, room // 2 - 4096)
        self.backlog: deque[bytes] = deque()
        self.marks = 0


class _In:
    """One peer that sends. `marked` is its last mark that was come to, `behind` whether that one's message is still to come,
    and `held` what came after it."""

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.peer = ""
        self.marked = 0
        self.behind = False
        self.since_s = 0.0
        self.held: deque[Arrival | int] = deque()


class Direct:
    """The direct sockets of one wire: a listener at `path`, and what comes and goes. `beside` is ZeroMQ's descriptor, which is
    waited for, too. `ready` holds messages in the order in which they are to be taken, `sent` counts what went this way.

    Raises:
        OSError: it cannot listen there; then all goes through ZeroMQ.
    """

    def __init__(self, me: str, path: str, beside: int) -> None:
        self.me = me
        self.ready: deque[Arrival] = deque()
        self.sent = 0
        self._path = path
        self._out: dict[str, _Out] = {}
        self._in: dict[int, _In] = {}
        self._by_peer: dict[str, _In] = {}
        self._early: dict[tuple[str, int], Arrival | None] = {}
        self._gone: set[str] = set()
        self._full: dict[int, _Out] = {}
        self._buffer = bytearray(MAX_PACKET_BYTES)
        self._view = memoryview(self._buffer)
        self._beside = beside
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            self._listener.setblocking(False)
            with contextlib.suppress(FileNotFoundError):  # left by a process that was killed: the wire holds the lock
                os.unlink(path)
            self._listener.bind(path)
            self._listener.listen(BACKLOG)
            self._epoll = stack.enter_context(select.epoll())
            self._epoll.register(beside, select.EPOLLIN)
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)
            stack.pop_all()

    @property
    def fd(self) -> int:
        """Readable while there is anything to take, ZeroMQ's messages among it."""
        return self._epoll.fileno()

    # -- sending ------------------------------------------------------------------------------------------------

    def connect(self, peer: str, path: str) -> None:
        """Send to `peer` directly from now on, if it listens at `path`."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            made.connect(path)
            made.send(self.me.encode(), _FLAGS)
        except OSError:  # it does not listen, is not of this user, has no room: through ZeroMQ it can be reached
            made.close()
            return
        self._out[peer] = _Out(peer, made)

    def reaches(self, peer: str) -> bool:
        return peer in self._out

    def send(self, peer: str, frames: Sequence[Buffer]) -> bytes | None:
        """Send `frames` to a peer that it `reaches`. If they are too large, what is returned is to go before them through
        ZeroMQ."""
        out = self._out[peer]
        parts = _packet(frames, out.most_bytes)
        if parts is None:
            out.marks += 1
            self._put(out, [_MARK.pack(0, out.marks)])
            return _OTHERWISE.pack(out.marks)
        self.sent += 1
        self._put(out, parts)
        return None

    def send_pair(self, peer: str, header: bytes, tensor: Buffer) -> bool:
        """Send a header and one small tensor, what nearly every message is, in half the time of `send`. False: not done."""
        out = self._out.get(peer)
        if out is None or out.backlog:
            return False
        size = len(header)
        packet = b"".join((_TWO.pack(2, size, len(tensor)), header, _PADS[size % ALIGN], tensor))
        if len(packet) > out.most_bytes:
            return False
        try:
            out.socket.send(packet, _FLAGS)
        except OSError:  # full, or gone: `send` sees to it
            return False
        self.sent += 1
        return True

    def _put(self, out: _Out, parts: Sequence[Buffer]) -> None:
        if not out.backlog:
            try:
                out.socket.sendmsg(parts, (), _FLAGS)
                return
            except BlockingIOError:
                self._full[out.socket.fileno()] = out
                self._epoll.register(out.socket.fileno(), select.EPOLLOUT)
            except OSError:  # the peer is gone; what it did not acknowledge is sent again, through ZeroMQ
                self.disconnect(out.peer)
                return
        out.backlog.append(b"".join(parts))

    def _put_backlog(self, out: _Out) -> None:
        try:
            while out.backlog:
                out.socket.send(out.backlog[0], _FLAGS)
                out.backlog.popleft()
        except BlockingIOError:
            return
        except OSError:
            self.disconnect(out.peer)
            return
        del self._full[out.socket.fileno()]
        self._epoll.unregister(out.socket.fileno())

    # -- receiving ----------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None, waiting_since_ns: int, awake_until_ns: int = 0) -> bool:
        """Take in what has come, waiting up to `timeout_s` (None: for ever) for something to come. Whether ZeroMQ is to be
        looked at. `waiting_since_ns` is what arrivals say. Until `awake_until_ns` it waits without sleeping, giving way to
        whoever else can run.

        Raises:
            ProtocolError: a peer sent what no message is; it is dropped.
        """
        look, poll = False, self._epoll.poll
        events = poll(0, MAX_EVENTS) if awake_until_ns else []
        while not events and time.monotonic_ns() < awake_until_ns:
            os.sched_yield()
            events = poll(0, MAX_EVENTS)
        for fd, _ in events or poll(timeout_s, MAX_EVENTS):
            if (came := self._in.get(fd)) is not None:
                self._read(fd, came, waiting_since_ns)
            elif fd == self._beside:
                look = True
            elif fd in self._full:
                self._put_backlog(self._full[fd])
            else:
                self._accept()
        return look

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:  # it has gone again, or there are no descriptors: the peer then goes through ZeroMQ
            return
        accepted.setblocking(False)
        self._in[accepted.fileno()] = _In(accepted)
        self._epoll.register(accepted.fileno(), select.EPOLLIN)

    def _read(self, fd: int, came: _In, waiting_since_ns: int) -> None:
        try:
            size = came.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self._forget(fd)
        elif not came.peer:
            came.peer = bytes(self._view[:size]).decode("latin-1")
            self._by_peer[came.peer] = came
        else:
            packet = memoryview(bytearray(self._view[:size]))
            try:
                frames = _frames(packet)
            except ProtocolError as error:
                self._forget(fd)
                raise ProtocolError(f"{self.me}: expected a message from {came.peer}, {error}") from None
            if isinstance(frames, int):
                self._on_mark(came, frames)
                return
            arrival = Arrival(came.peer, frames[0], tuple(frames[1:]), waiting_since_ns)
            if came.behind:
                came.held.append(arrival)
                if time.monotonic() > came.since_s + BEHIND_S:
                    self._release(came)
            else:
                self.ready.append(arrival)

    def _on_mark(self, came: _In, number: int) -> None:
        if came.behind:
            came.held.append(number)
            return
        came.marked = number
        if (came.peer, number) in self._early:
            self._add(self._early.pop((came.peer, number)))
        else:
            came.behind, came.since_s = True, time.monotonic()

    def otherwise(self, peer: str, mark: Buffer, arrival: Arrival | None) -> None:
        """A message that a mark announces has come through ZeroMQ; None: it was refused."""
        [number] = _OTHERWISE.unpack(mark)
        came = self._by_peer.get(peer)
        if peer not in self._gone and (came is None or number > came.marked):
            self._early[peer, number] = arrival
            return
        self._add(arrival)
        if came is not None and came.behind and number == came.marked:
            self._release(came)

    def _add(self, arrival: Arrival | None) -> None:
        if arrival is not None:
            self.ready.append(arrival)

    def _release(self, came: _In) -> None:
        """What was held, up to the next mark whose message has not come."""
        came.behind = False
        while came.held:
            following = came.held.popleft()
            if isinstance(following, Arrival):
                self.ready.append(following)
            else:
                self._on_mark(came, following)
                if came.behind:
                    return

    # -- the end ------------------------------------------------------------------------------------------------

    def disconnect(self, peer: str) -> None:
        """Send no more to `peer`."""
        self._gone.discard(peer)
        out = self._out.pop(peer, None)
        if out is not None:
            if self._full.pop(out.socket.fileno(), None) is not None:
                self._epoll.unregister(out.socket.fileno())
            out.socket.close()

    def _forget(self, fd: int) -> None:
        came = self._in.pop(fd)
        self._epoll.unregister(fd)
        came.socket.close()
        self.ready.extend(arrival for arrival in came.held if isinstance(arrival, Arrival))
        if self._by_peer.get(came.peer) is came:
            del self._by_peer[came.peer]
            self._gone.add(came.peer)
            for key in [key for key in self._early if key[0] == came.peer]:
                self._add(self._early.pop(key))

    def close(self) -> None:
        """Idempotent."""
        for peer in list(self._out):
            self.disconnect(peer)
        for fd in list(self._in):
            self._forget(fd)
        self._listener.close()
        self._epoll.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def is_mark(frame: Buffer) -> bool:
    """Whether the first frame of a message that came through ZeroMQ says that a mark announces it."""
    return len(frame) == _OTHERWISE.size and not frame[0]


def _packet(frames: Sequence[Buffer], most_bytes: int) -> list[Buffer] | None:
    """The parts of a packet: how many frames it has, their sizes, and the frames, each at a multiple of ALIGN bytes. None if
    it would be larger than `most_bytes`."""
    sizes = [len(frame) for frame in frames]
    if len(sizes) > MAX_FRAMES:
        return None
    prefix = _SIZES[len(sizes)].pack(len(sizes), *sizes)
    parts: list[Buffer] = [prefix]
    at = len(prefix)
    for frame, size in zip(frames, sizes, strict=True):
        if gap := -at % ALIGN:
            parts.append(_PAD[:gap])
        parts.append(frame)
        at += gap + size
    return parts if at <= most_bytes else None


def _frames(packet: memoryview) -> list[memoryview] | int:
    """The frames of a packet, or the number of a mark.

    Raises:
        ProtocolError: its sizes are not what it says.
    """
    size = len(packet)
    if size >= _TWO.size and packet[0] == 2:  # nearly every message: in half the time
        count, of_header, of_tensor = _TWO.unpack_from(packet)
        at = _TWO.size + of_header + len(_PADS[of_header % ALIGN])
        if count == 2 and at + of_tensor == size:
            return [packet[_TWO.size : _TWO.size + of_header], packet[at:]]
    count = _COUNT.unpack_from(packet)[0] if size >= _COUNT.size else MAX_FRAMES + 1
    if count == 0 and len(packet) == _MARK.size:
        return int(_MARK.unpack(packet)[1])
    if not 0 < count <= MAX_FRAMES or len(packet) < _SIZES[count].size:
        raise ProtocolError(f"got a packet of {len(packet)} bytes that says it has {count} frames")
    at = _SIZES[count].size
    frames = []
    for size in _SIZES[count].unpack_from(packet)[1:]:
        at += -at % ALIGN
        frames.append(packet[at : at + size])
        at += size
    if at != len(packet):
        raise ProtocolError(f"got a packet of {len(packet)} bytes, {at} by the sizes of its {count} frames")
    return frames
