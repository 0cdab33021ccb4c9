"""Record the moving picture of the README: `make pictures`, or `python tools/record.py pictures/demo.cast`.

The commands are typed into a real terminal (pty), one key after another. What it shows is written as an asciicast (version 2),
which svg-term-cli draws. Source of the format: asciinema's documentation of asciicast v2.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

COLUMNS, ROWS = 100, 24
PROMPT = "\x1b[1;32m$\x1b[0m "
KEY_S, READ_S, LONGEST_PAUSE_S = 0.03, 1.6, 1.2
"""Seconds between two keys; before the next command is typed; and the longest pause that is kept."""
COMMANDS = (
    'ranvier run smollm2 --prompt "Why is the sky blue?" --max-tokens 48',
    "ranvier trace latest --why 1",
    "python examples/lose_an_actor.py",
)


class Cast:
    """Hold the events of a recording: seconds since its beginning, and what the terminal has written."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str]] = []
        self._now_s = 0.0

    def wrote(self, text: str, after_s: float) -> None:
        self._now_s += min(after_s, LONGEST_PAUSE_S)
        self.events.append((self._now_s, text))

    def pause(self, seconds: float) -> None:
        self._now_s += seconds

    def text(self) -> str:
        head = {"version": 2, "width": COLUMNS, "height": ROWS}
        lines = [json.dumps([round(at_s, 3), "o", text]) for at_s, text in self.events]
        return "\n".join([json.dumps(head), *lines]) + "\n"


def record(commands: tuple[str, ...], folder: Path) -> Cast:
    """Type commands into a shell on a terminal in a folder, and return what it shows.

    Raises:
        RuntimeError: a command failed.
    """
    cast = Cast()
    for command in commands:
        cast.wrote(PROMPT, 0.0)
        cast.pause(0.6)
        for key in command:
            cast.wrote(key, KEY_S)
        cast.wrote("\r\n", 0.3)
        _run(command, folder, cast)
        cast.pause(READ_S)
    cast.wrote(PROMPT, 0.0)
    cast.pause(READ_S)
    cast.wrote(" ", 0.0)  # the picture stays for a moment before it begins again
    return cast


def _run(command: str, folder: Path, cast: Cast) -> None:
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        ["bash", "-c", command], stdin=far, stdout=far, stderr=far, cwd=folder, env=environment, start_new_session=True
    )
    os.close(far)
    before_s = time.monotonic()
    while True:
        select.select([near], [], [])
        try:
            data = os.read(near, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        now_s = time.monotonic()
        cast.wrote(data.decode(errors="replace"), now_s - before_s)
        before_s = now_s
    os.close(near)
    if process.wait() != 0:
        raise RuntimeError(f"`{command}` ended with {process.returncode}")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp") as place:
        (Path(place) / "examples").symlink_to(Path(__file__).resolve().parents[1] / "examples")
        Path(sys.argv[1]).write_text(record(COMMANDS, Path(place)).text())
