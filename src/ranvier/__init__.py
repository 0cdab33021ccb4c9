"""Ranvier: the parts of a model as actors that exchange tensors over ZeroMQ, wired by a graph file.

graph = ranvier.load("examples/smollm2.yaml")

async def main():                       # on trio
    async with ranvier.launch(graph) as run:
        async for token in run.generate("Why is the sky blue?"):
            print(token.text, end="")

with ranvier.start(graph) as run:       # the same in a plain script or a notebook
    for token in run.generate("Why is the sky blue?"):
        print(token.text, end="")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ranvier.actors.actor import Actor, Batch, Context
    from ranvier.actors.errors import ActorFailed, CheckpointError, Expired, Overloaded
    from ranvier.actors.routing import balancing_loss, gather, scatter
    from ranvier.actors.session import Sampling, SessionInfo
    from ranvier.graph.blocking import BlockingRun, start
    from ranvier.graph.check import load
    from ranvier.graph.checked import Graph
    from ranvier.graph.errors import GraphError, RequestError
    from ranvier.graph.generation import Generation, Result, Token
    from ranvier.graph.launch import launch
    from ranvier.graph.plan import Plan, plan
    from ranvier.graph.run import Run
    from ranvier.graph.training.scratch import initialise
    from ranvier.graph.training.trainer import Trained, train
    from ranvier.transport.errors import (
        KeyFileError,
        LinkBroken,
        LinkClosed,
        ProtocolError,
        RanvierError,
        ResourceError,
    )
    from ranvier.transport.header import Row
    from ranvier.transport.spec import TensorSpec

# Imported when first asked for: `import ranvier` must not take the second that torch needs.
_PLACES = {
    "Actor": "actors.actor", "Batch": "actors.actor", "Context": "actors.actor",
    "ActorFailed": "actors.errors", "CheckpointError": "actors.errors", "Expired": "actors.errors",
    "Overloaded": "actors.errors",
    "balancing_loss": "actors.routing", "gather": "actors.routing", "scatter": "actors.routing",
    "Sampling": "actors.session", "SessionInfo": "actors.session",
    "BlockingRun": "graph.blocking", "start": "graph.blocking",
    "Graph": "graph.checked", "load": "graph.check",
    "GraphError": "graph.errors", "RequestError": "graph.errors",
    "Plan": "graph.plan", "plan": "graph.plan",
    "Generation": "graph.generation", "Result": "graph.generation", "Token": "graph.generation",
    "Run": "graph.run", "launch": "graph.launch",
    "train": "graph.training.trainer", "Trained": "graph.training.trainer", "initialise": "graph.training.scratch",
    "LinkBroken": "transport.errors", "LinkClosed": "transport.errors", "ProtocolError": "transport.errors",
    "RanvierError": "transport.errors", "ResourceError": "transport.errors", "KeyFileError": "transport.errors",
    "Row": "transport.header",
    "TensorSpec": "transport.spec",
}  # fmt: skip

__all__ = [
    "Actor", "ActorFailed", "Batch", "BlockingRun", "CheckpointError", "Context", "Expired", "Generation", "Graph",
    "GraphError", "KeyFileError", "LinkBroken", "LinkClosed", "Overloaded", "Plan", "ProtocolError", "RanvierError",
    "RequestError", "ResourceError", "Result", "Row", "Run",
    "Sampling", "SessionInfo", "TensorSpec", "Token", "Trained", "balancing_loss", "gather", "initialise", "launch",
    "load", "plan", "scatter", "start", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'ranvier' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ranvier.{place}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
