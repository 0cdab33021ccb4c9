"""Carry frames between processes of one machine over Unix sockets that keep packets whole (SOCK_SEQPACKET).

A message that fits into one packet is sent as one, a larger message as several in a row. For one packet, one system call sends
it, one receives it, and one thread wakes up. So 576 bfloat16 values reach a sleeping process in 18 µs. ZeroMQ takes 29 µs,
because it passes each message through a thread at both ends (benchmarks/hop.py).

A process sends over connections that it opened, and receives over those that it accepted. The first packet of a connection is
the sender's identity. A peer may claim any identity: the mode of the run folder admits only the same user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence

from ..format.errors import LinkClosed, ProtocolError
from ..format.message import Buffer
from ..links.wire import Arrival
from ..system import LINUX
from .packets import SEVERAL, Packet, announced, frames_of, packets_of, pair

MAX_PACKET_BYTES = 256 << 10
SEND_BUFFER_BYTES = 1 << 20
"""Requested size of a send buffer. If the system's limit is lower, the buffer and the packets are smaller."""
MAX_OTHER_BYTES = 1 << 20
"""Bytes that a message in several packets may have in addition to its largest frame."""
RETRY_S = 0.05
"""Seconds between two attempts to reach a peer that does not listen, or to accept while no descriptors are left."""
BACKLOG = 128
MAX_EVENTS = 64
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL if LINUX else 0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class _Out:
    """Hold the connection to a peer that messages are sent to.

    `backlog` holds the packets that wait until the socket has room, or until the peer listens.
    """

    def __init__(self, peer: str, path: str) -> None:
        self.peer, self.path = peer, path
        self.socket: socket.socket | None = None
        self.most_bytes = MAX_PACKET_BYTES
        self.backlog: deque[Packet] = deque()
        self.retry_s = 0.0


class _In:
    """Hold the connection of a peer that sends. Of a message in several packets, `whole`, `arrived` bytes have come."""

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.peer = ""
        self.whole: memoryview | None = None
        self.arrived = 0


class UnixSockets:
    """Hold the sockets of one wire: a listener at `path`, connections from peers, and connections to peers.

    `ready` holds the received messages; those of one peer are in order. `pieces` counts messages sent in several packets.

    Args:
        me: the identity that peers see.
        path: where to listen. The caller holds the lock of that path (descriptors.py).
        max_frame_bytes: a peer that announces a larger frame is disconnected.

    Raises:
        OSError: the listener cannot be opened at `path`.
    """

    def __init__(self, me: str, path: str, max_frame_bytes: int) -> None:
        self.me = me
        self.ready: deque[Arrival] = deque()
        self.pieces = 0
        self.closed = False
        self._path = path
        self._max_bytes = max_frame_bytes
        self._out: dict[str, _Out] = {}
        self._down: set[str] = set()
        self._out_of: dict[int, _Out] = {}
        self._in: dict[int, _In] = {}
        self._accept_again_s: float | None = None
        self._came = False
        self._buffer = bytearray(MAX_PACKET_BYTES)
        self._view = memoryview(self._buffer)
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            self._listener.setblocking(False)
            with contextlib.suppress(FileNotFoundError):  # left by a process that was killed
                os.unlink(path)
            self._listener.bind(path)
            self._listener.listen(BACKLOG)
            self._epoll = stack.enter_context(select.epoll())
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)
            self._wakes = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, self._wakes)
            self._epoll.register(self._wakes, select.EPOLLIN)
            stack.pop_all()

    @property
    def fd(self) -> int:
        """Return the descriptor that is readable while there is anything to do."""
        return self._epoll.fileno()

    @property
    def wakes(self) -> int:
        """Return the eventfd that interrupts `wait`."""
        return self._wakes

    def knows(self, peer: str) -> bool:
        """Return whether `connect` was called for a peer."""
        return peer in self._out

    # -- sending ------------------------------------------------------------------------------------------------

    def connect(self, peer: str, path: str) -> None:
        """Connect to `peer` at `path`. Until the peer listens there, packets for it wait here."""
        out = self._out[peer] = _Out(peer, path)
        self._reach(out)

    def _reach(self, out: _Out) -> None:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            out.most_bytes = min(MAX_PACKET_BYTES, made.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2 - 4096)
            made.connect(out.path)
            made.send(self.me.encode(), _FLAGS)
        except OSError:  # the peer does not listen yet, or no longer
            made.close()
            out.retry_s = time.monotonic() + RETRY_S
            self._down.add(out.peer)
            return
        out.socket = made
        self._out_of[made.fileno()] = out
        self._down.discard(out.peer)
        self._epoll.register(made.fileno(), select.EPOLLOUT if out.backlog else 0)  # 0 still reports its end

    def send(self, peer: str, frames: Sequence[Buffer]) -> None:
        """Send `frames` to a peer that this wire knows, in as many packets as they need.

        Raises:
            ProtocolError: there are more frames than a message may have.
        """
        out = self._out[peer]
        if out.socket is None and time.monotonic() >= out.retry_s:
            self._reach(out)
        packets = packets_of(frames, out.most_bytes)
        self.pieces += len(packets) > 1
        for packet in packets:
            if not self._put(out, packet):
                return

    def send_pair(self, peer: str, header: bytes, tensor: Buffer) -> bool:
        """Send a header and one small tensor in half the time of `send`. Nearly every message has this form.

        Return False if the message was not sent.
        """
        out = self._out.get(peer)
        if out is None or out.backlog or out.socket is None:
            return False
        packet = pair(header, tensor)
        if len(packet) > out.most_bytes:
            return False
        try:
            out.socket.send(packet, _FLAGS)
        except OSError:  # full, or gone: `send` handles both
            return False
        return True

    def _put(self, out: _Out, packet: Packet) -> bool:
        """Send a packet, or keep it until there is room. Return False if the connection is lost."""
        if not out.backlog and out.socket is not None:
            try:
                out.socket.sendmsg(packet, (), _FLAGS)
                return True
            except BlockingIOError:
                self._epoll.modify(out.socket.fileno(), select.EPOLLOUT)
            except OSError:  # the links above send unacknowledged messages again
                self._lose(out)
                return False
        out.backlog.append(packet)
        return True

    def _put_backlog(self, out: _Out) -> None:
        assert out.socket is not None
        try:
            while out.backlog:
                out.socket.sendmsg(out.backlog[0], (), _FLAGS)
                out.backlog.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._lose(out)
            return
        self._epoll.modify(out.socket.fileno(), 0)

    def _lose(self, out: _Out) -> None:
        """Drop a broken connection with its backlog. The next message, or the next wait, connects again."""
        self._hang_up(out)
        out.backlog.clear()
        out.retry_s = time.monotonic() + RETRY_S
        self._down.add(out.peer)

    def _hang_up(self, out: _Out) -> None:
        if out.socket is not None:
            self._epoll.unregister(out.socket.fileno())
            del self._out_of[out.socket.fileno()]
            out.socket.close()
            out.socket = None

    # -- receiving ----------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None, waiting_since_ns: int, awake_until_ns: int = 0) -> bool:
        """Wait up to `timeout_s` (None: forever) for events, and process them. Return whether a `UnixWaker` woke it.

        `waiting_since_ns` goes into the arrivals. Until `awake_until_ns` the wait does not sleep, but yields the core to
        other threads that can run.

        Raises:
            LinkClosed: the sockets are closed.
            ProtocolError: a peer sent something that is not a message. That peer is disconnected.
        """
        if self.closed:
            raise LinkClosed(f"{self.me}: this wire is closed")
        if self._down or self._accept_again_s is not None:
            timeout_s = self._try_again(timeout_s)
        woken, poll = False, self._epoll.poll
        events = poll(0, MAX_EVENTS) if awake_until_ns else []
        while not events and time.monotonic_ns() < awake_until_ns:
            os.sched_yield()
            events = poll(0, MAX_EVENTS)
        events = events or poll(timeout_s, MAX_EVENTS)
        while events:
            self._came = False
            for fd, event in events:
                if (came := self._in.get(fd)) is not None:
                    self._read(fd, came, waiting_since_ns)
                elif (out := self._out_of.get(fd)) is not None:
                    self._on_out(out, event)
                elif fd == self._wakes:
                    os.eventfd_read(fd)
                    woken = True
                elif fd == self._listener.fileno():
                    self._accept()
            events = poll(0, MAX_EVENTS) if self._came else []  # a new peer may have sent already
        return woken

    def _try_again(self, timeout_s: float | None) -> float:
        """Retry connections and accepts that failed before. Return the timeout of the next wait, in seconds."""
        now_s = time.monotonic()
        if self._accept_again_s is not None and now_s >= self._accept_again_s:
            self._accept_again_s = None
            self._epoll.modify(self._listener.fileno(), select.EPOLLIN)
        for peer in list(self._down):
            if now_s >= self._out[peer].retry_s:
                self._reach(self._out[peer])
        return RETRY_S if timeout_s is None else min(timeout_s, RETRY_S)

    def _on_out(self, out: _Out, event: int) -> None:
        if event & select.EPOLLOUT:
            self._put_backlog(out)
        if event & ~select.EPOLLOUT and out.socket is not None:
            self._lose(out)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:  # the connection stays in the kernel; retrying at once would busy a core
                self._accept_again_s = time.monotonic() + RETRY_S
                self._epoll.modify(self._listener.fileno(), 0)
            return
        self._came = True
        accepted.setblocking(False)
        self._in[accepted.fileno()] = _In(accepted)
        self._epoll.register(accepted.fileno(), select.EPOLLIN)

    def _read(self, fd: int, came: _In, waiting_since_ns: int) -> None:
        try:
            size = came.socket.recv_into(self._buffer if came.whole is None else came.whole[came.arrived :])
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self._forget(fd)
            return
        if not came.peer:
            came.peer, self._came = bytes(self._view[:size]).decode("latin-1"), True
            return
        try:
            if came.whole is None and self._buffer[0] != SEVERAL[0]:
                packet = memoryview(bytearray(self._view[:size]))
            elif (whole := self._whole(came, size)) is not None:
                packet = whole
            else:
                return
            frames = frames_of(packet)
        except ProtocolError as error:
            self._forget(fd)
            raise ProtocolError(f"{self.me}: expected a message from {came.peer}, {error}") from None
        self.ready.append(Arrival(came.peer, frames[0], tuple(frames[1:]), waiting_since_ns))

    def _whole(self, came: _In, size: int) -> memoryview | None:
        """Add a packet to its message of several packets. Return the message, or None if more packets are missing."""
        if came.whole is not None:
            came.arrived += size
            if came.arrived < len(came.whole):
                return None
            packet, came.whole = came.whole, None
            return packet
        prefix = self._view[2:size]
        total, well_formed = announced(prefix)
        if not well_formed or total > self._max_bytes + MAX_OTHER_BYTES:
            raise ProtocolError(
                f"with frames of at most {self._max_bytes} bytes, got a packet of {size} bytes that announces {total} bytes"
            )
        came.whole, came.arrived = memoryview(bytearray(total)), len(prefix)
        came.whole[: len(prefix)] = prefix
        return None

    # -- the end ------------------------------------------------------------------------------------------------

    def disconnect(self, peer: str) -> None:
        """Close the connection to `peer`. Unknown peers are ignored."""
        out = self._out.pop(peer, None)
        self._down.discard(peer)
        if out is not None:
            self._hang_up(out)

    def _forget(self, fd: int) -> None:
        came = self._in.pop(fd)
        self._epoll.unregister(fd)
        came.socket.close()

    def close(self) -> None:
        """Close all sockets and remove the listener's path. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for peer in list(self._out):
            self.disconnect(peer)
        for fd in list(self._in):
            self._forget(fd)
        self._listener.close()
        self._epoll.close()
        os.close(self._wakes)
        with contextlib.suppress(OSError):
            os.unlink(self._path)


class UnixWaker:
    """Wake one `UnixSockets.wait` from another thread."""

    def __init__(self, wakes: int) -> None:
        self._fd = os.dup(wakes)

    def wake(self) -> None:
        """Interrupt the current wait, or else the next one."""
        os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
