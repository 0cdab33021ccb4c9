"""Define what the commands have in common: options, exit codes, Ctrl-C, JSON."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import typer

from ranvier.actors.errors import describe
from ranvier.transport.files import read_bounded
from ranvier.transport.format.errors import RanvierError

from ..file.errors import RequestError
from ..file.named_graphs import file_of
from ..run import run_folder, runs
from ..sessions.printable import printable
from . import completion

FAILED, WRONG, OVERLOADED, EXPIRED, INTERRUPTED = 1, 2, 3, 4, 130
"""Exit codes: the run failed; the command, file or request is wrong; there is no room now; the deadline passed; Ctrl-C."""
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
Result_ = TypeVar("Result_")

GRAPH = "a graph file (YAML), or smollm2, which comes with Ranvier"


def graph_argument(words: str, metavar: str = "GRAPH") -> Any:
    """Return the argument that names a graph, or several."""
    return typer.Argument(
        metavar=metavar, help=words, show_default=False, parser=file_of, autocompletion=completion.graphs
    )


GraphFile = Annotated[Path, graph_argument(f"The graph: {GRAPH}.")]
RUN = "its folder; latest, latest~1; its number in `ranvier runs`; or the beginning of its name"


def run_named(text: str) -> Path:
    """Return the folder of a run that the command line names.

    Raises:
        BadParameter: there is none.
    """
    try:
        return runs.named(text, run_folder.DEFAULT_ROOT)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None


RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", parser=run_named, help=f"A run: {RUN}.", show_default=False, autocompletion=completion.run_names
    ),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Allow Python code from the graph's folder to be imported.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


class LogForm(StrEnum):
    json = "json"
    console = "console"


Log = Annotated[
    LogForm | None,
    typer.Option("--log", help="Show the run's log on standard error, as JSON lines or as readable text."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the run's log as readable text: --log console.")]


def log_form(log: LogForm | None, verbose: bool) -> LogForm | None:
    """Return how the log is shown: as `--log` says, or as `-v` does."""
    return log or (LogForm.console if verbose else None)


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of the file, e.g. --set model.dtype=float32, or 'edges[lower.hidden->upper.hidden].codec=int8'.",
        autocompletion=completion.settings,
    ),
]


def interruptible(main: Callable[[], Awaitable[Result_]], first: Callable[[], object] | None = None) -> Result_:
    """Run `main` under trio until it ends, or until Ctrl-C or a signal that asks the command to end.

    With `first`, the first signal, Ctrl-C included, only calls it, so that `main` can end in order; the second one ends the
    command.

    Ctrl-C takes effect only where `main` waits. Elsewhere it could come between a context's entry and its body, and
    what the context has started would never be ended.
    """
    import trio

    ended_by: list[int] = []

    async def watched() -> list[Result_]:
        with _receiver(signal.SIGINT if first is not None else None) as signals, trio.CancelScope() as scope:
            watching = trio.Event()

            async def watch() -> None:
                watching.set()
                asked = first
                async for number in signals:
                    if asked is not None:
                        asked()
                        asked = None
                        continue
                    ended_by.append(number)
                    scope.cancel()

            trio.lowlevel.spawn_system_task(watch)
            await watching.wait()
            return [await main()]
        return []

    try:
        with interrupts():
            made = trio.run(watched, restrict_keyboard_interrupt_to_checkpoints=True)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if not made:
        print(f"ended by {signal.Signals(ended_by[0]).name}", file=sys.stderr)
        raise typer.Exit(128 + ended_by[0])
    return made[0]


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Let Ctrl-C raise `KeyboardInterrupt` while in the context, so that work can end in order.

    Outside the context, Ctrl-C ends a command at once.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _receiver(also: int | None) -> Any:
    """Receive the signals that ask the command to end, except those that it was started to ignore (nohup)."""
    import trio

    wanted = ENDING if also is None else (*ENDING, also)
    asking = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
    return trio.open_signal_receiver(*asking)


def overrides(settings: Sequence[str] | None) -> dict[str, str]:
    """Return the values of `--set`, by key. Errors are those of `pairs`."""
    return pairs("--set", settings, "model.dtype=float32")


def pairs(option: str, settings: Sequence[str] | None, example: str) -> dict[str, str]:
    """Return the values of an option that is given as KEY=VALUE, several times, by key.

    Raises:
        RequestError: a setting does not have this form.
    """
    made = {}
    for setting in settings or ():
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise RequestError(f"{option} {setting}: expected KEY=VALUE, such as {example}")
        made[key] = value
    return made


def yaml_value(text: str) -> Any:
    """Return the plain value that a text has in YAML, as in a graph file: `false`, `3`, `[a, b]`; else the text.

    Raises:
        RequestError: it is not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise RequestError(f"{text!r:.80}: {error}") from None


MOST_PROMPT_BYTES = 64 << 20


def prompt_of(text: str | None, file: Path | None, *, piped: bool = False) -> str | None:
    """Return the prompt: as it is given, from standard input (`-`), or from a file.

    With `piped`, it is also what standard input has if nothing is given and standard input is a pipe or a file.

    All users of the machine can see a command line, so the other two ways keep a prompt private.

    Raises:
        RequestError: both are given, or the file cannot be read as UTF-8.
    """
    if file is not None and text is not None:
        raise RequestError("--prompt and --prompt-file are both given; give one")
    if file is None and text is None and piped and _is_piped():
        if sys.stderr.isatty():
            say("reading the prompt from standard input", error=True)
        given = prompt_of("-", None) or ""
        return given.removesuffix("\n") or None
    if file is None and text != "-":
        return text
    where = f"--prompt-file {file}" if file is not None else "--prompt -"
    try:
        data = (
            read_bounded(file, MOST_PROMPT_BYTES) if file is not None else sys.stdin.buffer.read(MOST_PROMPT_BYTES + 1)
        )
        if len(data) > MOST_PROMPT_BYTES:
            raise RequestError(f"{where}: expected at most {MOST_PROMPT_BYTES} bytes, got more")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{where}: {error}") from None


def _is_piped() -> bool:
    """Return whether standard input is a pipe or a file, and not a terminal, /dev/null or a socket."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # it has no descriptor, as in a notebook
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def columns(stream: TextIO) -> int:
    """Return the width of the terminal that a stream goes to; 0 if it goes to none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def say(text: str, *, end: str = "\n", error: bool = False) -> None:
    """Print a text that may be untrusted, with its control characters escaped."""
    print(printable(text), end=end, file=sys.stderr if error else sys.stdout, flush=True)


def show_text(text: str) -> None:
    """Print a piece of a model's text. On a terminal, its control characters are escaped."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def shown(text: str) -> bool:
    """Print a piece of a model's text, as `show_text` does. Return false once nobody reads it any more."""
    try:
        show_text(text)
    except BrokenPipeError:
        discard_output()
        return False
    return True


def discard_output() -> None:
    """Send standard output to nowhere from now on, so that the interpreter's last flush does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


@contextlib.contextmanager
def reading(*folders: Path | None) -> Iterator[None]:
    """Read untrusted folders in this context, and translate unexpected errors.

    Raises:
        TraceError: the contents of a folder caused an error that no check covers.
    """
    from ..trace.trace_lines import TraceError

    try:
        with interrupts():
            yield
    except (RanvierError, BrokenPipeError):  # BrokenPipeError: whoever read the output has closed the pipe
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError,
            TypeError, ValueError) as error:  # fmt: skip
        names = ", ".join(str(folder) for folder in folders if folder is not None)
        raise TraceError(f"{names}: damaged, or not a run folder: {describe(error)}") from error


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(value))
