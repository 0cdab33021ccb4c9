"""Open files that somebody else may have placed, without blocking forever on a pipe or reading an endless device."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

PIECE_BYTES = 1 << 18


class FileRefused(OSError):
    """Report that a path is not a regular file, or that the file is larger than allowed."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EINVAL, why, str(path))


def regular(path: Path) -> Path:
    """Return `path` if it is a regular file or a link to one. Use this for libraries that open the file themselves.

    Raises:
        FileRefused: it is a pipe, a device, a folder or a socket.
        OSError: the file's status cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileRefused(path, "expected a regular file, found a folder, pipe, device or socket")
    return path


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a file that has at most `most_bytes` bytes.

    Raises:
        FileRefused: it is not a regular file, or it has more bytes.
        OSError: the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileRefused(path, "expected a regular file, found a folder, pipe, device or socket")
    with os.fdopen(descriptor, "rb") as file:
        data = bytearray()
        while len(data) <= most_bytes and (
            piece := file.read(PIECE_BYTES)
        ):  # memory is taken only for bytes that exist
            data += piece
    if len(data) > most_bytes:
        raise FileRefused(path, f"expected at most {most_bytes} bytes, found more")
    return bytes(data)


def read_beginning(path: Path, most_bytes: int) -> bytes:
    """Return the first `most_bytes` bytes of a file, which may be longer.

    Raises:
        FileRefused: it is not a regular file.
        OSError: the file cannot be read.
    """
    with regular(path).open("rb") as file:
        return file.read(most_bytes)


def read_text(path: Path, most_bytes: int) -> str:
    """Return the text of a UTF-8 file that has at most `most_bytes` bytes.

    Raises:
        OSError: see `read_bounded`.
        UnicodeDecodeError: the file is not UTF-8 (a `ValueError`).
    """
    return read_bounded(path, most_bytes).decode()


def locked(path: str | Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a file, lock it for this process, and return the descriptor.

    The lock is held until the descriptor is closed.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened or locked.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
