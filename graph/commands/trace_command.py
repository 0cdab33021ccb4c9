"""Show what every message of a run cost, why, and what changed since another run: `ranvier trace RUN`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..file.errors import RequestError
from ..run.paths import writable, writing
from ..trace import compare, critical_path, perfetto, sql, summary, table, trace_plot
from ..trace.sql_tables import TABLES
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
    question: Annotated[
        str | None,
        typer.Option(
            "--sql", metavar="QUESTION",
            help="Ask in SQL, or by the name of a question. Without QUESTION: list the tables, their columns, and the names.",
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="With --sql: print the answer as CSV.")] = False,
    to_parquet: Annotated[
        Path | None,
        typer.Option("--parquet", metavar="DIR", help="Write the tables of --sql as Parquet files; needs duckdb."),
    ] = None,
) -> None:  # fmt: skip
    """Print what every message of a run cost, per edge and per actor."""
    if as_csv and question is None:
        raise RequestError("--csv: ask a question, too: --sql QUESTION")
    if question is not None or to_parquet is not None:
        with reading(run_dir):
            _ask(run_dir, question, as_json, as_csv, to_parquet)
        return
    for path in (to_perfetto, to_plot):
        if path is not None:
            writable(path)
    if position is not None and why is None:
        raise RequestError(f"--position {position}: name the session, too: --why SESSION")
    with reading(run_dir, diff):
        _trace(run_dir, as_json, to_perfetto, to_plot, why, position, diff, idle)


def with_bare_sql(arguments: Sequence[str]) -> list[str]:
    """Give `--sql` of `trace` an empty question where the command line ends after it, or another option follows."""
    if arguments[:1] != ["trace"]:
        return list(arguments)
    following = [*arguments[1:], "--"]
    return [
        "--sql=" if one == "--sql" and after.startswith("-") else one
        for one, after in zip(arguments, following, strict=True)
    ]


def _ask(run_dir: Path, question: str | None, as_json: bool, as_csv: bool, to_parquet: Path | None) -> None:
    if question == "":
        if as_json:
            print_json({name: table._asdict() for name, table in TABLES.items()})
        else:
            say(sql.listing())
        return
    data = sql.database(summary.read(run_dir))
    if to_parquet is not None:
        with writing(to_parquet):
            sql.write_parquet(data, to_parquet)
        print(f"wrote {len(TABLES)} files into {to_parquet}", file=sys.stderr)
    if question is None:
        return
    names, rows = sql.ask(data, question)
    if as_json:
        shown = [[value.hex() if isinstance(value, bytes) else value for value in row] for row in rows]
        print_json([dict(zip(names, row, strict=True)) for row in shown])
    elif as_csv:
        sql.write_csv(names, rows, sys.stdout)
    else:
        say(sql.table(names, rows))


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
