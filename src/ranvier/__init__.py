"""Run the parts of a model as actors that exchange tensors over ZeroMQ, wired by a graph file.

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
    from ranvier.actors.component.actor import Actor, Batch, Context, RowsFailed
    from ranvier.actors.component.routing import balancing_loss, gather, scatter
    from ranvier.actors.component.session import Sampling, SessionInfo
    from ranvier.actors.errors import ActorFailed, CheckpointError, Expired, Overloaded
    from ranvier.graph.check.check import load
    from ranvier.graph.check.checked import Graph
    from ranvier.graph.file.errors import GraphError, RequestError
    from ranvier.graph.inside import ops
    from ranvier.graph.plan.plan import Plan, plan
    from ranvier.graph.run.blocking import BlockingGeneration, BlockingRun, start
    from ranvier.graph.run.launch import launch
    from ranvier.graph.run.run import Run
    from ranvier.graph.sessions.generation import Generation, Result, Token
    from ranvier.graph.trace.frames import trace
    from ranvier.graph.training.init_model import initialise
    from ranvier.graph.training.trainer import Trained, train
    from ranvier.transport.format.errors import (
        KeyFileError,
        LinkBroken,
        LinkClosed,
        ProtocolError,
        RanvierError,
        ResourceError,
    )
    from ranvier.transport.format.header import Row
    from ranvier.transport.format.tensor_spec import TensorSpec

__version__ = "0.1.0"

# Imported on first use: `import ranvier` must not take the second that torch needs.
_MODULES = {
    "Actor": "actors.component.actor", "Batch": "actors.component.actor", "Context": "actors.component.actor",
    "RowsFailed": "actors.component.actor",
    "ActorFailed": "actors.errors", "CheckpointError": "actors.errors", "Expired": "actors.errors",
    "Overloaded": "actors.errors",
    "balancing_loss": "actors.component.routing", "gather": "actors.component.routing", "scatter": "actors.component.routing",
    "Sampling": "actors.component.session", "SessionInfo": "actors.component.session",
    "BlockingGeneration": "graph.run.blocking", "BlockingRun": "graph.run.blocking", "start": "graph.run.blocking",
    "Graph": "graph.check.checked", "load": "graph.check.check",
    "GraphError": "graph.file.errors", "RequestError": "graph.file.errors",
    "Plan": "graph.plan.plan", "plan": "graph.plan.plan",
    "Generation": "graph.sessions.generation", "Result": "graph.sessions.generation", "Token": "graph.sessions.generation",
    "Run": "graph.run.run", "launch": "graph.run.launch",
    "trace": "graph.trace.frames",
    "train": "graph.training.trainer", "Trained": "graph.training.trainer", "initialise": "graph.training.init_model",
    "LinkBroken": "transport.format.errors", "LinkClosed": "transport.format.errors",
    "ProtocolError": "transport.format.errors", "RanvierError": "transport.format.errors",
    "ResourceError": "transport.format.errors", "KeyFileError": "transport.format.errors",
    "Row": "transport.format.header",
    "TensorSpec": "transport.format.tensor_spec",
}  # fmt: skip

__all__ = [
    "Actor", "ActorFailed", "Batch", "BlockingGeneration", "BlockingRun", "CheckpointError", "Context", "Expired", "Generation",
    "Graph", "GraphError", "KeyFileError", "LinkBroken", "LinkClosed", "Overloaded", "Plan", "ProtocolError", "RanvierError",
    "RequestError", "ResourceError", "Result", "Row", "RowsFailed", "Run",
    "Sampling", "SessionInfo", "TensorSpec", "Token", "Trained", "balancing_loss", "gather", "initialise", "launch",
    "load", "ops", "plan", "scatter", "start", "trace", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("ranvier.graph.inside.ops")
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'ranvier' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ranvier.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
