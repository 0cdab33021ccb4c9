"""Check symbolic dimensions over the whole graph.

Within one actor a name stands for one size, and an edge makes the names at its two ends equal. So a chain of edges may
make two different numbers equal, and no single edge shows this mistake. `tokens` and `rows` are sizes of a message and
are not checked.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ranvier.actors.protocol.host_spec import GATEWAY

from .checked import CheckedActor, CheckedEdge

OF_THE_MESSAGE = ("tokens", "rows")


class Dimension(NamedTuple):
    """Represent a named dimension of an actor, or one number at one end of an edge."""

    actor: str
    dim: str | int
    edge: str = ""


class Conflict(NamedTuple):
    """Represent two different numbers that a chain of edges makes equal. `chain` holds the edges' names."""

    first: Dimension
    second: Dimension
    chain: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"edge {self.first.edge} has size {self.first.dim} at {self.first.actor}, edge {self.second.edge} has size "
            f"{self.second.dim} at {self.second.actor}, and they are one dimension through {'; '.join(self.chain)}; "
            "make them the same"
        )


def conflicts(actors: Mapping[str, CheckedActor], edges: Iterable[CheckedEdge]) -> list[Conflict]:
    """Find the numbers that are connected to a different one. Report the nearest such number, and the edges between."""
    joined: dict[Dimension, list[tuple[Dimension, str]]] = defaultdict(list)
    for edge in edges:
        if edge.target == GATEWAY:
            continue
        target = actors[edge.target].inputs[edge.into].shape
        if edge.source == GATEWAY:  # all edges from one gateway port carry the same tensor
            source: tuple[str | int, ...] = tuple(f"{edge.out}[{index}]" for index in range(len(target)))
        else:
            source = actors[edge.source].outputs[edge.out].shape
        for one, two in zip(source, target, strict=True):
            if one in OF_THE_MESSAGE or two in OF_THE_MESSAGE:
                continue
            ends = [
                Dimension(actor, dim, edge.name if isinstance(dim, int) else "")
                for actor, dim in ((edge.source, one), (edge.target, two))
            ]
            joined[ends[0]].append((ends[1], edge.name))
            joined[ends[1]].append((ends[0], edge.name))
    found: list[Conflict] = []
    blamed: set[frozenset[Dimension]] = set()
    for start in [dimension for dimension in joined if isinstance(dimension.dim, int)]:
        conflict = _nearest(start, joined)
        if conflict is not None and frozenset(conflict[:2]) not in blamed:
            blamed.add(frozenset(conflict[:2]))
            found.append(conflict)
    return found


def _nearest(start: Dimension, joined: Mapping[Dimension, list[tuple[Dimension, str]]]) -> Conflict | None:
    trail: dict[Dimension, tuple[Dimension, str] | None] = {start: None}
    waiting = deque([start])
    while waiting:
        dimension = waiting.popleft()
        if isinstance(dimension.dim, int) and dimension.dim != start.dim:
            chain: list[str] = []
            step = trail[dimension]
            while step is not None:
                chain.append(step[1])
                step = trail[step[0]]
            return Conflict(start, dimension, tuple(dict.fromkeys(reversed(chain))))
        for following, edge in joined[dimension]:
            if following not in trail:
                trail[following] = (dimension, edge)
                waiting.append(following)
    return None
