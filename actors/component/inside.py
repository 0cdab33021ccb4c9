"""Say what a request reads and changes inside a model, as plain data without torch. It travels in `SessionInfo`.

A place is a tensor of a layer, named as `ranvier diverge` names it: `hidden 7` enters layer 7, or leaves the last layer;
`layer 3 query` is made in layer 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

HIDDEN, LOGITS, READS = "hidden", "logits", "reads"
"""Two kinds of places, and the port over which actors send to the gateway what requests read."""
PATTERN = "pattern"
"""Names what a layer's attention gives to each position: for each head, numbers that add up to 1."""
IN_LAYER = ("query", "key", "value", PATTERN, "heads", "attention", "attended", "mlp")
"""Places inside a layer, in the order in which it makes them.

Queries and keys are those after norms and rotation. `heads` is what the heads have gathered, `attention` what the layer adds to
the residual for it, `attended` the residual after that, and `mlp` what the feed-forward part adds. The actor runs the sessions
that ask for these places through torch, and the others through its kernels.
"""
Spans = tuple[tuple[int, int | None], ...]
"""Positions, as pairs of the first one and the one after the last; None: no end."""


@dataclass(frozen=True, slots=True)
class Place:
    """Name a tensor inside a model. `layer` is None for a tensor outside the layers."""

    tensor: str
    layer: int | None = None

    @property
    def name(self) -> str:
        """Return the place in words."""
        if self.layer is None:
            return self.tensor
        return f"{HIDDEN} {self.layer}" if self.tensor == HIDDEN else f"layer {self.layer} {self.tensor}"


@dataclass(frozen=True, slots=True)
class Read:
    """Ask for the values of a place at some positions. `shape` is that of one position."""

    place: Place
    spans: Spans
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Return how many numbers each position has."""
        return math.prod(self.shape)

    def count(self, positions: int) -> int:
        """Return how many of the first `positions` positions are read."""
        return sum(end - start for start, end in within(self.spans, 0, positions))


@dataclass(frozen=True, slots=True)
class Edit:
    """Change the values x of a place at some positions.

    `operation`: `add` (x + number · v), `scale` (number · x), `set` (v), `zero`, `project_out` (x without its part along v), or
    `clamp` (the part along v, in units of its length, between `least` and `most`). `values` holds `rows` vectors v as float32
    bytes. A single one belongs to all positions; of several, each belongs to the next position of the spans. `columns` are the
    first number and the one after the last that are changed; without them, all are.
    """

    place: Place
    spans: Spans
    operation: str
    values: bytes = b""
    rows: int = 0
    number: float = 1.0
    least: float = 0.0
    most: float = 0.0
    columns: tuple[tuple[int, int], ...] = ()


def within(spans: Spans, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the part of each span that lies between two positions, in the order of the spans."""
    for first, stop in spans:
        low, high = max(first, start), end if stop is None else min(stop, end)
        if low < high:
            yield low, high
