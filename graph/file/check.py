"""Check everything about a graph that can be known before a process starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ranvier.transport.wires.descriptors import make_sure_of_files

from . import schema
from .check_actors import ActorCheck
from .check_edges import EdgeCheck
from .check_hosts import HostCheck
from .check_model import ModelCheck
from .check_replicas import ReplicaCheck
from .check_wires import WireCheck
from .checked import Graph
from .errors import Problem
from .load import read


def load(path: str | Path, *, allow_code: bool = False, overrides: Mapping[str, str] | None = None) -> Graph:
    """Read and check a graph file.

    Args:
        allow_code: whether classes in the graph's folder may be imported (`kind: ./file.py:Class`).
        overrides: values by dotted key, as YAML text: `{"model.dtype": "float32"}`. They replace the file's values.

    Raises:
        GraphError: the graph cannot run. The error lists every problem found, each with line and column.
        ResourceError: this process may not write files of the needed size.
    """
    path = Path(path)
    make_sure_of_files(str(path))
    document = read(path, overrides)
    file = schema.validate(document)
    problems: list[Problem] = []
    check = ActorCheck(document, file, problems, path.parent, allow_code)
    check.names()
    found = check.kinds()
    model = ModelCheck(document, file, problems, path.parent)
    checkpoint = model.checkpoint(found)
    check.stop_if_wrong()
    actors = check.actors(found, checkpoint)
    wires = WireCheck(document, file, problems, path.parent)
    wires.endpoints()
    wires.keys()
    HostCheck(document, file, problems).hosts()
    check.stop_if_wrong()
    check.layers(actors, checkpoint)
    between = EdgeCheck(document, file, problems, actors, path.parent, allow_code)
    edges = between.edges()
    between.stop_if_wrong()
    between.connected(edges)
    between.token_returns(edges)
    between.observed(edges)
    between.cycles(edges)
    between.loops(edges)
    between.dims(edges)
    between.order(edges, checkpoint)
    between.stop_if_wrong()
    graph = Graph(
        path, file, checkpoint, actors, tuple(edges), dict(overrides or {}), allow_code, tuple(model.warnings)
    )
    check.journal(graph.generates)
    copies = ReplicaCheck(document, file, problems, actors)
    copies.policies(edges, graph.generates)
    copies.stop_if_wrong()
    return graph
