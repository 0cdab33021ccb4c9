"""What the commands have in common: their options, their exit codes, Ctrl-C, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ranvier.transport.errors import RanvierError

FAILED, WRONG, INTERRUPTED = 1, 2, 130
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
    """Run it under trio until it ends, or until Ctrl-C, which comes only where it waits.

    Elsewhere it could come between a context's entry and its body: what the context had started was then never ended.
    """
    import trio

    try:
        return trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


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


def print_json(value: Any) -> None:
    """One object on standard output."""
    print(json.dumps(value))
