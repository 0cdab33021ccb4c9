"""Define the commands that attach to a run in progress by its folder: `scale`, `why`, `top`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from ..file.errors import RequestError
from . import completion
from .command_line import INTERRUPTED, Json, RunFolder, print_json, reading, say

WHY_S = 10.0
"""Seconds to wait for an answer. A run in progress answers within two."""


def why_command(run_dir: RunFolder, as_json: Json = False) -> None:
    """Show who waits for whom in a run in progress, and which actor is to blame.

    An actor that is stopped, silent, loading, or spends long in one step is named with its process. If the
    process can still answer, the Python lines that it is executing are shown. The run pays nothing for this command
    until you use it.
    """
    from ranvier.actors.protocol.control_protocol import AskWhy

    from ..run import client

    with reading(run_dir):
        found = json.loads(client.ask(run_dir, AskWhy(), WHY_S))
        if as_json:
            print_json(found)
        else:
            say(str(found["text"]))


def top_command(
    run_dir: RunFolder,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two updates.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Show a run in progress as a table that updates itself, until the run ends or Ctrl-C; --json prints one snapshot.

    Rates, batches and latencies cover the last five seconds. They come from the trace that the run writes (trace:
    true).
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
        str,
        typer.Argument(
            metavar="ACTOR=N",
            help="The actor, and its new number of replicas.",
            show_default=False,
            autocompletion=completion.scaled,
        ),
    ],
    timeout: Annotated[float, typer.Option(help="Seconds to wait until the change is done.")] = 120.0,
    as_json: Json = False,
) -> None:
    """Change the number of replicas of an actor during its run.

    A replica that joins receives only sessions that begin later. A replica that leaves ends when its last session is
    over.
    """
    from ranvier.actors.protocol.control_protocol import Scale

    from ..run import client

    actor, _, count = change.partition("=")
    if not actor or not count.isdecimal():
        raise RequestError(f"{change}: expected ACTOR=N, such as upper=2")
    with reading(run_dir):
        done = client.ask(run_dir, Scale(actor, int(count)), timeout)
    if as_json:
        print_json({"done": done})
    else:
        say(done)
