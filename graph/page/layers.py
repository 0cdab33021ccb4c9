"""Lay a graph out in layers: each actor below those that it takes messages from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SWEEPS = 4


class Arrow(NamedTuple):
    """Represent an edge between two actors, or to or from the gateway. `back`: it closes a loop."""

    source: str
    target: str
    back: bool


def layers(names: Sequence[str], arrows: Sequence[Arrow], first: str) -> list[list[str]]:
    """Return the names in layers, `first` alone in the first one.

    A name's layer is one after the last of those that have an arrow to it. Arrows back do not count, nor do those to `first`,
    nor those that close a loop which the graph does not declare. Within a layer, names stand near the middle of their
    neighbours (the barycentre method of Sugiyama, Tagawa and Toda, 1981).
    """
    before: dict[str, list[str]] = {name: [] for name in names}
    for arrow in arrows:
        if not arrow.back and arrow.target != first and arrow.source != arrow.target:
            before[arrow.target].append(arrow.source)
    depth = _depths(before, first)
    found: list[list[str]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for name in names:
        found[depth[name]].append(name)
    found = [layer for layer in found if layer]
    _sort(found, [arrow for arrow in arrows if first not in (arrow.source, arrow.target)])
    return found


def _depths(before: Mapping[str, Sequence[str]], first: str) -> dict[str, int]:
    depth = {first: 0}
    open_now: set[str] = set()

    def of(name: str) -> int:
        if name not in depth:
            open_now.add(name)
            depth[name] = 1 + max((of(each) for each in before[name] if each not in open_now), default=0)
            open_now.discard(name)
        return depth[name]

    for name in before:
        of(name)
    return depth


def _sort(found: list[list[str]], arrows: Sequence[Arrow]) -> None:
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        order = found if down else found[::-1]
        for above, layer in itertools.pairwise(order):
            places = {name: index for index, name in enumerate(above)}
            own = {name: float(index) for index, name in enumerate(layer)}
            for name in layer:
                near = [
                    places[other]
                    for arrow in arrows
                    for mine, other in ((arrow.target, arrow.source), (arrow.source, arrow.target))
                    if mine == name and other in places
                ]
                if near:
                    own[name] = sum(near) / len(near)
            layer.sort(key=own.__getitem__)
