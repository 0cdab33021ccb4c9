"""Hold tensors by their place in the model (tensor_places.py names it) and by token, and measure how far two of them differ.

A token is identified by the number of its session (1, 2, … in each run) and by its position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ranvier.actors.component import inside
from ranvier.transport.format.header import Row

Order = tuple[float, int, bool]
"""Depth in the model, part of that depth, whether the place is at a receiving end."""
GIVEN, ENCODER, LAST = -1e6, -1e3, 1e6
"""Depths: of what the gateway sends for each step, of the first layer of an encoder, of what is made from the last
layer."""


HIDDEN, ENCODER_HIDDEN = inside.HIDDEN, "encoder hidden"
"""Tensors between layers. They belong to the layer that they enter."""


class Place(NamedTuple):
    """Name a place in a model: a tensor, its layer if it has one, and an end of an edge.

    `sent` is true at the sending end of an edge or inside an actor, else false.
    """

    layer: int | None
    tensor: str
    sent: bool

    @property
    def name(self) -> str:
        """Return the place in words, without its end: "hidden 3", "layer 2 query", "logits"."""
        between = self.between and self.layer is not None
        return f"{self.tensor} {self.layer}" if between else inside.Place(self.tensor, self.layer).name

    @property
    def between(self) -> bool:
        """Return whether the tensor goes from one layer to the next."""
        return self.tensor in (HIDDEN, ENCODER_HIDDEN)


class TokenKey(NamedTuple):
    """Identify a token by its session and its position."""

    session: int
    position: int


@dataclass(slots=True)
class Values:
    """Hold the tensors of one side of a comparison.

    `at` holds vectors by place and token. `order` sorts the places, shallow ones first. `maker` is the actor that made
    the tensor at a place. `takes` holds the places from which an actor receives. `prompt` is the length of each
    session's prompt.
    """

    at: dict[Place, dict[TokenKey, torch.Tensor]] = field(default_factory=dict)
    order: dict[Place, Order] = field(default_factory=dict)
    maker: dict[Place, str] = field(default_factory=dict)
    takes: dict[str, set[Place]] = field(default_factory=dict)
    prompt: dict[int, int] = field(default_factory=dict)
    logs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The longest known token log of each session."""

    def put(
        self, where: tuple[Place, Order], maker: str, sessions: Mapping[int, int], rows: tuple[Row, ...], tensor: torch.Tensor,
        shift: int = 0,
    ) -> None:  # fmt: skip
        """Store the parts of a tensor by token: one part per token, or one per row. `shift` is added to positions."""
        place, order = where
        held = self.at.setdefault(place, {})
        self.order.setdefault(place, order)
        self.maker.setdefault(place, maker)
        by_tokens = tensor.dim() > 0 and len(tensor) == sum(row.tokens for row in rows)
        start = 0
        for index, row in enumerate(rows):
            session = sessions.get(row.session, row.session)
            if by_tokens:
                for offset in range(row.tokens):
                    held[TokenKey(session, row.position + offset + shift)] = tensor[start + offset].flatten()
                start += row.tokens
            elif len(rows) == 1:
                held[TokenKey(session, row.position + shift)] = tensor.flatten()
            else:
                held[TokenKey(session, row.position + shift)] = tensor[index].flatten()

    def moment(self, place: Place, token: TokenKey) -> int:
        """Return when a token was computed at a place, as a number that grows over time.

        The tokens of a prompt are computed together, and each later one separately. An encoder's tokens come before
        both: -1.
        """
        read_first = GIVEN < self.order[place][0] < 0
        return -1 if read_first else max(token.position, self.prompt.get(token.session, 1) - 1)


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure how far two vectors differ.

    `size` is the Euclidean distance divided by the norm of the first vector. It is infinite if the shapes differ or if
    only one vector has NaN or infinity at some index. It is also infinite if the vectors differ and the first is zero.
    For integers it is 1 if they differ, else 0. `index`, `one` and `other` are the element that differs most.
    """

    size: float
    index: int
    one: float
    other: float
    shapes: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """Describe a difference: the place, the token, and its size."""

    place: Place
    token: TokenKey
    by: Measure


def measure(one: torch.Tensor, other: torch.Tensor) -> Measure:
    """Measure how far two vectors differ. Floats of different dtypes are compared in the coarser one."""
    shapes = one.numel(), other.numel()
    if one.shape != other.shape:
        return Measure(math.inf, 0, math.nan, math.nan, shapes)
    if not one.dtype.is_floating_point:
        differs = (one != other).to(torch.float64)
        size = float(differs.any())
    else:
        if one.dtype != other.dtype:  # ignore what the coarser dtype cannot represent
            coarser = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            one, other = one.to(coarser), other.to(coarser)
        wide, wider = one.double(), other.double()
        differs = (wide - wider).abs().nan_to_num(math.inf)
        same = (wide == wider) | (wide.isnan() & wider.isnan())  # equal infinities, too
        differs[same] = 0.0
        norm = float(wide[wide.isfinite()].norm())
        distance = float(differs.norm())
        size = 0.0 if distance == 0 else distance / norm if norm > 0 and math.isfinite(distance) else math.inf
    index = int(differs.argmax()) if differs.numel() else 0
    pair = (float(one[index]), float(other[index])) if one.numel() else (0.0, 0.0)
    return Measure(size, index, *pair, shapes)


def common(one: Values, other: Values) -> list[Place]:
    """Return the places that both have, in order."""
    return sorted(one.at.keys() & other.at.keys(), key=lambda place: (one.order[place], place))


def compare(one: Values, other: Values, threshold: float) -> tuple[Difference | None, dict[Place, float]]:
    """Return the first difference over the threshold, and the largest difference at every place that both have.

    The first difference is the one that was computed first. A prompt is computed before the tokens after it. At the
    same moment, the shallower place comes first. The largest differences are taken up to the first difference's moment.
    """
    first: Difference | None = None
    sizes: dict[Place, list[tuple[int, float]]] = {}
    for place in common(one, other):
        own, theirs = one.at[place], other.at[place]
        sizes[place] = []
        for token in sorted(own.keys() & theirs.keys()):
            found = measure(own[token], theirs[token])
            moment = one.moment(place, token)
            sizes[place].append((moment, found.size))
            if found.size > threshold and (first is None or moment < one.moment(first.place, first.token)):
                first = Difference(place, token, found)
    until = one.moment(first.place, first.token) if first is not None else math.inf
    return first, {
        place: max((size for moment, size in own if moment <= until), default=0.0) for place, own in sizes.items()
    }
