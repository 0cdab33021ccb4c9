"""Ask the process that reads a trace, which stops, ends, or is asked by nobody any more."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from loops import by_asyncio
from waiting import wait_until

from ranvier.graph.page import watching as watching_module
from ranvier.graph.page.watching import MOST_WAITING, Silent, Watching
from ranvier.graph.trace.critical_path import Causes
from ranvier.graph.trace.summary import read
from ranvier.transport.format.errors import ResourceError

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def finished(streamed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streamed(tmp_path_factory.mktemp("watched"), [PROMPT], 8)


@pytest.fixture(scope="module")
def session(finished: Path) -> int:
    return next(iter(Causes(read(finished)).sessions))


def watcher() -> int:
    """Return the process that reads a trace for this one."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "page.watcher"], capture_output=True, text=True)
    (pid,) = found.stdout.split()
    return int(pid)


def talk(run_dir: Path, ask: Callable[[Watching], Awaitable[None]]) -> None:
    """Run a conversation with a watcher, and see that no process is left behind."""

    async def main() -> None:
        watching = Watching(run_dir)
        try:
            await ask(watching)
        finally:
            watching.close(forever=True)
        with pytest.raises(ResourceError, match="stopping"):
            await watching.ask("frame")

    by_asyncio(main)
    assert wait_until(lambda: subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "page.watcher"]).returncode != 0)


def test_answers_belong_to_their_questions(finished: Path, session: int) -> None:
    """Give each question its own answer, also after one that nobody waits for any more."""

    async def ask(watching: Watching) -> None:
        def token(position: int) -> Awaitable[Any]:
            return asyncio.ensure_future(watching.ask("token", sessions=(session,), position=position))

        await watching.ask("frame")
        os.kill(watcher(), signal.SIGSTOP)
        answers = [token(len(PROMPT) + number) for number in range(6)]
        await asyncio.sleep(0)
        for left in (0, 3):
            answers[left].cancel()
        os.kill(watcher(), signal.SIGCONT)
        for number in (1, 2, 4, 5):
            assert msgspec.json.decode(await answers[number])["position"] == len(PROMPT) + number

    talk(finished, ask)


def test_a_watcher_ends(finished: Path) -> None:
    """Say to all who wait that it has ended, and start another with the next question."""

    async def ask(watching: Watching) -> None:
        await watching.ask("frame")
        os.kill(first := watcher(), signal.SIGSTOP)
        answers = [asyncio.ensure_future(watching.ask("frame")) for _ in range(3)]
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        for answer in answers:
            with pytest.raises(ResourceError, match="has ended; ask again"):
                await answer
        assert msgspec.json.decode(await watching.ask("frame"))["edges"] and watcher() != first

    talk(finished, ask)


def test_a_watcher_says_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a watcher that does not answer in time, and refuse questions once too many wait."""
    monkeypatch.setattr(watching_module, "ANSWER_S", 0.5)

    async def ask(watching: Watching) -> None:
        os.kill((await _started(watching)), signal.SIGSTOP)
        answers = [asyncio.ensure_future(watching.ask("frame")) for _ in range(MOST_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceError, match="too many questions"):
            await watching.ask("frame")
        for answer in answers:
            with pytest.raises(ResourceError):
                await answer

    talk(finished, ask)


def test_a_long_line_is_no_answer(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a watcher whose answer does not end."""
    monkeypatch.setattr(watching_module, "MOST_LINE_BYTES", 100)

    async def ask(watching: Watching) -> None:
        with pytest.raises(ResourceError, match="has ended"):
            await watching.ask("frame")

    talk(finished, ask)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    """Say that the reader has ended where there is nothing to read, and what the trace does not say."""

    async def ask(watching: Watching) -> None:
        with pytest.raises((ResourceError, Silent)):
            await watching.ask("frame")

    talk(tmp_path, ask)


async def _started(watching: Watching) -> int:
    await watching.ask("steps", actor="head.0")
    return watcher()
