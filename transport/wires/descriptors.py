"""What a wire needs of this machine before it has a socket: descriptors, and its path for itself."""

from __future__ import annotations

import os
import resource
import stat

from ..files import locked
from ..format.errors import AddressError, ResourceError

LEAST_FILE_BYTES = 1 << 12
OF_A_WIRE, OF_A_PEER = 32, 8
"""Descriptors that a wire takes with its context, and that a peer takes, what comes in from it too; rounded up."""


def make_sure_of_descriptors(me: str, count: int) -> None:
    """ZeroMQ ends the whole process where it gets no descriptor, also for a connection that comes in.

    Raises:
        ResourceError: there are not so many left.
    """
    limit, taken = resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(os.listdir("/proc/self/fd"))
    if limit - taken < count:
        raise ResourceError(
            f"{me}: needs {count} more descriptors for its sockets, {max(0, limit - taken)} of {limit} are left; "
            "raise the limit (ulimit -n)"
        )


def make_sure_of_files(me: str) -> None:
    """Where no file may be written, torch and others fail in ways of their own.

    Raises:
        ResourceError: the limit on the size of files is too low to work with.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_FILE_BYTES:
        raise ResourceError(
            f"{me}: no file may be larger than {limit} bytes here, expected at least {LEAST_FILE_BYTES}; raise the limit "
            "(ulimit -f)"
        )


def claim(path: str) -> int:
    """Lock the path of a socket: binding a path that is in use would silently steal it. A socket that a dead run left there may
    then be replaced. Nothing else ever is. Return the descriptor that holds the lock.

    Raises:
        AddressError: another process listens there, something else is there, or the folder is not.
    """
    _may_replace(path, os.path.exists(f"{path}.lock"))
    try:
        return locked(f"{path}.lock")
    except BlockingIOError:
        raise AddressError(f"{path}: another process listens there") from None
    except OSError as error:
        raise AddressError(f"{path}: {error.strerror}") from error


def _may_replace(path: str, ours: bool) -> None:
    """
    Raises:
        AddressError: what is at `path` is not a socket, or not one with a lock of `ours` beside it.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise AddressError(f"{path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise AddressError(f"{path}: expected nothing there, found what is not a socket; it was left untouched")
    if not ours:
        raise AddressError(f"{path}: expected nothing there, found a socket that no run of ours left; remove it")
