"""Record the moving pictures of README and docs: `python tools/record.py FOLDER` writes FOLDER/NAME.cast (`make pictures`).

Commands are typed into a real terminal (pty), one key after another. What it shows is written as an asciicast (version 2),
which svg-term-cli draws. Source of the format: asciinema's documentation of asciicast v2.
"""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SHELL = "\x1b[1;32m$\x1b[0m "
KEY_S, READ_S, LONGEST_PAUSE_S = 0.03, 1.6, 1.2
"""Seconds between two keys; before the next command is typed; and the longest pause that is kept."""
END_OF_INPUT = "\x04"


@dataclass(frozen=True)
class Typed:
    """Hold a command, and the lines that are typed into it, each when it shows `> `."""

    command: str
    lines: Sequence[str] = ()


RECORDINGS: Mapping[str, tuple[int, int, Sequence[Typed]]] = {
    "demo": (100, 24, [
        Typed('ranvier run smollm2 --prompt "Why is the sky blue?" --max-tokens 48'),
        Typed("ranvier trace latest --why 1"),
        Typed("python examples/lose_an_actor.py"),
    ]),
    "talk": (80, 22, [
        Typed("ranvier run smollm2 -n 40", [
            "My name is Ada. Say hello.", "What is my name?", "/trace", END_OF_INPUT,
        ]),
    ]),
    "narrow": (60, 30, [Typed('ranvier run smollm2 -p "Name three colours." -n 24 --cost')]),
}  # fmt: skip
"""Columns, rows and commands of each recording."""


@dataclass
class Cast:
    """Hold the events of a recording: seconds since its beginning, and what the terminal has written."""

    columns: int
    rows: int
    events: list[tuple[float, str]] = field(default_factory=list)
    now_s: float = 0.0

    def wrote(self, text: str, after_s: float) -> None:
        self.now_s += min(after_s, LONGEST_PAUSE_S)
        self.events.append((self.now_s, text))

    def text(self) -> str:
        head = {"version": 2, "width": self.columns, "height": self.rows}
        lines = [json.dumps([round(at_s, 3), "o", text]) for at_s, text in self.events]
        return "\n".join([json.dumps(head), *lines]) + "\n"


def record(columns: int, rows: int, commands: Sequence[Typed], folder: Path) -> Cast:
    """Type commands into a shell on a terminal in a folder, and return what it shows.

    Raises:
        RuntimeError: a command failed.
    """
    cast = Cast(columns, rows)
    for typed in commands:
        cast.wrote(SHELL, 0.0)
        cast.now_s += 0.6
        for key in typed.command:
            cast.wrote(key, KEY_S)
        cast.wrote("\r\n", 0.3)
        _run(typed, folder, cast)
        cast.now_s += READ_S
    cast.wrote(SHELL, 0.0)
    cast.now_s += READ_S
    cast.wrote(" ", 0.0)  # the picture stays for a moment before it begins again
    return cast


def _run(typed: Typed, folder: Path, cast: Cast) -> None:
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", cast.rows, cast.columns, 0, 0))
    environment = {
        **os.environ, "TERM": "xterm-256color", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_STATE_HOME": str(folder), "XDG_CONFIG_HOME": str(folder),
    }  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", typed.command], stdin=far, stdout=far, stderr=far, cwd=folder, env=environment,
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    os.close(far)
    left, shown, before_s = list(typed.lines), "", time.monotonic()
    letters = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        try:
            data = os.read(near, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        now_s = time.monotonic()
        text = letters.decode(data)
        cast.wrote(text, now_s - before_s)
        shown, before_s = (shown + text)[-200:], now_s
        if left and shown.endswith("> "):
            line, shown = left.pop(0), ""
            cast.now_s += READ_S
            for key in line if line == END_OF_INPUT else f"{line}\n":
                os.write(near, key.encode())
                time.sleep(KEY_S)
            before_s = time.monotonic() - KEY_S
    os.close(near)
    if process.wait() != 0:
        raise RuntimeError(f"`{typed.command}` ended with {process.returncode}")


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp") as place:
        (Path(place) / "examples").symlink_to(Path(__file__).resolve().parents[1] / "examples")
        for name, (columns, rows, commands) in RECORDINGS.items():
            (folder / f"{name}.cast").write_text(record(columns, rows, commands, Path(place)).text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
