"""Check and write paths that the user gave."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path

from ..file.errors import RequestError


def writable(path: Path) -> None:
    """Check, before any work is done, that a file can be written to a path that the user gave.

    Raises:
        RequestError: the path is something other than a regular file (such as a link), or its folder does not exist.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.absolute().parent.is_dir():
            raise RequestError(f"{path}: there is no such folder; make it, or give another path") from None
        return
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise RequestError(f"{path}: expected a file or nothing there, found something else; give another path")


def folder_of_runs(path: Path) -> Path:
    """Return `path` if it is a folder or does not exist yet.

    Raises:
        RequestError: the path is something other than a folder.
    """
    if path.exists() and not path.is_dir():
        raise RequestError(f"{path}: expected a folder, found a file; give another one")
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate errors of a block that writes a file to a path that the user gave.

    Raises:
        RequestError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}; give another path, or make room") from None
