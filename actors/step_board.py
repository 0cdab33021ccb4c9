"""Which sessions are inside the step that a host takes: written where its supervisor can read it after the host is gone.

A host that dies says nothing of what it was doing. Its sessions are opened anew, and one that kills it again and again must be
told from those that were only nearby. The board is a page of memory shared through a file beside the host's sockets. Writing
to it costs the step thread 0.5 µs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

PAGE_BYTES = 4096
MOST = (PAGE_BYTES - 8) // 8
_COUNT = struct.Struct("<q")
_FORMS = [struct.Struct(f"<{count + 1}q") for count in range(MOST + 1)]
_EMPTY = _COUNT.pack(0)


class StepBoard:
    """The writing end, a host's. Without a disk there is none, and nobody is told from anybody."""

    def __init__(self, file: Path) -> None:
        self._page: mmap.mmap | None = None
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, PAGE_BYTES)  # a page without disk behind it would end the process
                self._page = mmap.mmap(descriptor, PAGE_BYTES)
            finally:
                os.close(descriptor)

    def inside(self, sessions: Sequence[int]) -> None:
        """These sessions are in a step from now on."""
        if self._page is not None:
            kept = sessions[:MOST]
            _FORMS[len(kept)].pack_into(self._page, 0, len(sessions), *kept)

    def outside(self) -> None:
        """The step is over."""
        if self._page is not None:
            self._page[: _COUNT.size] = _EMPTY


def inside(file: Path) -> frozenset[int] | None:
    """Return the sessions that were inside a step when their host was lost; None if that is not known."""
    try:
        page = file.read_bytes()
    except OSError:
        return None
    if len(page) != PAGE_BYTES:
        return None
    [count] = _COUNT.unpack_from(page)
    return frozenset(_FORMS[count].unpack_from(page)[1:]) if 0 <= count <= MOST else None
