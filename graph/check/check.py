"""Check everything about a graph that can be known before a process starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ranvier.transport.wires.descriptors import make_sure_of_files

from ..file import schema
from ..file.errors import Problem
from ..file.load import Document, as_setting, of_data, read
from ..file.named_graphs import file_of, folder_of
from .actors import ActorCheck
from .checked import Graph
from .devices import DeviceCheck
from .edges import EdgeCheck
from .hosts import HostCheck
from .model import ModelCheck
from .replicas import ReplicaCheck
from .wires import WireCheck


def load(
    source: str | Path | Mapping[str, Any],
    *,
    allow_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> Graph:
    """Read and check a graph file, or the same as data: `{"model": {"source": …}, "actors": {…}, "pipeline": […]}`.

    Args:
        source: the path of a graph file, or the name of a graph that comes with Ranvier (`smollm2`), or the keys and values
            of a graph as plain data. There, `ranvier` and `name` may be left out.
        allow_code: whether classes in the graph's folder may be imported (`kind: ./file.py:Class`).
        overrides: values by dotted key, as data or as YAML text: `{"model.dtype": "float32", "edges.0.credits": 3}`.
            They replace the values of `source`. An edge is named by its number or by its ends:
            `edges[lower.hidden->upper.hidden].codec`.
        folder: where relative paths begin; default: the file's folder, or the working directory for data.

    Raises:
        GraphError: the graph cannot run. The error lists every problem found, each with line and column or with its key.
        ResourceError: this process may not write files of the needed size.
    """
    settings = {key: as_setting(key, value) for key, value in (overrides or {}).items()}
    if isinstance(source, Mapping):
        document = of_data({"ranvier": 1, "name": "graph", **source}, settings)
        path, folder = None, Path(folder or ".")
    else:
        path = file_of(source)
        folder = folder_of(path) if folder is None else Path(folder)
        document = read(path, settings)
    make_sure_of_files(document.file)
    return _checked(document, path, folder, settings, allow_code)


def _checked(
    document: Document, path: Path | None, folder: Path, settings: Mapping[str, str], allow_code: bool
) -> Graph:
    file = schema.validate(document)
    problems: list[Problem] = []
    check = ActorCheck(document, file, problems, folder, allow_code)
    check.names()
    found = check.kinds()
    model = ModelCheck(document, file, problems, folder)
    checkpoint = model.checkpoint(found)
    check.stop_if_wrong()
    actors = check.actors(found, checkpoint)
    wires = WireCheck(document, file, problems, folder)
    wires.endpoints()
    wires.keys()
    HostCheck(document, file, problems).hosts()
    check.stop_if_wrong()
    advice = DeviceCheck(document, file, problems).devices(actors, checkpoint)
    check.stop_if_wrong()
    check.layers(actors, checkpoint)
    between = EdgeCheck(document, file, problems, actors, folder, allow_code)
    edges = between.edges(checkpoint)
    between.stop_if_wrong()
    between.connected(edges)
    between.token_returns(edges)
    between.observed(edges)
    between.cycles(edges)
    between.loops(edges)
    between.dims(edges)
    between.order(edges, checkpoint)
    between.stop_if_wrong()
    graph = Graph.checked(
        path=path, folder=folder, document=document, file=file, checkpoint=checkpoint, actors=actors, edges=tuple(edges),
        overrides=settings, allow_code=allow_code, warnings=(*model.warnings, *advice),
    )  # fmt: skip
    check.journal(graph.generates)
    copies = ReplicaCheck(document, file, problems, actors)
    copies.policies(edges, graph.generates)
    copies.stop_if_wrong()
    return graph
