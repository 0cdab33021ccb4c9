"""Lend large tensors to another process in memory that both map.

The sender copies a tensor once into a segment (a memfd), and says over the wire where it lies. The receiver maps the segment
and reads the tensor in place. The segment is lent until the receiver has released its last view. Over a socket, the same
bytes are copied twice, into the kernel and out of it (benchmarks/large.py).

A segment has no name in a file system. It is opened through /proc, by processes that may access the sender's process (those of
the same user). It ends with the last process that maps it. It is sealed against shrinking, so that no sender can take it
away from a reader. This module knows neither torch nor ZeroMQ.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import secrets
import weakref
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import numpy as np

from ..format.errors import ProtocolError
from ..format.message import Buffer
from ..system import LINUX

ROUND_BYTES = 1 << 16
"""The size of a segment is a multiple of this, so that messages of similar sizes reuse the same segments."""
MOST_BYTES = 256 << 20
"""Largest size of all segments that one process lends or keeps ready. Beyond it, tensors go over the socket."""
MOST_IDLE_BYTES = 64 << 20
"""Largest size of the segments that one process keeps ready without lending them."""
NONCE_BYTES = 32
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW if LINUX else 0


class Loan(NamedTuple):
    """Say where bytes lie: a descriptor of a process, the segment's number and size, and how many bytes of it are used."""

    pid: int
    fd: int
    segment: int
    size: int
    nbytes: int


class _Segment:
    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.fd = os.memfd_create("ranvier", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            self.memory = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a view of it still exists; the memory ends with that view
            self.memory.close()
        os.close(self.fd)


class Lender:
    """Keep the segments of one process: which are lent to whom, and which are ready.

    A segment is ready again when the peer has given it back and the sender's own view of it has ended. The sender keeps that
    view until the message is acknowledged, because it may have to send the message again.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, most_idle_bytes: int = MOST_IDLE_BYTES) -> None:
        self._most_bytes, self._most_idle_bytes = most_bytes, most_idle_bytes
        self._lent: dict[int, tuple[_Segment, str]] = {}
        self._kept: dict[int, _Segment] = {}
        self._let_go: deque[int] = deque()
        self._ready: deque[_Segment] = deque()
        self._numbers = itertools.count(1)
        self._dropped: dict[str, list[int]] = {}
        self._seen: dict[int, set[str]] = {}

    @property
    def held_bytes(self) -> int:
        """Return the size of all segments, lent or ready."""
        used = {**self._kept, **{number: segment for number, (segment, _) in self._lent.items()}}
        return sum(segment.size for segment in [*used.values(), *self._ready])

    def lend(self, peer: str, data: Buffer) -> tuple[Loan, memoryview] | None:
        """Copy `data` into a segment that is lent to `peer`.

        Returns:
            The loan, and the sender's own view of the copy, which can replace `data` from now on. None if there is no
            room now.
        """
        self._take_back()
        nbytes = len(data)
        size = -(-nbytes // ROUND_BYTES) * ROUND_BYTES
        segment = next((ready for ready in self._ready if size <= ready.size <= 2 * size), None)
        if segment is not None:
            self._ready.remove(segment)
        else:
            segment = self._make(size)
            if segment is None:
                return None
        ctypes.memmove(segment.address, np.frombuffer(data, np.uint8).ctypes.data, nbytes)
        self._lent[segment.number] = segment, peer
        self._seen.setdefault(segment.number, set()).add(peer)
        self._kept[segment.number] = segment
        own = _view(segment.memory, nbytes, self._let_go, segment.number)
        return Loan(os.getpid(), segment.fd, segment.number, segment.size, nbytes), own

    def offer(self, peer: str) -> tuple[Loan, bytes] | None:
        """Make a first loan, of random bytes. A peer that can read them can read other loans."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        lent = self.lend(peer, nonce)
        return (lent[0], nonce) if lent is not None else None

    def returned(self, peer: str, segments: Iterable[int]) -> None:
        """Take back segments that `peer` has released. Ignore those it does not hold: it may return one twice."""
        for number in segments:
            if number in self._lent and self._lent[number][1] == peer:
                segment, _ = self._lent.pop(number)
                if number not in self._kept:
                    self._ready.append(segment)
        self._take_back()

    def _take_back(self) -> None:
        while self._let_go:
            segment = self._kept.pop(self._let_go.popleft(), None)
            if segment is not None and segment.number not in self._lent:
                self._ready.append(segment)
        idle = sum(segment.size for segment in self._ready)
        while idle > self._most_idle_bytes:
            idle -= self._drop(self._ready.popleft())

    def dropped(self) -> dict[str, list[int]]:
        """Return the segments that no longer exist, by the peers that may still map them. Each is returned once."""
        dropped, self._dropped = self._dropped, {}
        return dropped

    def forget(self, peer: str) -> None:
        """Forget a peer that has ended, and take back what it was lent."""
        self.returned(peer, [number for number, (_, to) in self._lent.items() if to == peer])
        self._dropped.pop(peer, None)
        for seen in self._seen.values():
            seen.discard(peer)

    def close(self) -> None:
        """Close all segments. A peer that maps one keeps it until it releases it. Calling this twice does no harm."""
        used = {**self._kept, **{number: segment for number, (segment, _) in self._lent.items()}}
        for segment in [*self._ready, *used.values()]:
            segment.close()
        self._ready.clear()
        self._lent.clear()
        self._kept.clear()

    def _make(self, size: int) -> _Segment | None:
        held = self.held_bytes
        while held + size > self._most_bytes and self._ready:
            held -= self._drop(self._ready.popleft())
        if held + size > self._most_bytes:
            return None
        try:
            return _Segment(next(self._numbers), size)
        except (OSError, ValueError):  # no memory or no descriptors: the socket carries the tensor, too
            return None

    def _drop(self, segment: _Segment) -> int:
        for peer in self._seen.pop(segment.number, ()):
            self._dropped.setdefault(peer, []).append(segment.number)
        segment.close()
        return segment.size


class Borrower:
    """Keep the segments of other processes that one process maps.

    `let_go` holds the segments to be given back, each with its peer. Views may end in any thread.
    """

    def __init__(self) -> None:
        self._mapped: dict[tuple[str, int], mmap.mmap] = {}
        self.let_go: deque[tuple[str, int]] = deque()

    def view(self, peer: str, loan: Loan) -> memoryview:
        """Return the bytes of a loan, in place.

        Raises:
            ProtocolError: the loan cannot be opened, or is not a sealed segment of that size.
        """
        if not 0 < loan.nbytes <= loan.size:
            raise ProtocolError(f"expected at most the {loan.size} bytes of a segment of {peer}, got {loan.nbytes}")
        memory = self._mapped.get((peer, loan.segment))
        if memory is None or len(memory) != loan.size:
            memory = self._mapped[peer, loan.segment] = _map(peer, loan)
        return _view(memory, loan.nbytes, self.let_go, (peer, loan.segment))

    def drop(self, peer: str, segments: Iterable[int]) -> None:
        """Unmap segments that the lender does not use any more. Memory that a view still shows stays until the view ends."""
        for number in segments:
            self._mapped.pop((peer, number), None)

    def forget(self, peer: str) -> None:
        """Unmap everything of a peer that has ended."""
        self.drop(peer, [number for other, number in self._mapped if other == peer])


T = TypeVar("T")


def _view(memory: mmap.mmap, nbytes: int, let_go: deque[T], what: T) -> memoryview:
    """Return the first bytes of `memory`. When nobody holds them any more, `what` is appended to `let_go`."""
    array = np.frombuffer(memory, np.uint8, nbytes)
    ends = weakref.finalize(array, let_go.append, what)
    ends.atexit = False
    return array.data


def _map(peer: str, loan: Loan) -> mmap.mmap:
    where = f"a segment of {peer}, {loan.size} bytes at descriptor {loan.fd} of process {loan.pid}"
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(f"/proc/{loan.pid}/fd/{loan.fd}", os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            seals, size = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
            if seals & SEALS != SEALS or size != loan.size:
                raise ProtocolError(f"expected {where}, sealed, got {size} bytes with seals {seals}")
            # writable, as received frames are: an actor that writes into its input changes nobody else's data
            return mmap.mmap(fd, loan.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"expected {where}, which cannot be mapped: {error}") from None
