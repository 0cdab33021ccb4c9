"""Which sessions are inside the step that a host takes: written where its supervisor can read it after the host is gone.

A host that dies says nothing of what it was doing. Its sessions are opened anew, and one that kills it again and again must be
told from those that were only nearby. The board is a page of memory shared through a file beside the host's sockets. Writing
to it costs the step thread 0.2 µs.
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
    """Return the writing end, a host's: numbers, of which the first says how many sessions are inside the step, and the others
    which. Without a disk nobody else can read them, and nobody is told from anybody."""
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, PAGE_BYTES)  # a page without disk behind it would end the process
            return memoryview(mmap.mmap(descriptor, PAGE_BYTES)).cast("q")
        finally:
            os.close(descriptor)
    return memoryview(bytearray(PAGE_BYTES)).cast("q")


def write(board: memoryview, sessions: Sequence[int]) -> None:
    """These sessions are in a step from now on, as far as there is room for them."""
    count = min(len(sessions), MOST)
    for place in range(count):
        board[place + 1] = sessions[place]
    board[0] = count


def inside(file: Path) -> frozenset[int] | None:
    """Return the sessions that were inside a step when their host was lost; None if that is not known."""
    try:
        page = file.read_bytes()
    except OSError:
        return None
    if len(page) != PAGE_BYTES:
        return None
    count, *sessions = _WORDS.unpack(page)
    return frozenset(sessions[:count]) if 0 <= count <= MOST else None
