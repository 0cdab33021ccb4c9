"""Show what every message of a run cost, why, and what changed since another run: `ranvier trace RUN`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..file.errors import RequestError
from ..run.paths import writable, writing
from ..trace import compare, critical_path, perfetto, summary, table, trace_plot
from ..trace.timeline import timeline
from .command_line import Json, RunFolder, columns, print_json, reading, run_named, say


def trace_command(
    run_dir: RunFolder,
    as_json: Json = False,
    to_perfetto: Annotated[
        Path | None,
        typer.Option(
            "--perfetto",
            metavar="OUT",
            help="Write a file for Perfetto: its protobuf, or Chrome's JSON if OUT ends in .json.",
        ),
    ] = None,
    to_plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="OUT", help="Draw latencies, pipeline and bytes (PNG or SVG); needs matplotlib."
        ),
    ] = None,
    why: Annotated[
        int | None,
        typer.Option(
            "--why", metavar="SESSION", help="Explain why a request took so long: each microsecond has one cause."
        ),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(
            "--position",
            metavar="N",
            help="With --why: explain only the token at this position, the prompt's tokens included.",
        ),
    ] = None,
    diff: Annotated[
        Path | None,
        typer.Option(
            "--diff",
            metavar="RUN2",
            parser=run_named,
            help="Show what changed from this run to another, the largest change first.",
        ),
    ] = None,
    idle: Annotated[bool, typer.Option("--idle", help="Show what every actor waited for while it was idle.")] = False,
) -> None:
    """Print what every message of a run cost, per edge and per actor."""
    for path in (to_perfetto, to_plot):
        if path is not None:
            writable(path)
    if position is not None and why is None:
        raise RequestError(f"--position {position}: name the session, too: --why SESSION")
    with reading(run_dir, diff):
        _trace(run_dir, as_json, to_perfetto, to_plot, why, position, diff, idle)


def _trace(
    run_dir: Path,
    as_json: bool,
    to_perfetto: Path | None,
    to_plot: Path | None,
    why: int | None,
    position: int | None,
    diff: Path | None,
    idle: bool,
) -> None:
    read = summary.read(run_dir)
    if why is not None or idle:
        found = critical_path.why(read, why, position) if why is not None else critical_path.idle(read)
        if as_json:
            print_json(found)
        else:
            shown = table.of_path(found) if why is not None else table.of_idle(found)
            say(table.fitted(shown, columns(sys.stdout)))
        return
    if to_perfetto is not None:
        drawn = timeline(read)
        with writing(to_perfetto):
            perfetto.write(to_perfetto, drawn)
        print(f"wrote {to_perfetto}; open it in Perfetto", file=sys.stderr)
    if to_plot is not None:
        with writing(to_plot):
            trace_plot.draw(to_plot, read)
        print(f"wrote {to_plot}", file=sys.stderr)
    figures = summary.summary(read)
    if diff is not None:
        changed = compare.compare(figures, summary.summary(summary.read(diff)))
        if as_json:
            print_json(changed)
        else:
            say(table.fitted(table.of_changes(changed), columns(sys.stdout)))
    elif as_json:
        print_json(figures)
    else:
        say(table.of_summary(figures, columns(sys.stdout)))
