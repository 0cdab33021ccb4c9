"""What the commands have in common: their options, their exit codes, Ctrl-C, JSON."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ranvier.actors.files import read_bounded
from ranvier.transport.errors import RanvierError

FAILED, WRONG, INTERRUPTED = 1, 2, 130
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
Result_ = TypeVar("Result_")

GraphFile = Annotated[Path, typer.Argument(metavar="GRAPH", help="The graph file (YAML).", show_default=False)]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Import actors from Python files of the graph's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


class LogForm(StrEnum):
    json = "json"
    console = "console"


Log = Annotated[
    LogForm | None, typer.Option("--log", help="Show the run's log on standard error, as JSON lines or for people.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the file, e.g. --set model.dtype=float32."),
]


def interruptible(main: Callable[[], Awaitable[Result_]]) -> Result_:
    """Run it under trio until it ends, or until Ctrl-C, which comes only where it waits, or a signal that asks to end.

    Elsewhere Ctrl-C could come between a context's entry and its body: what the context had started was then never ended.
    """
    import trio

    ended_by: list[int] = []

    async def watched() -> list[Result_]:
        with _receiver() as signals, trio.CancelScope() as scope:
            watching = trio.Event()

            async def watch() -> None:
                watching.set()
                async for number in signals:
                    ended_by.append(number)
                    scope.cancel()

            trio.lowlevel.spawn_system_task(watch)
            await watching.wait()
            return [await main()]
        return []

    try:
        made = trio.run(watched, restrict_keyboard_interrupt_to_checkpoints=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if not made:
        print(f"ended by {signal.Signals(ended_by[0]).name}", file=sys.stderr)
        raise typer.Exit(128 + ended_by[0])
    return made[0]


def _receiver() -> Any:
    """Signals that ask the command to end; one that it was started to ignore (nohup) stays so."""
    import trio

    asking = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return trio.open_signal_receiver(*asking)


class Wrong(RanvierError):
    """A request that is wrong."""


def overrides(settings: Sequence[str] | None) -> dict[str, str]:
    """What `--set` says, by key."""
    made = {}
    for setting in settings or ():
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise Wrong(f"--set {setting}: expected KEY=VALUE, such as model.dtype=float32")
        made[key] = value
    return made


MOST_PROMPT_BYTES = 64 << 20


def prompt_of(text: str | None, file: Path | None) -> str | None:
    """Return the prompt: as it is given, from standard input (`-`), or from a file. Command lines are seen by all users of the
    machine; those two are not.

    Raises:
        Wrong: both are given, or the file cannot be read as UTF-8.
    """
    if file is not None and text is not None:
        raise Wrong("--prompt and --prompt-file say the same; give one")
    if file is None and text != "-":
        return text
    where = f"--prompt-file {file}" if file is not None else "--prompt -"
    try:
        data = read_bounded(file, MOST_PROMPT_BYTES) if file is not None else sys.stdin.buffer.read(MOST_PROMPT_BYTES)
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Wrong(f"{where}: {error}") from None


def print_json(value: Any) -> None:
    """One object on standard output."""
    print(json.dumps(value))
