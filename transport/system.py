"""Ask the operating system for what POSIX does not offer, and say what stands in for it: the one place that knows Linux.

On another system, runs go without what only Linux has: the wire `local`, the kernels of this package, cores that are given to a
process, and its state in /proc. What is exact stays exact, and what is lost is still replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

LINUX = sys.platform == "linux" and "RANVIER_PLAIN_POSIX" not in os.environ
"""True if Linux's own calls are used. Tests set the variable to run as another system would."""
MOST_SOCKET_PATH_BYTES = 107 if LINUX else 103
"""Longest path of a Unix socket: `sun_path` without its end, in unix(7) of Linux and of BSD."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

# -- cores -------------------------------------------------------------------------------------------------------------


def usable_cores() -> frozenset[int]:
    """Return the cores that this process may run on."""
    return frozenset(os.sched_getaffinity(0)) if LINUX else frozenset(range(os.cpu_count() or 1))


def run_on(cores: Iterable[int]) -> None:
    """Let this process run only on these cores, where the system can do that."""
    if LINUX:
        os.sched_setaffinity(0, cores)


def yield_core() -> None:
    """Let another process have the core, if one waits for it."""
    if LINUX:
        os.sched_yield()
    else:
        time.sleep(0)


def run_on_idle_cores() -> None:
    """Let this process run only while nobody else wants the core; elsewhere, with the lowest priority."""
    if LINUX:
        with contextlib.suppress(OSError):  # the policy is forbidden
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


# -- processes ---------------------------------------------------------------------------------------------------------


class ProcessHandle:
    """Stand for one process, and send it signals. On Linux, never to another one that got its number.

    Raises:
        ProcessLookupError: there is no such process.
        OSError: no descriptor is left.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.fd = os.pidfd_open(pid) if LINUX else -1
        """A descriptor that is readable when the process has ended; -1 where the system has none."""
        self._open = True
        if not LINUX:
            os.kill(pid, 0)

    def send(self, number: int) -> bool:
        """Send a signal; 0 sends none. Return whether the process is still there."""
        try:
            if not self._open:
                return False
            if LINUX:
                signal.pidfd_send_signal(self.fd, number)
            else:
                os.kill(self._pid, number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """Forget the process. Idempotent."""
        if self._open and LINUX:
            os.close(self.fd)
        self._open, self.fd = False, -1

    def copy(self) -> ProcessHandle:
        """Return another handle of the same process, to be closed by itself."""
        made = object.__new__(ProcessHandle)
        made._pid, made._open = self._pid, self._open
        made.fd = os.dup(self.fd) if self.fd >= 0 else -1
        return made


def adopt_orphans() -> None:
    """Make orphans of this process's descendants its children, where the system can do that."""
    if LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Let the system kill this process when the thread that forked it ends, where it can do that."""
    if LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def orphans() -> list[int]:
    """Return the children of this process, which has one thread and no other children than adopted ones."""
    if not LINUX:
        return []
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def name_process(name: str) -> None:
    """Set the name that `ps` and `top` show for this process, where the system can do that."""
    if LINUX:
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(name[:15])


def process_state(pid: int) -> str:
    """Return the state of a process in /proc (proc(5)): R, S, D, T or Z; empty if it is unknown or there is no such process."""
    if not LINUX:
        return ""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


# -- memory and descriptors --------------------------------------------------------------------------------------------


def resident_bytes(pid: int) -> int | None:
    """Return the resident memory of a process of this machine, or None if it is unknown or there is no such process."""
    if not LINUX:
        return None
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None


def limit_own_memory(more_bytes: int) -> None:
    """Let this process get at most so much more address space, where the system can do that."""
    if LINUX:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
        limit(resource.RLIMIT_AS, now + more_bytes)


def limit(which: int, value: int) -> None:
    """Set a soft limit of `resource`, at most as high as the hard limit."""
    most = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd" if LINUX else "/dev/fd"))


def unnamed_file(name: str) -> int:
    """Return the descriptor of a file that has no name in a file system. `name` is for those who look at the process."""
    if LINUX:
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Bell:
    """Wake a thread that waits for descriptors: `fd` is readable from `ring` to `hush`."""

    def __init__(self) -> None:
        if LINUX:
            self.fd = self._ringing = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self.fd, self._ringing = os.pipe()
            os.set_blocking(self.fd, False)
            os.set_blocking(self._ringing, False)

    def ring(self) -> None:
        """Wake the thread. Do nothing if the bell is closed, or rings already."""
        with contextlib.suppress(OSError):  # a closed one has the descriptor -1
            os.write(self._ringing, b"\0\0\0\0\0\0\0\1" if sys.byteorder == "big" else b"\1\0\0\0\0\0\0\0")

    def hush(self) -> None:
        """Stop ringing."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 1 << 12)

    def close(self) -> None:
        descriptors = {self.fd, self._ringing}
        self.fd = self._ringing = -1
        for descriptor in descriptors:
            os.close(descriptor)


def wait_readable(descriptors: Iterable[int], timeout_ms: float) -> None:
    """Wait until one of the descriptors is readable."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll(timeout_ms)
