"""Keep a watcher (watcher.py) of a run while pages are open, and ask it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from ranvier.transport.format.errors import RanvierError, ResourceError

from .watcher import Question

MOST_LINE_BYTES = 64 << 20
ANSWER_S = 30.0
"""A watcher runs only on idle cores, so that an answer may take seconds."""
MOST_WAITING = 16


class Silent(RanvierError):
    """Report that the trace does not say what was asked. `later`: it may say so in a moment."""

    def __init__(self, what: str, *, later: bool) -> None:
        super().__init__(what)
        self.later = later


class _Answered(msgspec.Struct):
    answer: msgspec.Raw = msgspec.Raw()
    error: str = ""
    later: bool = False


class Watching:
    """Ask the watcher of one run. It starts with the first question. All methods belong to the server's thread.

    One thread of its own starts the watcher, asks it, and ends it, so that nothing else of the server waits for a trace.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, "ranvier-watching")
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting = 0

    async def ask(self, what: str, **arguments: Any) -> msgspec.Raw:
        """Return the answer as JSON.

        Raises:
            Silent: the trace does not say; the words tell why.
            ResourceError: the watcher cannot be started, ended, or has too many questions.
        """
        if self._waiting >= MOST_WAITING:
            raise ResourceError(f"{self._run_dir}: too many questions about the trace at once; ask again")
        question = msgspec.json.encode(Question(what, **arguments)) + b"\n"
        self._waiting += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                line = await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, question)
        except TimeoutError:
            self.close()  # ends the question, too
            raise ResourceError(f"{self._run_dir}: the trace was not read within {ANSWER_S:g} s") from None
        except RuntimeError:  # the thread takes no questions any more
            raise ResourceError(f"{self._run_dir}: the server is stopping") from None
        finally:
            self._waiting -= 1
        said = msgspec.json.decode(line, type=_Answered)
        if said.error:
            raise Silent(said.error, later=said.later)
        return said.answer

    def close(self, *, forever: bool = False) -> None:
        """End the watcher without waiting for it. A question that is on its way gets no answer."""
        process = self._process
        if process is not None:
            process.kill()
        with contextlib.suppress(RuntimeError):  # it was closed forever before
            self._thread.submit(self._end)
        if forever:
            self._thread.shutdown(wait=False)

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _ask(self, question: bytes) -> bytes:
        try:
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "ranvier.graph.page.watcher", str(self._run_dir)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
            asked, answered = self._process.stdin, self._process.stdout
            assert asked is not None and answered is not None
            asked.write(question)
            asked.flush()
            line = answered.readline(MOST_LINE_BYTES)
        except OSError as error:
            raise ResourceError(f"{self._run_dir}: the process that reads the trace failed: {error}") from None
        if not line.endswith(b"\n"):
            raise ResourceError(f"{self._run_dir}: the process that reads the trace has ended")
        return line

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # a question that it has not read
                    pipe.close()
            process.wait()
