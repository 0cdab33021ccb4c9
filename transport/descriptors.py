"""What a wire needs of this machine before it has a socket: descriptors, and its path for itself."""

from __future__ import annotations

import fcntl
import os
import resource

from .errors import AddressError, ResourceError

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


def claim(path: str) -> int:
    """Hold a lock beside the socket: binding a path that is in use would silently steal it.

    Raises:
        AddressError: another process holds it, or the folder is not there.
    """
    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AddressError(f"ipc://{path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise AddressError(f"ipc://{path}: another process listens there") from None
    return lock
