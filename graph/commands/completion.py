"""Complete what a shell's user types: graphs, runs, actors and edges. Install it with `ranvier --install-completion`.

Each function gets the beginning of a word and returns the words that it may become, each with a line about it. A folder that
cannot be read completes to nothing: a shell has no place for an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

from ranvier.transport.format.errors import RanvierError

from ..file import load, named_graphs
from ..run import run_folder, runs

Words = list[tuple[str, str]]


def graphs(incomplete: str) -> Words:
    """Complete a graph: those that come with Ranvier, graph files, and folders on the way to them."""
    own = [(name, "comes with Ranvier") for name in named_graphs.names() if name.startswith(incomplete)]
    folder, _, begun = incomplete.rpartition("/")
    found: Words = []
    with contextlib.suppress(OSError):
        for path in sorted(Path(folder + "/" if folder or incomplete.startswith("/") else ".").iterdir()):
            text = f"{folder}/{path.name}" if "/" in incomplete else path.name
            if not path.name.startswith(begun) or (path.name.startswith(".") and not begun):
                continue
            if path.is_dir():
                found.append((f"{text}/", ""))
            elif path.suffix in (".yaml", ".yml"):
                found.append((text, ""))
    return own + found


def run_names(incomplete: str) -> Words:
    """Complete a run by name, the newest first, and `latest`."""
    found: Words = []
    with contextlib.suppress(OSError):
        found = [(run.path.name, f"{run.began[:19]} {run.outcome}") for run in runs.found(run_folder.DEFAULT_ROOT)]
    latest = [("latest", found[0][0])] if found else []
    return [word for word in latest + found if word[0].startswith(incomplete)]


def actors(context: typer.Context, incomplete: str) -> Words:
    """Complete an actor of the run or the graph that stands before it."""
    return [(name, kind) for name, kind in _actors(context) if name.startswith(incomplete)]


def scaled(context: typer.Context, incomplete: str) -> Words:
    """Complete `actor=` for `ranvier scale`."""
    return [(f"{name}=", kind) for name, kind in _actors(context) if f"{name}=".startswith(incomplete)]


def recorded(context: typer.Context, incomplete: str) -> Words:
    """Complete the actors and listed edges of `--record`: the last of several, between commas."""
    before, comma, begun = incomplete.rpartition(",")
    words = ["all", *(name for name, _ in _actors(context)), *_edges(context)]
    return [(f"{before}{comma}{word}", "") for word in words if word.startswith(begun)]


def settings(context: typer.Context, incomplete: str) -> Words:
    """Complete the keys of `--set`: what the graph has, and the edges that it lists by their ends."""
    keys = [f"actors.{name}." for name, _ in _actors(context)] + [f"edges[{edge}]." for edge in _edges(context)]
    keys += ["model.dtype=", "model.weights=", "model.source=", "model.products=", "transport="]
    return [(key, "") for key in keys if key.startswith(incomplete)]


def _data(context: typer.Context) -> dict[str, object]:
    """Return the data of the graph file that the command line names, or of its run's."""
    graph, run_dir = context.params.get("graph"), context.params.get("run_dir")
    if graph is run_dir is None and context.args:  # click stops before the arguments where an option lacks its value
        graph = context.args[0]
    path = named_graphs.file_of(str(graph)) if graph is not None else Path(str(run_dir or "")) / "graph.yaml"
    with contextlib.suppress(RanvierError, OSError):
        data = load.read(path).data
        return data if isinstance(data, dict) else {}
    return {}


def _actors(context: typer.Context) -> Iterator[tuple[str, str]]:
    actors = _data(context).get("actors")
    for name, section in (actors if isinstance(actors, dict) else {}).items():
        yield name, str(section.get("kind", "")) if isinstance(section, dict) else ""


def _edges(context: typer.Context) -> Iterable[str]:
    edges = _data(context).get("edges")
    for edge in edges if isinstance(edges, list) else ():
        listed = load.spelled_out(edge) if isinstance(edge, str) else edge
        if isinstance(listed, dict):
            yield f"{listed.get('from')}->{listed.get('to')}"
