"""Keep a watcher (watcher.py) of a run while pages are open, and ask it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from ranvier.transport.format.errors import ResourceError

from .watcher import Question

MOST_LINE_BYTES = 64 << 20


class _Answered(msgspec.Struct):
    answer: msgspec.Raw = msgspec.Raw()
    error: str = ""


class Watching:
    """Ask the watcher of one run. It starts with the first question. All methods belong to the server's thread."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._process: subprocess.Popen[bytes] | None = None
        self.over = False
        """Start no watcher any more."""
        self._turn = threading.Lock()
        """Held while a question is on its way, also if nobody waits for its answer any more."""

    async def ask(self, what: str, **arguments: Any) -> tuple[msgspec.Raw, str]:
        """Return the answer as JSON and "", or why there is none, in words.

        Raises:
            ResourceError: the watcher cannot be started, or ended.
        """
        question = msgspec.json.encode(Question(what, **arguments)) + b"\n"
        line = await asyncio.to_thread(self._ask, question)
        said = msgspec.json.decode(line, type=_Answered)
        return said.answer, said.error

    def _ask(self, question: bytes) -> bytes:
        with self._turn:
            try:
                line = self._line(question)
            except OSError as error:
                raise ResourceError(f"{self._run_dir}: the process that reads the trace failed: {error}") from None
        if not line.endswith(b"\n"):
            raise ResourceError(f"{self._run_dir}: the process that reads the trace has ended")
        return line

    def _line(self, question: bytes) -> bytes:
        if self.over:
            return b""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ranvier.graph.page.watcher", str(self._run_dir)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        asked, answered = self._process.stdin, self._process.stdout
        assert asked is not None and answered is not None
        asked.write(question)
        asked.flush()
        return answered.readline(MOST_LINE_BYTES)

    def close(self) -> None:
        """End the watcher. Idempotent. A question that is on its way gets no answer."""
        process = self._process
        if process is not None:
            process.kill()
            with self._turn:
                self._process = None
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        with contextlib.suppress(BrokenPipeError):  # a question that it has not read
                            pipe.close()
                process.wait()
