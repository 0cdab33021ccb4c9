"""Starting the process that hosts are forked from (zygote.py), as early as one likes: it imports torch, which is the longest
part of a run's start, while whoever started it still reads the graph. No trio here, and nothing else that takes time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys


class ZygoteProcess:
    """The process and the pipes to it. Whoever makes one ends it (`end`), or hands it to a launcher that does.

    `lifeline` is the end of a pipe that every host holds the other end of: that becomes readable when this process is gone,
    however it went.
    """

    def __init__(self) -> None:
        lifeline, self.lifeline = os.pipe2(os.O_CLOEXEC)
        self._errors = os.memfd_create("zygote.err", os.MFD_CLOEXEC)
        # numpy's threads would not survive the fork
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ranvier.actors.zygote", str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=(lifeline,),
                start_new_session=True,  # the terminal's Ctrl-C comes to the supervisor alone
                env=environment,
            )
        finally:
            os.close(lifeline)

    def last_words(self) -> str:
        """The end of what it wrote to standard error before it was given a log."""
        if self._errors < 0:
            return ""
        size = os.fstat(self._errors).st_size
        return os.pread(self._errors, 4000, max(0, size - 4000)).decode(errors="replace")

    def end(self) -> None:
        """Kill it if it still runs, and close what there is of it. Its hosts end with the lifeline. Idempotent."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # a command may be left that nobody will read
                if pipe is not None:
                    pipe.close()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1
        self.cut_lifeline()

    def cut_lifeline(self) -> None:
        """Let every host know that it is over. Idempotent."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1
