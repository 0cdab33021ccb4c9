"""Append lines to a file that outlives its process, and rewrite it when it has grown too large.

Lines go to the operating system in one write, so they outlive the process however it dies. They are not forced to the
disk: a power failure may lose the last of them. The file is locked while its process lives.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ranvier.transport.files import locked

from ..file.errors import RequestError

MOST_BYTES = 64 << 20
"""Size at which a file is rewritten."""
MOST_LINE_BYTES = 1 << 24


class LineFile:
    """Write a new file of lines. Tests replace `write`, which is `os.pwrite`.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, path: Path, write: Callable[[int, bytes, int], int] = os.pwrite) -> None:
        self.path = path
        self.nbytes = 0
        self.rewrite_at = MOST_BYTES
        self._write = write
        self._file = taken(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def append(self, lines: Iterable[bytes]) -> bool:
        """Append lines, all or none. Return whether that succeeded."""
        data = b"".join([line + b"\n" for line in lines])
        with contextlib.suppress(OSError):
            if self._write(self._file, data, self.nbytes) == len(data):
                self.nbytes += len(data)
                return True
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self.nbytes)  # remove a partly written line
        return False

    def rewrite(self, lines: Iterable[bytes]) -> bool:
        """Replace the file by one with these lines. Return whether that succeeded; if not, the file is as it was."""
        data = b"".join([line + b"\n" for line in lines])
        part = self.path.with_suffix(".part")
        try:
            part.unlink(missing_ok=True)
            made = taken(part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                if self._write(made, data, 0) != len(data):
                    raise OSError("short write")
                part.replace(self.path)
            except OSError:
                os.close(made)
                part.unlink(missing_ok=True)
                raise
        except (OSError, RequestError):
            self.rewrite_at = self.nbytes + MOST_BYTES
            return False
        os.close(self._file)
        self._file, self.nbytes, self.rewrite_at = made, len(data), max(MOST_BYTES, 4 * len(data))
        return True

    def close(self) -> None:
        """Close the file, and give up the lock. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def taken(path: Path, flags: int) -> int:
    """Open a run's file of lines and lock it for this process.

    Raises:
        OSError: it cannot be opened.
        RequestError: another process has locked it.
    """
    try:
        return locked(path, flags)
    except BlockingIOError:
        raise RequestError(f"{path}: the run is still active; send requests to that run") from None


def whole_lines(file: int | Path) -> Iterator[bytes]:
    """Yield the lines of a file, each with its line break. The last line may be cut off, if its process died: it is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is too long.
    """
    with open(file, "rb") as opened:
        for line in iter(lambda: opened.readline(MOST_LINE_BYTES), b""):
            if not line.endswith(b"\n"):
                if len(line) == MOST_LINE_BYTES:
                    raise ValueError(f"a line has more than {MOST_LINE_BYTES} bytes")
                return
            yield line
