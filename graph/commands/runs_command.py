"""List runs, and remove old ones: `ranvier runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ranvier.actors.errors import counted

from ..file.errors import RequestError
from ..file.schema import RunsSection
from ..run import run_folder, runs
from .command_line import Json, print_json, say

app = typer.Typer(help="List run folders, or remove old ones.", invoke_without_command=True)
Folder = Annotated[Path, typer.Option("--runs", help="The folder that holds the run folders.")]
_BOUND = RunsSection()


@app.callback()
def list_runs(context: typer.Context, folder: Folder = run_folder.DEFAULT_ROOT, as_json: Json = False) -> None:
    """List the runs of a folder, the newest first: number, name, start, outcome, size."""
    if context.invoked_subcommand is not None:
        context.obj = (folder, as_json)  # these options may also stand before the subcommand
        return
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; give one with --runs")
    try:
        found = runs.found(folder)
    except OSError as error:
        raise RequestError(f"{folder}: {error.strerror}") from None
    if as_json:
        print_json([
            {"name": run.path.name, "began": run.began, "outcome": run.outcome, "bytes": run.nbytes, "resumable": run.resumable}
            for run in found
        ])  # fmt: skip
        return
    width = max((len(run.path.name) for run in found), default=0)
    for number, run in enumerate(found, 1):
        place = f"{number:3}  " if folder == run_folder.DEFAULT_ROOT else ""  # numbers name runs of this folder
        more = "  can be resumed" if run.resumable else ""
        say(f"{place}{run.path.name:{width}}  {run.began[:19]:19}  {run.outcome:11}  {run.nbytes / 1e6:9.1f} MB{more}")
    say(f"{counted(len(found), 'run')}, {sum(run.nbytes for run in found) / 1e6:.1f} MB")


@app.command("prune")
def prune_command(
    context: typer.Context,
    own_folder: Annotated[
        Path | None,
        typer.Option(
            "--runs", help="The folder that holds the run folders.", show_default=str(run_folder.DEFAULT_ROOT)
        ),
    ] = None,
    newest: Annotated[int, typer.Option(min=1, help="Keep at most this many runs.")] = _BOUND.newest,
    gigabytes: Annotated[float, typer.Option(min=0, help="Keep at most this many gigabytes.")] = _BOUND.gigabytes,
    as_json: Json = False,
) -> None:
    """Remove the oldest runs until the folder is within the limits.

    Runs in progress, and runs that can be resumed, stay.
    """
    folder, before_json = context.obj
    folder, as_json = own_folder or folder, as_json or before_json
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; give one with --runs")
    try:
        gone = runs.prune(folder, newest, int(gigabytes * 1e9))
    except OSError as error:
        raise RequestError(f"{folder}: {error.strerror}") from None
    if as_json:
        print_json([run.path.name for run in gone])
        return
    for run in gone:
        say(f"removed {run.path.name}")
    say(f"{counted(len(gone), 'run')} removed, {sum(run.nbytes for run in gone) / 1e6:.1f} MB")
