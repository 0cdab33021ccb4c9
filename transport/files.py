"""Opening files that somebody else may have put there: never a pipe that waits for ever, nor a device without an end."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

PIECE_BYTES = 1 << 18


class FileRefused(OSError):
    """What stands in the place of a file is none, or it is larger than such a file can be."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EINVAL, why, str(path))


def regular(path: Path) -> Path:
    """Return the path of a file, links followed. For libraries that open it themselves.

    Raises:
        OSError: it cannot be looked at; `FileRefused`: it is a pipe, a device, a folder or a socket.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileRefused(path, "expected a file, found something else")
    return path


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: it cannot be read; `FileRefused`: it is no file, or has over `most_bytes` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileRefused(path, "expected a file, found something else")
    with os.fdopen(descriptor, "rb") as file:
        data = bytearray()
        while len(data) <= most_bytes and (piece := file.read(PIECE_BYTES)):  # no memory for what is not there
            data += piece
    if len(data) > most_bytes:
        raise FileRefused(path, f"expected at most {most_bytes} bytes, found more")
    return bytes(data)


def read_beginning(path: Path, most_bytes: int) -> bytes:
    """Return the first bytes of a file, however long it is. Errors are those of `read_bounded`."""
    with regular(path).open("rb") as file:
        return file.read(most_bytes)


def read_text(path: Path, most_bytes: int) -> str:
    """Return the text of a file (UTF-8).

    Raises:
        OSError: see `read_bounded`.
        UnicodeDecodeError: it is not UTF-8, a `ValueError`.
    """
    return read_bounded(path, most_bytes).decode()


def locked(path: str | Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a file and lock it for this process. Returns the descriptor, which holds the lock until it is closed.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be opened or locked.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
