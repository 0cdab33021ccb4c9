"""Starting the process that hosts are forked from (zygote.py), as early as one likes: it imports torch, which is the longest
part of a run's start, while whoever started it still reads the graph. No trio here, and nothing else that takes time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

STANDARD = (0, 1, 2)


def open_standard_streams() -> None:
    """Open what is closed of the descriptors 0, 1 and 2, at nothing: a daemon has none of them, and the next pipe or socket
    would take their place."""
    for descriptor in STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one


class ZygoteProcess:
    """The process and the pipes to it. Whoever makes one ends it (`end`), or hands it to a launcher that does.

    `lifeline` is the end of a pipe that every host holds the other end of: that becomes readable when this process is gone,
    however it went.

    Raises:
        OSError: there are no descriptors, no memory or no processes for it.
    """

    def __init__(self) -> None:
        open_standard_streams()
        lifeline, self.lifeline = os.pipe2(os.O_CLOEXEC)
        self._errors = -1
        self._said = ""
        # numpy's threads would not survive the fork
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        try:
            self._errors = os.memfd_create("zygote.err", os.MFD_CLOEXEC)
            self.process = subprocess.Popen(
                # -P: a file of the current folder that is called like a module, such as glob.py, is not imported
                [sys.executable, "-P", "-m", "ranvier.actors.supervise.zygote", str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=(lifeline,),
                start_new_session=True,  # the terminal's Ctrl-C comes to the supervisor alone
                env=environment,
            )
        except BaseException:
            self.cut_lifeline()
            self._close_errors()
            raise
        finally:
            os.close(lifeline)

    def last_words(self) -> str:
        """Return the end of what it wrote to standard error before it was given a log."""
        if self._errors < 0:
            return self._said
        size = os.fstat(self._errors).st_size
        return os.pread(self._errors, 4000, max(0, size - 4000)).decode(errors="replace")

    def end(self) -> None:
        """Kill it if it still runs, and close what there is of it. Its hosts end with the lifeline. Idempotent."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._said = self.last_words()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # a command may be left that nobody will read
                if pipe is not None:
                    pipe.close()
        self._close_errors()
        self.cut_lifeline()

    def _close_errors(self) -> None:
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1

    def cut_lifeline(self) -> None:
        """Let every host know that it is over. Idempotent."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1
