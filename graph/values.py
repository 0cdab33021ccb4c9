"""What was where: the tensors of a run by the place in the model and by token, and by how much two of them differ.

A place is named so that runs that are cut differently have names in common: `hidden 7` is what enters layer 7, whoever made
it. A token is known by its session (the first, the second, … of its run) and its position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ranvier.actors.actor import Batch
from ranvier.actors.errors import RecordingError
from ranvier.actors.recording import Recorded, Session, Step, recordings
from ranvier.transport.header import Row

ORDER = ("query", "key", "value", "attended", "hidden")
"""What a layer makes, in this order."""


class Place(NamedTuple):
    """Where in a model: `depth` and `part` put places in order; `sent` is at the sending end of an edge, or inside an actor,
    else at the receiving end."""

    depth: int
    part: int
    name: str
    sent: bool

    @property
    def order(self) -> tuple[int, int, bool]:
        return self.depth, self.part, not self.sent


class Token(NamedTuple):
    session: int
    position: int


@dataclass(slots=True)
class Values:
    """`at` holds vectors by place and token; `who` the actor that a place belongs to; `prompt` how long each session's was."""

    at: dict[Place, dict[Token, torch.Tensor]] = field(default_factory=dict)
    who: dict[Place, str] = field(default_factory=dict)
    prompt: dict[int, int] = field(default_factory=dict)

    def put(
        self, place: Place, who: str, sessions: Mapping[int, int], rows: tuple[Row, ...], tensor: torch.Tensor
    ) -> None:
        """The parts of a tensor, by the tokens of its rows: one each, or one for a row."""
        held = self.at.setdefault(place, {})
        self.who.setdefault(place, who)
        by_tokens = tensor.dim() > 0 and len(tensor) == sum(row.tokens for row in rows)
        start = 0
        for index, row in enumerate(rows):
            session = sessions.get(row.session, row.session)
            if by_tokens:
                for offset in range(row.tokens):
                    held[Token(session, row.position + offset)] = tensor[start + offset].flatten()
                start += row.tokens
            elif len(rows) == 1:
                held[Token(session, row.position)] = tensor.flatten()
            else:
                held[Token(session, row.position)] = tensor[index].flatten()

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
        norm = float(wide.norm())
        distance = float(differs.norm())
        size = 0.0 if distance == 0 else distance / norm if norm > 0 and math.isfinite(distance) else math.inf
    index = int(differs.argmax()) if differs.numel() else 0
    pair = (float(one[index]), float(other[index])) if one.numel() else (0.0, 0.0)
    return Difference(place, token, size, index, *pair, (one.numel(), other.numel()))


def compare(one: Values, other: Values, threshold: float) -> tuple[Difference | None, dict[Place, float]]:
    """The first difference over the threshold, and the largest of every place that both have, up to its moment.

    First is what was computed first: a prompt before the tokens after it, and of one moment what is less deep.
    """
    first: Difference | None = None
    sizes: dict[Place, list[tuple[int, float]]] = {}
    for place in sorted(one.at.keys() & other.at.keys(), key=lambda place: place.order):
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
class RecordedRun:
    """A run folder with recordings. `deep`: how many layers the model has; `codecs`: by edge."""

    folder: Path
    hosts: Mapping[str, list[Recorded]]
    """Its replicas, and those that were in their place before, by actor, in the order of the pipeline."""
    kinds: Mapping[str, tuple[str, tuple[int, int] | None]]
    deep: int
    codecs: Mapping[str, str]
    sessions: Mapping[int, int]

    def values(self) -> Values:
        """All that was recorded of its edges."""
        made = Values()
        for recorded in self._all():
            for event in recorded.events():
                if isinstance(event, Session):
                    made.prompt.setdefault(self.sessions[event.info.session], len(event.info.log))
                elif isinstance(event, Step):
                    self._put(made, recorded, event)
        return made

    def _put(self, made: Values, recorded: Recorded, step: Step) -> None:
        actor = recorded.host.actor
        for sent, side in ((False, step.inputs), (True, step.outputs)):
            for port, batch in side.items():
                if port != "sampled":  # which is the token that goes back
                    self.put(made, actor, port, sent, batch)

    def put(self, made: Values, actor: str, port: str, sent: bool, batch: Batch) -> None:
        made.put(self.place(actor, port, sent), actor, self.sessions, batch.rows, batch[port])

    def place(self, actor: str, port: str, sent: bool) -> Place:
        """Where the tensors of a port are."""
        kind, layers = self.kinds[actor]
        depth = None
        if port in ("token", "logits") and kind in _TEXT:
            return Place(self.deep + 1, 2, port, sent) if sent else Place(-1, 0, port, sent)
        if port == "hidden" and kind in _TEXT:
            if kind == "embedding":
                depth = 0
            elif kind == "head":
                depth = self.deep
            elif layers is not None:
                depth = layers[1] + 1 if sent else layers[0]
        if depth is not None:
            return Place(depth, 0, f"hidden {depth}", sent)
        order = list(self.hosts).index(actor) if actor in self.hosts else 0
        return Place(layers[0] if layers is not None else order, 1 + sent, f"{actor}.{port}", sent)

    def inside(self, actor: str, layer: int | None, name: str, seen: int) -> Place:
        """Where a tensor inside of an actor is; `seen`: how many names came before it."""
        if layer is not None and name == "hidden":
            return Place(layer + 1, 0, f"hidden {layer + 1}", True)
        if layer is not None:
            return Place(layer, 1 + ORDER.index(name) if name in ORDER else 1, f"layer {layer} {name}", True)
        if name == "embedding":
            return Place(0, 0, "hidden 0", True)
        if name == "logits":
            return Place(self.deep + 1, 1, "logits", True)
        return Place(list(self.hosts).index(actor), 1, f"{actor}.{name}", True)._replace(part=-1000 + seen)

    def _all(self) -> Iterator[Recorded]:
        for hosts in self.hosts.values():
            yield from hosts


_TEXT = ("embedding", "blocks", "head", "first_stage", "last_stage", "model")


def read(folder: Path) -> RecordedRun:
    """
    Raises:
        RecordingError: nothing was recorded there.
    """
    try:
        plan: Mapping[str, Any] = json.loads((folder / "plan.json").read_text())
    except (OSError, ValueError) as error:
        raise RecordingError(f"{folder}: no run folder: {error}") from None
    by_actor: dict[str, list[Recorded]] = {}
    for recorded in recordings(folder):
        by_actor.setdefault(recorded.host.actor, []).append(recorded)
    kinds = {host["actor"]: (host["kind"], _layers(host["layers"])) for host in plan["hosts"]}
    opened = {info.session for hosts in by_actor.values() for recorded in hosts for info in recorded.sessions()}
    numbers = {session: index for index, session in enumerate(sorted(opened), 1)}
    return RecordedRun(
        folder,
        {actor: by_actor[actor] for actor in _in_order(plan) if actor in by_actor},
        kinds,
        max((layers[1] + 1 for _, layers in kinds.values() if layers is not None), default=0),
        {edge["name"]: edge["codec"] for edge in plan["edges"]},
        numbers,
    )


def _layers(plain: list[int] | None) -> tuple[int, int] | None:
    return (plain[0], plain[1]) if plain is not None else None


def _in_order(plan: Mapping[str, Any]) -> list[str]:
    """The actors, each after those that it hears of, but for what is fed back."""
    left = [host["actor"] for host in plan["hosts"]]
    arrows = {
        (edge["name"].split(".")[0], edge["name"].split("-> ")[1].split(".")[0])
        for edge in plan["edges"]
        if not edge["feedback"]
    }
    made: list[str] = []
    while left:
        free = [
            actor
            for actor in left
            if not any(source in left and source != actor for source, to in arrows if to == actor)
        ]
        made += free or left[:1]
        left = [actor for actor in left if actor not in made]
    return made
