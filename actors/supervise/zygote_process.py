"""Start the zygote, the process that hosts are forked from (zygote.py).

Start it as early as possible: it imports torch, the longest part of a run's start, while its starter still reads the graph.
This module does not import trio, nor anything else that takes time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

from ranvier.transport import system

STANDARD = (0, 1, 2)
# neither numpy's threads nor CUDA, which torch would use to count devices, survive a fork
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def open_standard_streams() -> None:
    """Open /dev/null for each of the descriptors 0, 1 and 2 that is closed.

    A daemon has none of them, and the next pipe or socket would take their numbers.
    """
    for descriptor in STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


class ZygoteProcess:
    """Hold the zygote process and the pipes to it. Whoever creates one must `end` it, or pass it to a launcher, which does.

    `lifeline` is one end of a pipe, and every host holds the other end. The hosts' end becomes readable when the process that
    holds `lifeline` is gone, for whatever reason.

    Raises:
        OSError: no descriptor, memory or process is left.
    """

    def __init__(self) -> None:
        open_standard_streams()
        lifeline, self.lifeline = os.pipe()
        self._errors = -1
        self._said = ""
        try:
            self._errors = system.unnamed_file("zygote.err")
            self.process = subprocess.Popen(
                # -P: do not import a file of the current folder that is named like a module, such as glob.py
                [sys.executable, "-P", "-m", "ranvier.actors.supervise.zygote", str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=(lifeline,),
                start_new_session=True,  # only the supervisor gets the terminal's Ctrl-C
                env={**os.environ, **ENVIRONMENT},
            )
        except BaseException:
            self.cut_lifeline()
            self._close_errors()
            raise
        finally:
            os.close(lifeline)

    def last_words(self) -> str:
        """Return the last 4000 bytes that the zygote wrote to standard error before it was given a log."""
        if self._errors < 0:
            return self._said
        size = os.fstat(self._errors).st_size
        return os.pread(self._errors, 4000, max(0, size - 4000)).decode(errors="replace")

    def end(self) -> None:
        """Kill the zygote if it still runs, and close its pipes. Its hosts end with the lifeline. Idempotent."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._said = self.last_words()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # the pipe may still hold a command that nobody will read
                if pipe is not None:
                    pipe.close()
        self._close_errors()
        self.cut_lifeline()

    def _close_errors(self) -> None:
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1

    def cut_lifeline(self) -> None:
        """Close the lifeline, at which every host ends itself. Idempotent."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1
