"""The commands that attach to a run that goes on, by its folder: `scale`, `why`, `top`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..file.errors import RequestError
from .command_line import INTERRUPTED, Json, print_json, reading, say

WHY_S = 10.0
"""A run that goes on answers within two seconds."""
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that goes on.", show_default=False)]


def why_command(run_dir: RunFolder, as_json: Json = False) -> None:
    """Say who waits for whom in a run that goes on, and who is to blame.

    Whoever is stopped, silent, loading, or long in one step is named with its process and, where it can still say so,
    the lines of Python it is at. Costs the run nothing while nobody asks.
    """
    from . import client

    with reading(run_dir):
        found = json.loads(client.ask(run_dir, "why", WHY_S))
        if as_json:
            print_json(found)
        else:
            say(str(found["text"]))


def top_command(
    run_dir: RunFolder,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Show a run that goes on as a table that renews itself, until it ends or Ctrl-C; --json: one look.

    Rates, batches and latencies are of the last five seconds, from the trace as it is written (trace: true).
    """
    from rich.console import Console

    from . import top

    try:
        with reading(run_dir):
            if as_json:
                print_json(top.Top(run_dir).look())
                return
            top.show(run_dir, interval, Console())
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    print("the run is over", file=sys.stderr)


def scale_command(
    run_dir: RunFolder,
    change: Annotated[
        str, typer.Argument(metavar="ACTOR=N", help="How many replicas the actor is to have.", show_default=False)
    ],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it to be done.")] = 120.0,
    as_json: Json = False,
) -> None:
    """Change how many replicas an actor has while its run goes on.

    A replica that joins gets sessions that begin later; one that leaves ends when its last session is over.
    """
    from . import client

    actor, _, count = change.partition("=")
    if not actor or not count.isdecimal():
        raise RequestError(f"{change}: expected ACTOR=N, such as upper=2")
    with reading(run_dir):
        done = client.ask(run_dir, "scale", timeout, actor=actor, replicas=int(count))
    if as_json:
        print_json({"done": done})
    else:
        say(done)
