"""Continue the requests of a killed run in a new run: `ranvier run --resume RUN`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from ranvier.actors.errors import counted
from ranvier.transport.files import read_text
from ranvier.transport.format.errors import RanvierError

from ..check.check import load as load_graph
from ..check.checked import Graph
from ..file.errors import RequestError
from ..file.load import read as read_document
from ..sessions.generation import Result
from .command_line import FAILED, interruptible, print_json, say, shown

MOST_BYTES = 16 << 20
WITH_RESUME = ("resume", "after", "runs", "log", "verbose", "as_json", "allow_code")
"""Options of `ranvier run` that may be given with `--resume`. All other options come from the killed run."""


def check(context: typer.Context) -> None:
    """Refuse options that `--resume` would ignore.

    Raises:
        RequestError: such an option is given.
    """
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name not in WITH_RESUME and source is not None and source.name == "COMMANDLINE":
            raise RequestError(
                f"{parameter.opts[0]}: --resume takes graph and requests from the run; give nothing else but --after, --runs, "
                "--log, --json, --allow-code"
            )


def run(run_dir: Path, after: int | None, as_json: bool, allow_code: bool, launching: dict[str, Any]) -> None:
    """Continue all open requests of a run, and print the text of each that comes after the position `after`.

    Raises:
        RequestError: `run_dir` is not a run folder, has nothing to resume, or its run had another graph or model.
        typer.Exit: a request failed; the other requests are done.
    """
    from ..run.launch import launch
    from .progress import Bar

    graph = graph_of(run_dir, allow_code)
    bar = Bar(sys.stderr)

    async def main() -> tuple[Path, list[tuple[str, Result, str]], bool]:
        with bar:
            async with launch(graph, progress=bar.show, resume=run_dir, **launching) as started:
                results, seen = [], True
                for key in started.resumed:
                    generation, failed = started.resume(key, after), ""
                    if not as_json and seen and len(started.resumed) > 1:
                        seen = shown(f"\n[{key}]\n")
                    try:
                        async for token in generation:
                            bar.done()
                            if not as_json:
                                seen = seen and shown(token.text)
                    except RanvierError as error:
                        failed = str(error)
                    results.append((key, generation.result, failed))
                return started.dir, results, seen

    path, results, seen_all = interruptible(main)
    if as_json:
        print_json({"run_dir": str(path), "requests": [
            {"id": key, "text": result.text, "token_ids": result.token_ids, "finish_reason": result.finish_reason,
             "error": failed or None}
            for key, result, failed in results
        ]})  # fmt: skip
    elif seen_all:
        _print_outcome(run_dir, path, results)
    if any(failed for _, _, failed in results):
        raise typer.Exit(FAILED)


def _print_outcome(resumed: Path, path: Path, results: list[tuple[str, Result, str]]) -> None:
    print(flush=True)
    say(f"continued {counted(len(results), 'request')} of {resumed}\nrun folder: {path}", error=True)
    for key, _, failed in results:
        if failed:
            say(f"{key}: {failed}", error=True)


def graph_of(run_dir: Path, allow_code: bool) -> Graph:
    """Load the graph file of a run again, with the settings of that run.

    Code from the graph's folder is imported only if `allow_code` is set now, too.
    """
    try:
        outcome = json.loads(read_text(run_dir / "run.json", MOST_BYTES))
        file, folder = outcome["file"], Path(str(outcome["folder"]))
        settings = {str(key): str(value) for key, value in outcome["settings"].items()}
        wanted_code = bool(outcome["allow_code"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{run_dir}: no run folder, or a damaged one: {type(error).__name__}: {error}") from None
    if wanted_code and not allow_code:
        raise RequestError(f"{run_dir}: that run used code of {folder}; pass --allow-code if you trust it")
    if file is None:  # the graph was written in Python
        return load_graph(
            read_document(run_dir / "graph.yaml").data, allow_code=allow_code, overrides=settings, folder=folder
        )
    return load_graph(Path(str(file)), allow_code=allow_code, overrides=settings, folder=folder)
