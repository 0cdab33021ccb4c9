"""Record which sessions are inside a host's current step, where the supervisor can read it after the host has died.

A host that dies cannot report what it was doing. Its sessions are opened again, and a session that kills the host repeatedly
must be distinguished from those that were only open there. The board is a page of memory that is shared through a file
beside the host's sockets. Writing to it costs the step thread 0.2 µs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

PAGE_BYTES = 4096
MOST = PAGE_BYTES // 8 - 1
_WORDS = struct.Struct(f"<{PAGE_BYTES // 8}q")


def board(file: Path) -> memoryview:
    """Return the board for writing, in a host. Its first number counts the sessions inside the step, then come their numbers.

    If the file cannot be created, the board is private memory: the supervisor then cannot distinguish the sessions.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, PAGE_BYTES)  # writing to a page without disk space would kill the process
            return memoryview(mmap.mmap(descriptor, PAGE_BYTES)).cast("q")
        finally:
            os.close(descriptor)
    return memoryview(bytearray(PAGE_BYTES)).cast("q")


def write(board: memoryview, sessions: Sequence[int]) -> None:
    """Record that these sessions are inside a step from now on. Only the first `MOST` are recorded."""
    count = min(len(sessions), MOST)
    for index in range(count):
        board[index + 1] = sessions[index]
    board[0] = count


def inside(file: Path) -> frozenset[int] | None:
    """Return the sessions that were inside a step when their host was lost, or None if that is not known."""
    try:
        page = file.read_bytes()
    except OSError:
        return None
    if len(page) != PAGE_BYTES:
        return None
    count, *sessions = _WORDS.unpack(page)
    return frozenset(sessions[:count]) if 0 <= count <= MOST else None
