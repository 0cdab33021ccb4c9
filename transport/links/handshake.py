"""Open a link: the sender describes it, and the receiver accepts it or names what differs."""

from __future__ import annotations

from typing import Any

from ..format.header import Control, Verb, control
from .link import LinkSpec


def hello(spec: LinkSpec, graph: str) -> Control:
    """Return the sender's offer.

    `graph` is the hash of the graph that the sender runs. The header carries the wire version.
    """
    return control(spec.edge, Verb.HELLO, graph, spec.name, spec.described(), str(spec.source), str(spec.target))


def objection(spec: LinkSpec | None, graph: str, peer: str, me: str, offer: tuple[Any, ...]) -> str | None:
    """Return why the link cannot be opened, naming both sides, or None if it can.

    Args:
        spec: the link as this side knows it; None if this side has no link for that edge from that peer.
        graph: the hash of the graph this side runs.
        peer: the identity the wire reports.
        me: this side's identity.
        offer: the arguments of the peer's HELLO.
    """
    their_graph, name, tensors, source, target = offer
    if their_graph != graph:
        return f"{me} runs graph {graph}, {peer} runs graph {their_graph}"
    if spec is None:
        return f"{me} has no edge {name!r} from {peer}"
    if (source, target) != (str(spec.source), str(spec.target)) or source != peer:
        return f"edge {spec.name}: {me} expects {spec.source} -> {spec.target}, {peer} offers {source} -> {target}"
    if tensors != spec.described():
        return f"edge {spec.name}: {me} expects {spec.described()}, {peer} offers {tensors}"
    return None
