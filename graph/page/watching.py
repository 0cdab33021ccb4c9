"""Keep a watcher (watcher.py) of a run while pages are open, and ask it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any, cast

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


class _Talk(asyncio.Protocol):
    """Hold the connection to one watcher. It answers in the order of the questions, a line each."""

    def __init__(self, run_dir: Path, process: subprocess.Popen[bytes]) -> None:
        self._run_dir, self._process = run_dir, process
        self._asked: deque[asyncio.Future[bytes]] = deque()
        self._read = bytearray()
        self._transport: asyncio.Transport | None = None
        self.over = False

    def ask(self, question: bytes) -> asyncio.Future[bytes]:
        assert self._transport is not None
        answer = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self._transport.write(question)
        return answer

    def end(self) -> None:
        """End the process without waiting for it. A question that is on its way gets no answer."""
        if not self.over:
            self.over = True
            self._process.kill()
            threading.Thread(target=self._process.wait, name="ranvier-watching").start()
        if self._transport is not None:
            self._transport.abort()

    # -- called by the loop -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of another class

    def data_received(self, data: bytes) -> None:
        searched = len(self._read)
        self._read += data
        if len(self._read) > MOST_LINE_BYTES:
            self.end()
            return
        while (end := self._read.find(b"\n", searched)) >= 0:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_result(bytes(self._read[:end]))
            del self._read[: end + 1]
            searched = 0

    def connection_lost(self, _error: Exception | None) -> None:
        self.end()
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(
                    ResourceError(f"{self._run_dir}: the process that reads the trace has ended; ask again")
                )


class Watching:
    """Ask the watcher of one run. It starts with the first question. All methods belong to the server's thread."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._talk: _Talk | None = None
        self._starting = asyncio.Lock()
        self.waiting = 0
        """Questions without an answer."""
        self._closed = False

    async def ask(self, what: str, **arguments: Any) -> msgspec.Raw:
        """Return the answer as JSON.

        Raises:
            Silent: the trace does not say; the words tell why.
            ResourceError: the watcher cannot be started, ended, or has too many questions.
        """
        if self.waiting >= MOST_WAITING:
            raise ResourceError(f"{self._run_dir}: too many questions about the trace at once; ask again")
        question = msgspec.json.encode(Question(what, **arguments)) + b"\n"
        self.waiting += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                line = await (await self._begun()).ask(question)
        except TimeoutError:
            self.close()  # ends the question, too
            raise ResourceError(f"{self._run_dir}: the trace was not read within {ANSWER_S:g} s") from None
        finally:
            self.waiting -= 1
        said = msgspec.json.decode(line, type=_Answered)
        if said.error:
            raise Silent(said.error, later=said.later)
        return said.answer

    def close(self, *, forever: bool = False) -> None:
        """End the watcher without waiting for it. A question that is on its way gets no answer."""
        self._closed |= forever
        talk, self._talk = self._talk, None
        if talk is not None:
            talk.end()

    async def _begun(self) -> _Talk:
        async with self._starting:
            if self._closed:
                raise ResourceError(f"{self._run_dir}: the server is stopping")
            if self._talk is None or self._talk.over:
                self._talk = await self._begin()
            return self._talk

    async def _begin(self) -> _Talk:
        ours, its = socket.socketpair()
        try:
            with its:
                command = [sys.executable, "-m", "ranvier.graph.page.watcher", str(self._run_dir)]
                process = subprocess.Popen(command, stdin=its.fileno(), stdout=its.fileno())
        except OSError as error:
            ours.close()
            raise ResourceError(f"{self._run_dir}: the process that reads the trace failed: {error}") from None
        talk = _Talk(self._run_dir, process)
        await asyncio.get_running_loop().create_unix_connection(lambda: talk, sock=ours)
        if self._closed:  # meanwhile
            talk.end()
        return talk
