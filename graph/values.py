"""What was where: the tensors of a run by the place in the model and by token, and by how much two of them differ.

A place is named so that runs that are cut differently have names in common: `hidden 7` is what enters layer 7, whoever made
it. A token is known by its session (the first, the second, … of its run) and its position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ranvier.actors.errors import RecordingError
from ranvier.actors.recording import Recorded, Session, Step, recordings
from ranvier.actors.spec import GATEWAY
from ranvier.transport.header import Row

LAYER = ("query", "key", "value", "attended", "hidden")
"""What a layer makes, in this order."""
GIVEN, ENCODER, LAST = -1e6, -1e3, 1e6
"""Depths: of what the gateway sent, of the first layer of an encoder, of what is made of the last layer."""
Order = tuple[float, int, bool]


class Place(NamedTuple):
    """Where in a model. `sent`: at the sending end of an edge, or inside an actor, else at the receiving end."""

    name: str
    sent: bool


LOGITS, SAMPLED = Place("logits", True), Place("token", True)


def hidden(layer: int, sent: bool = True) -> tuple[Place, Order]:
    """What enters a layer, or leaves the last one."""
    return Place(f"hidden {layer}", sent), (layer, 0, not sent)


def within(layer: int, name: str) -> tuple[Place, Order]:
    """What a layer makes on its way."""
    if name == "hidden":
        return hidden(layer + 1)
    return Place(f"layer {layer} {name}", True), (layer, 1 + LAYER.index(name) if name in LAYER else 1, False)


class Token(NamedTuple):
    session: int
    position: int


@dataclass(slots=True)
class Values:
    """`at` holds vectors by place and token, `order` puts the places in order, the shallow ones first; `maker` is the actor
    that made what is there, `takes` are the places from which an actor takes. `prompt` says how long each session's was."""

    at: dict[Place, dict[Token, torch.Tensor]] = field(default_factory=dict)
    order: dict[Place, Order] = field(default_factory=dict)
    maker: dict[Place, str] = field(default_factory=dict)
    takes: dict[str, set[Place]] = field(default_factory=dict)
    prompt: dict[int, int] = field(default_factory=dict)
    logs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The longest that is known of each session."""

    def put(
        self, where: tuple[Place, Order], maker: str, sessions: Mapping[int, int], rows: tuple[Row, ...], tensor: torch.Tensor,
        shift: int = 0,
    ) -> None:  # fmt: skip
        """The parts of a tensor, by the tokens of its rows: one each, or one for a row; `shift` is added to positions."""
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
                    held[Token(session, row.position + offset + shift)] = tensor[start + offset].flatten()
                start += row.tokens
            elif len(rows) == 1:
                held[Token(session, row.position + shift)] = tensor.flatten()
            else:
                held[Token(session, row.position + shift)] = tensor[index].flatten()

    def moment(self, token: Token) -> int:
        """Tokens of a prompt are computed together; each one after it by itself."""
        return max(token.position, self.prompt.get(token.session, 1) - 1)


@dataclass(frozen=True, slots=True)
class Difference:
    """`size`: the Euclidean distance over the norm of the first (infinite where shapes differ, or one has NaN); of whole
    numbers 1 if they differ. `index`, `one` and `other`: the element that differs most."""

    place: Place
    token: Token
    size: float
    index: int
    one: float
    other: float
    shapes: tuple[int, int]


def difference(place: Place, token: Token, one: torch.Tensor, other: torch.Tensor) -> Difference:
    if one.shape != other.shape:
        return Difference(place, token, math.inf, 0, math.nan, math.nan, (one.numel(), other.numel()))
    if not one.dtype.is_floating_point:
        differs = (one != other).to(torch.float64)
        size = float(differs.any())
    else:
        if one.dtype != other.dtype:  # what the coarser one cannot say is no difference
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
    return Difference(place, token, size, index, *pair, (one.numel(), other.numel()))


def common(one: Values, other: Values) -> list[Place]:
    """The places that both have, in order."""
    return sorted(one.at.keys() & other.at.keys(), key=lambda place: (one.order[place], place))


def compare(one: Values, other: Values, threshold: float) -> tuple[Difference | None, dict[Place, float]]:
    """The first difference over the threshold, and the largest of every place that both have, up to its moment.

    First is what was computed first: a prompt before the tokens after it, and of one moment what is less deep.
    """
    first: Difference | None = None
    sizes: dict[Place, list[tuple[int, float]]] = {}
    for place in common(one, other):
        own, theirs = one.at[place], other.at[place]
        sizes[place] = []
        for token in sorted(own.keys() & theirs.keys()):
            found = difference(place, token, own[token], theirs[token])
            sizes[place].append((one.moment(token), found.size))
            if found.size > threshold and (first is None or one.moment(token) < one.moment(first.token)):
                first = found
    until = one.moment(first.token) if first is not None else math.inf
    return first, {
        place: max((size for moment, size in own if moment <= until), default=0.0) for place, own in sizes.items()
    }


# -- of a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """What is to be known of an actor. `index`: its place in the pipeline; `depth`: how many layers lie before it."""

    name: str
    layers: tuple[int, int] | None
    index: int
    depth: int


@dataclass(frozen=True, slots=True)
class Edge:
    name: str
    source: str
    out: str
    target: str
    into: str
    codec: str
    feedback: bool


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run folder with recordings."""

    folder: Path
    hosts: Mapping[str, list[Recorded]]
    """Its replicas, and those that were in their place before, by actor, in the order of the pipeline."""
    kinds: Mapping[str, Kind]
    edges: tuple[Edge, ...]
    sessions: Mapping[int, int]
    """By their number in the run: the same prompts have the same number in another."""

    @property
    def cut(self) -> Mapping[str, tuple[str, tuple[int, int] | None]]:
        """Which actor is what."""
        return {actor: (kind.name, kind.layers) for actor, kind in self.kinds.items()}

    def values(self) -> Values:
        """All that was recorded of its edges."""
        made = Values()
        for recorded in self.all():
            for event in recorded.events():
                if isinstance(event, Session):
                    number, log = self.sessions[event.info.session], event.info.log
                    made.prompt[number] = min(made.prompt.get(number, len(log)), len(log))
                    made.logs[number] = max(made.logs.get(number, ()), log, key=len)
                elif isinstance(event, Step):
                    self._put(made, recorded.host.actor, event)
        return made

    def _put(self, made: Values, actor: str, step: Step) -> None:
        for port, batch in step.inputs.items():
            place, order, maker = self.taken(actor, port)
            made.put((place, order), maker, self.sessions, batch.rows, batch[port])
            made.takes.setdefault(actor, set()).add(place)
        for port, batch in step.outputs.items():
            if port == "sampled" and self.kinds[actor].name in _HEADS:  # made of the position before it
                made.put((SAMPLED, (LAST, 2, False)), actor, self.sessions, batch.rows, batch[port], shift=-1)
            elif port not in ("token", "logits") or self.kinds[actor].name not in _HEADS:
                made.put(self.made(actor, port), actor, self.sessions, batch.rows, batch[port])

    def made(self, actor: str, port: str, sent: bool = True) -> tuple[Place, Order]:
        """Where an output is; `sent` or not: at its other end."""
        kind = self.kinds[actor]
        if port == "hidden" and kind.name in _ENCODERS:
            layer = kind.layers[1] + 1 if kind.layers is not None else 0
            return Place(f"encoder hidden {layer}", sent), (ENCODER + layer, 0, not sent)
        if port == "hidden" and kind.name == "embedding":
            return hidden(0, sent)
        if port == "hidden" and kind.name in _LAYERED and kind.layers is not None:
            return hidden(kind.layers[1] + 1, sent)
        if kind.name in _HEADS:
            return Place(port, sent), (LAST, 3, not sent)
        return Place(f"{actor}.{port}", sent), (self._depth(actor), LAST_PART, not sent)

    def taken(self, actor: str, port: str) -> tuple[Place, Order, str]:
        """Where an input is, and who made it: it is called as at its other end."""
        into = [edge for edge in self.edges if (edge.target, edge.into) == (actor, port)]
        edge = min(into, key=lambda edge: edge.feedback, default=None)
        if edge is None or edge.source == GATEWAY:
            return Place(port, False), (GIVEN, 0, True), GATEWAY
        return *self.made(edge.source, edge.out, sent=False), edge.source

    def inside(self, actor: str, layer: int | None, name: str, seen: int) -> tuple[Place, Order]:
        """Where a tensor inside of an actor is; `seen`: how many names came before it."""
        if layer is not None:
            return within(layer, name)
        if name == "embedding":
            return hidden(0)
        if name == "logits":
            return LOGITS, (LAST, 1, False)
        return Place(f"{actor}.{name}", True), (self._depth(actor), 1 + seen, False)

    def _depth(self, actor: str) -> float:
        kind = self.kinds[actor]
        return (kind.layers[0] if kind.layers is not None else kind.depth) + (1 + kind.index) * 1e-4

    def all(self) -> Iterator[Recorded]:
        for hosts in self.hosts.values():
            yield from hosts


_ENCODERS = ("encoder_embedding", "encoder")
_LAYERED = ("blocks", "first_stage", "last_stage", "combine", "decoder")
_HEADS = ("head", "last_stage", "model")
LAST_PART = 1 << 20


def read(folder: Path) -> RecordedRun:
    """
    Raises:
        RecordingError: nothing was recorded there, or it is no run folder.
    """
    try:
        plan = json.loads((folder / "plan.json").read_text())
        edges = tuple(_edge(edge) for edge in plan["edges"])
        kinds = _kinds(plan["hosts"], edges)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise RecordingError(f"{folder}: no run folder: {type(error).__name__}: {error}") from None
    by_actor: dict[str, list[Recorded]] = {}
    for recorded in recordings(folder):
        if recorded.host.actor not in kinds:
            raise RecordingError(f"{recorded.folder}: {recorded.host.actor} is no actor of {folder / 'plan.json'}")
        by_actor.setdefault(recorded.host.actor, []).append(recorded)
    return RecordedRun(
        folder, {actor: by_actor[actor] for actor in kinds if actor in by_actor}, kinds, edges, _numbered(by_actor)
    )


def _numbered(by_actor: Mapping[str, Iterable[Recorded]]) -> dict[int, int]:
    """Sessions from 1 on, by their prompts, and those of the same prompt in the order in which they came: what is asked at once
    comes in another order each time."""
    prompts: dict[int, tuple[int, ...]] = {}
    for hosts in by_actor.values():
        for recorded in hosts:
            for session, log in recorded.sessions:
                prompts[session] = min(prompts.get(session, log), log, key=len)
    ordered = sorted(prompts, key=lambda session: (prompts[session], session))
    return {session: number for number, session in enumerate(ordered, 1)}


def _edge(plain: Mapping[str, Any]) -> Edge:
    source, target = plain["name"].split(" -> ")
    (source, out), (target, into) = source.split("."), target.split(".")
    return Edge(plain["name"], source, out, target, into, plain["codec"], plain["feedback"])


def _kinds(hosts: Sequence[Mapping[str, Any]], edges: Sequence[Edge]) -> dict[str, Kind]:
    """The actors, each after those that it hears of, but for what is fed back."""
    left = {host["actor"]: host for host in hosts}
    made: dict[str, Kind] = {}
    depth = 0
    while left:
        waits = {
            edge.target for edge in edges if not edge.feedback and edge.source in left and edge.source != edge.target
        }
        actor = next((actor for actor in left if actor not in waits), next(iter(left)))
        host = left.pop(actor)
        layers = (host["layers"][0], host["layers"][1]) if host["layers"] is not None else None
        made[actor] = Kind(host["kind"], layers, len(made), depth)
        if layers is not None and host["kind"] not in _ENCODERS:
            depth = max(depth, layers[1] + 1)
    return made
