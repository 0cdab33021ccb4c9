"""Find the edges between actors and the gateway that a graph file need not list."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.component.inside import READS
from ranvier.actors.protocol.host_spec import GATEWAY

from .checked import CheckedActor, CheckedEdge

PROMPTS = 256
"""Credit in messages for edges from the gateway. Prompt messages are small, and those that wait can share one step."""


def gateway_edges(
    actors: Collection[CheckedActor], listed: Iterable[CheckedEdge], checkpoint: Checkpoint | None
) -> list[CheckedEdge]:
    """Return the implied edges to and from the gateway. Those over which requests read inside the model come last."""
    given = {(edge.source, edge.out, edge.target, edge.into) for edge in listed}
    generates = any(actor.kind.ends for actor in actors)
    reads = checkpoint is not None and checkpoint.config.offers_places and generates
    implied = [
        edge
        for actor in actors
        for edge in _of(actor)
        if (edge.source, edge.out, edge.target, edge.into) not in given and (edge.out != READS or reads)
    ]
    return sorted(implied, key=lambda edge: edge.out == READS)


def _of(actor: CheckedActor) -> Iterator[CheckedEdge]:
    for port in actor.kind.from_gateway:
        spec = actor.inputs[port]
        yield CheckedEdge(GATEWAY, port, actor.name, port, spec, implied=True, credits_messages=PROMPTS)
    for port in actor.kind.to_gateway:
        yield CheckedEdge(actor.name, port, GATEWAY, port, actor.outputs[port], implied=True)
