"""Run a command on a real terminal (pty), type into it, and read what a user would see."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>]")


class Terminal:
    """Hold a command that runs on a terminal of this size. `seen` is all that it has shown, without escape sequences."""

    def __init__(
        self, command: Sequence[str], *, columns: int = 80, rows: int = 24, cwd: Path | None = None,
        environment: Mapping[str, str] | None = None, stdout: int | None = None,
    ) -> None:  # fmt: skip
        self._near, far = pty.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._raw = b""
        self.process = subprocess.Popen(
            command, stdin=far, stdout=far if stdout is None else stdout, stderr=far, cwd=cwd, start_new_session=True,
            env={**os.environ, "TERM": "xterm", **(environment or {})},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(far)

    @property
    def raw(self) -> str:
        """All that the command has written, with its escape sequences."""
        return self._raw.decode(errors="replace")

    @property
    def seen(self) -> str:
        return ESCAPES.sub("", self.raw).replace("\r\n", "\n").replace("\r", "\n")

    def type(self, text: str) -> None:
        os.write(self._near, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def until(self, words: str, seconds: float = 60.0, *, after: int = 0) -> int:
        """Wait for words that come after position `after` of what is seen. Return the position behind them."""
        deadline_s = time.monotonic() + seconds
        while (at := self.seen.find(words, after)) < 0:
            assert self._read(deadline_s - time.monotonic()), f"{words!r} did not come; {self.seen[-2000:]!r}"
        return at + len(words)

    def end(self, seconds: float = 30.0) -> int:
        """Wait for the end of the command. Return its exit code."""
        deadline_s = time.monotonic() + seconds
        while self._read(deadline_s - time.monotonic()):
            pass
        return self.process.wait(max(0.1, deadline_s - time.monotonic()))

    def _read(self, seconds: float) -> bool:
        """Read what comes within this time. Return false if nothing does, or the command has closed the terminal."""
        ready, _, _ = select.select([self._near], [], [], max(0.0, seconds))
        try:
            data = os.read(self._near, 1 << 16) if ready else b""
        except OSError:  # the other side is closed
            data = b""
        self._raw += data
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._near)
