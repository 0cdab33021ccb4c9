"""Check what a wire needs of this machine before it creates a socket: descriptors, files, and sole use of its path."""

from __future__ import annotations

import os
import resource
import stat

from .. import system
from ..files import locked
from ..format.errors import AddressError, ResourceError

LEAST_FILE_BYTES = 1 << 12
OF_A_WIRE, OF_A_PEER = 32, 8
"""Number of descriptors for a wire with its context, and for each peer with its incoming connections; rounded up."""


def make_sure_of_descriptors(me: str, count: int) -> None:
    """Check that at least `count` descriptors are left.

    ZeroMQ ends the whole process if it gets no descriptor, even for an incoming connection.

    Raises:
        ResourceError: fewer descriptors are left.
    """
    limit, taken = resource.getrlimit(resource.RLIMIT_NOFILE)[0], system.open_descriptors()
    if limit - taken < count:
        raise ResourceError(
            f"{me}: needs {count} more descriptors for its sockets, {max(0, limit - taken)} of {limit} are left; "
            "raise the limit (ulimit -n)"
        )


def make_sure_of_files(me: str) -> None:
    """Check that files of at least `LEAST_FILE_BYTES` bytes can be written.

    If no file can be written, torch and other libraries fail in various ways.

    Raises:
        ResourceError: the limit on the size of files is lower.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_FILE_BYTES:
        raise ResourceError(
            f"{me}: expected to write files of at least {LEAST_FILE_BYTES} bytes, the limit is {limit}; raise the limit "
            "(ulimit -f)"
        )


def claim(path: str) -> int:
    """Lock the path of a socket, and return the descriptor that holds the lock.

    Without the lock, binding a path that is in use would silently steal it. With it, the caller may replace a socket that a
    dead run left there. Nothing else is ever replaced.

    Raises:
        AddressError: another process listens there, something else is there, or the folder does not exist.
    """
    _may_replace(path, os.path.exists(f"{path}.lock"))
    try:
        return locked(f"{path}.lock")
    except BlockingIOError:
        raise AddressError(f"{path}: another process listens there") from None
    except OSError as error:
        raise AddressError(f"{path}: {error.strerror}") from error


def _may_replace(path: str, ours: bool) -> None:
    """Check that `path` is free, or holds a socket of a dead run (`ours`: a lock file lies beside it).

    Raises:
        AddressError: there is something other than a socket, or a socket without a lock file.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise AddressError(f"{path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise AddressError(f"{path}: expected nothing there, found something that is not a socket; it was not changed")
    if not ours:
        raise AddressError(f"{path}: expected nothing there, found a socket that no run of ours left; remove it")
