"""Talk with a model on a terminal: `ranvier run GRAPH` without a prompt. The run stays warm between the messages."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from ranvier.transport.format.errors import RanvierError

from ..check.checked import Graph
from ..file.errors import RequestError
from ..run.blocking import BlockingRun, start
from ..trace import critical_path, summary, table
from ..trace.trace_lines import TraceError
from .about import About
from .command_line import ENDING, columns, interrupts, say, show_text, yaml_value
from .progress import Bar

HELP = """/system TEXT     begin again with a system message; without a text: without one
/set NAME=VALUE  change max_tokens, temperature, top_k, top_p, min_p, seed or another option of sampling
/why             show who waits for whom
/trace           show where the time of the last answer went
/new             forget what was said
/help            show this
Ctrl-C stops an answer; Ctrl-D ends."""
MOST_HISTORY = 1000
WRITTEN_S = 2.0
"""Time after which all processes have written their records of an answer."""


class Talk:
    """Hold a conversation with a running graph."""

    def __init__(self, run: BlockingRun, options: Mapping[str, Any], system: str | None) -> None:
        self._run, self._options = run, dict(options)
        self._said: list[dict[str, str]] = []
        self._session = 0
        self._begin(system)

    def _begin(self, system: str | None) -> None:
        self._system = system
        self._said = [{"role": "system", "content": system}] if system else []

    def take(self, line: str) -> None:
        """Answer a line: a command, or a message. Ctrl-C stops an answer, and what came of it stays.

        Raises:
            RanvierError: it cannot be answered, or the run is over.
            KeyboardInterrupt: a command was stopped.
        """
        word, _, rest = line.strip().partition(" ")
        commands: Mapping[str, Callable[[str], None]] = {
            "/system": lambda text: self._begin(text.strip() or None), "/set": self._set,
            "/why": lambda _: say(str(self._run.why())), "/trace": lambda _: self._trace(),
            "/new": lambda _: self._begin(self._system), "/help": lambda _: print(HELP),
        }  # fmt: skip
        if word.startswith("/"):
            if word not in commands:
                raise RequestError(f"{word}: there is no such command; there are {', '.join(commands)}")
            commands[word](rest)
        elif line.strip():
            self._answer(line)

    def _answer(self, line: str) -> None:
        asked = [*self._said, {"role": "user", "content": line}]
        generation = self._run.generate(asked, **self._options)
        try:
            for token in generation:
                show_text(token.text)
        except KeyboardInterrupt:
            print(" …", end="")
        finally:
            generation.close()
            print(flush=True)
        self._session = generation.session
        self._said = [*asked, {"role": "assistant", "content": generation.result.text}]

    def _set(self, setting: str) -> None:
        name, separator, text = (part.strip() for part in setting.partition("="))
        if not separator:
            raise RequestError(f"/set {setting}: expected NAME=VALUE, such as temperature=0.7")
        value = yaml_value(text)
        if name == "max_tokens":
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"/set max_tokens: expected a number from 1, got {text}")
            self._options["max_tokens"] = value
            return
        try:
            self._options["sampling"] = replace(self._options["sampling"], **{name: value})
        except (TypeError, ValueError) as error:
            raise RequestError(f"/set {setting}: {error}") from None

    def _trace(self) -> None:
        if not self._session:
            raise RequestError("/trace: nothing was answered yet")
        until_s = time.monotonic() + WRITTEN_S
        while True:
            try:
                found = critical_path.why(summary.read(self._run.dir), self._session)
                say(table.fitted(table.of_path(found), columns(sys.stdout)))
                return
            except TraceError as error:
                if time.monotonic() > until_s:
                    raise RequestError(f"/trace: {error}") from None
            time.sleep(0.1)


def talk(
    checked: Graph, options: Mapping[str, Any], system: str | None, launching: Mapping[str, Any], about: About
) -> None:  # fmt: skip
    """Talk until Ctrl-D, or until a signal asks the command to end."""
    with interrupts(), _ended_by_signals():
        with Bar(sys.stderr, quiet=about.quiet) as bar:
            run = start(checked, progress=bar.show, **launching)
        with run, _history():
            about.begins(run.dir)
            if not about.quiet:
                say("/help lists commands, Ctrl-D ends", error=True)
            _converse(run, Talk(run, options, system))


def _converse(run: BlockingRun, talking: Talk) -> None:
    while True:
        try:
            talking.take(input("> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except UnicodeDecodeError as error:
            say(f"ranvier: the line is not UTF-8: {error}", error=True)
        except RanvierError as error:
            say(f"ranvier: {error}", error=True)
            run.status()  # raises if the run is over


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End the context in order when a signal asks the command to end, such as when the terminal's window is closed."""

    def end(number: int, _frame: object) -> None:
        raise typer.Exit(128 + number)

    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Let arrow keys bring back earlier lines, also those of earlier talks. Only this user can read the file."""
    try:
        import readline

        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ranvier"
    except (
        ImportError,
        RuntimeError,
    ):  # this Python has no readline, or the user has no home; lines can still be typed
        yield
        return
    file = folder / "history"
    readline.set_history_length(MOST_HISTORY)
    with contextlib.suppress(OSError):  # there is none yet
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # no room, or no right to write there: the history is a convenience
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.touch(0o600)
            readline.write_history_file(file)
