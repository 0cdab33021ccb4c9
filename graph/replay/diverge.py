"""Find where two runs, or a run and the transformers reference, first differ.

Compare the recorded edges first. Then replay the actors between the last place that agrees and the first that differs,
and compare the tensors inside them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ranvier.actors.errors import RecordingError
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.trace.recording_reader import Recorded
from ranvier.transport.format.header import Row

from . import reference, replay
from .tensor_places import RecordedRun, read
from .values import Difference, Place, Values, common, compare

THRESHOLDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest difference that rounding over all layers explains, with a margin, by the coarser dtype of the two sides."""
ALIKE = {"float32": 1e-5, "float16": 2e-4, "bfloat16": 1e-3}
"""The same for two runs that compute in the same way: where their batches differ, a few last bits differ."""


@dataclass(frozen=True, slots=True)
class Side:
    """Represent one side of the comparison: a run, or the reference for the other side's tokens (then `run` is None)."""

    name: str
    run: RecordedRun | None
    values: Values


@dataclass(frozen=True, slots=True)
class Divergence:
    """Describe where two sides first differ; `first` is None if they agree.

    `session` is the number that the session has in the run. `actor` is the actor that causes the difference, or `edge`
    is the edge. `layer` is None if the difference is in no layer. `largest` holds the largest difference by place, in
    order. `what` is the answer in words, and `notes` are remarks on it.
    """

    first: Difference | None
    session: int | None
    actor: str | None
    edge: str | None
    layer: int | None
    what: str
    threshold: float
    largest: Mapping[Place, float]
    tokens: int
    notes: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        first = self.first
        return {
            "differ": first is not None,
            "actor": self.actor,
            "edge": self.edge,
            "layer": self.layer,
            "tensor": first.place.name if first is not None else None,
            "session": self.session,
            "position": first.token.position if first is not None else None,
            "index": first.by.index if first is not None else None,
            "size": _number(first.by.size) if first is not None else 0.0,
            "values": [_number(first.by.one), _number(first.by.other)] if first is not None else None,
            "what": self.what,
            "threshold": self.threshold,
            "places": [
                {"place": place.name, "sent": place.sent, "size": _number(size)} for place, size in self.largest.items()
            ],
            "tokens": self.tokens,
            "notes": list(self.notes),
        }  # fmt: skip


def _number(value: float) -> float | str:
    """Return NaN and infinity as strings, because JSON has no such numbers."""
    return value if math.isfinite(value) else str(value)


def diverge(
    first: Path,
    second: Path | None,
    threshold: float | None,
    model: Path | None,
    progress: Callable[[str, float], None],
) -> Divergence:
    """Compare a run with another one, or with the reference.

    Args:
        first: a run folder.
        second: another run folder; None: the reference.
        threshold: the largest difference that is ignored; None: what rounding explains.
        model: the checkpoint of the reference; None: that of the first run.
        progress: called with the name of the current phase, and the share of it that is finished.

    Raises:
        RecordingError: a tensor that the comparison needs was not recorded.
    """
    progress("reading", 0.0)
    run = read(first)
    one = Side(str(first), run, run.values())
    if second is not None:
        other_run = read(second)
        other = Side(str(second), other_run, other_run.values())
    else:
        progress("computing the reference", 0.0)
        other = Side(reference.NAME, None, reference.values(run, one.values, model))
    return _found(one, other, _threshold(one, other) if threshold is None else threshold, progress)


def _threshold(one: Side, other: Side) -> float:
    """Return the largest difference that rounding explains.

    It is small between two runs that are cut alike and compute with the same dtype, precision and products. The cut
    matters because each edge rounds to its dtype what an actor keeps in float32.
    """
    ways = {
        (recorded.host.dtype, recorded.host.precision, recorded.host.fast)
        for side in (one, other) if side.run is not None
        for hosts in side.run.hosts.values() for recorded in hosts
    }  # fmt: skip
    alike = len(ways) == 1 and one.run is not None and other.run is not None and one.run.cut == other.run.cut
    return max((ALIKE if alike else THRESHOLDS)[dtype] for dtype, *_ in ways)


def _found(one: Side, other: Side, threshold: float, progress: Callable[[str, float], None]) -> Divergence:
    notes = [
        f"the recording of {recorded.name} of {side.name} ends early: {recorded.ends_early}"
        for side in (one, other) if side.run is not None
        for recorded in side.run.all() if recorded.ends_early
    ]  # fmt: skip
    found, largest = compare(one.values, other.values, threshold)
    edge = _edge(one, other, found)
    if edge is None and (found is None or not _given(one, found.place)):
        _look_inside(one, other, found, notes, progress)
        found, largest = compare(one.values, other.values, threshold)
    tokens = len({token for place in largest for token in one.values.at[place].keys() & other.values.at[place].keys()})
    if not tokens:
        raise RecordingError(
            f"{one.name} and {other.name} have nothing in common to compare; record all edges of both, with the same prompts"
        )
    place = found.place if found is not None else None
    actor = None
    if place is not None and edge is None and not _given(one, place):
        own = one if one.run is not None else other
        actor = (own.values.maker if place in own.values.maker else other.values.maker).get(place)
    session = _number_of(one, other, found.token.session) if found is not None else None
    what = _words(one, other, found, session, actor, edge, threshold, len(largest), tokens)
    layer = _layer(place) if actor is not None else None
    return Divergence(found, session, actor, edge, layer, what, threshold, largest, tokens, tuple(notes))


def _given(one: Side, place: Place) -> bool:
    """Return whether the gateway, not an actor, made the tensor at a place."""
    return one.values.maker[place] == GATEWAY


def _edge(one: Side, other: Side, found: Difference | None) -> str | None:
    """Return the edge that causes the difference: both sides sent the same values, but received different ones."""
    if found is None or found.place.sent or _given(one, found.place):
        return None
    sent = found.place._replace(sent=True)
    if not all(found.token in side.values.at.get(sent, {}) for side in (one, other)):
        return None
    for side in (other, one):
        if side.run is not None:
            for edge in side.run.edges:
                if edge.source != GATEWAY and side.run.made(edge.source, edge.out)[0] == sent:
                    return edge.name
    return None


def _look_inside(
    one: Side, other: Side, found: Difference | None, notes: list[str], progress: Callable[[str, float], None]
) -> None:
    """Replay the actors between the last place that agrees and the first that differs, and store their inner tensors.

    Without a difference, replay the actors after the last common place, because no edge carries their logits.
    """
    orders = one.values.order
    ends = orders[found.place] if found is not None else (math.inf, 0, False)
    before = [orders[place] for place in common(one.values, other.values) if not place.sent and orders[place] < ends]
    begins = before[-1] if before else (-math.inf, 0, False)
    for side in (one, other):
        if side.run is None:
            continue
        recorded_places = frozenset(side.values.at)
        for actor, hosts in side.run.hosts.items():
            order = side.values.order
            takes = min((order[place] for place in side.values.takes.get(actor, ())), default=begins)
            makes = max((order[place] for place, who in side.values.maker.items() if who == actor), default=ends)
            if makes > begins and takes < ends:
                for recorded in hosts:
                    _replay(side, side.run, recorded, recorded_places, notes, progress)


def _replay(
    side: Side, run: RecordedRun, recorded: Recorded, recorded_places: frozenset[Place], notes: list[str],
    progress: Callable[[str, float], None],
) -> None:  # fmt: skip
    actor = recorded.host.actor
    seen: dict[str, int] = {}

    def look(layer: int | None, name: str, rows: tuple[Row, ...], tensor: torch.Tensor) -> None:
        where = run.inside(actor, layer, name, seen.setdefault(f"{layer} {name}", len(seen)))
        if where[0] not in recorded_places:
            side.values.put(where, actor, run.sessions, rows, tensor.clone())

    again = f"replaying {actor}"
    worst = 0.0
    try:
        for count, taken in enumerate(replay.steps(recorded, functools.partial(progress, again), look), 1):
            worst = max([worst, *(mismatch.size for mismatch in replay.mismatches(taken))])
            progress(again, count / max(1, recorded.steps))
    except RecordingError as error:  # the comparison of its edges still holds
        notes.append(f"{side.name}: its layers cannot be compared: {error}")
    if worst > 0:
        notes.append(
            f"{recorded.name} of {side.name}: its replay differs from the run by {worst:.2g}; differences in its layers are "
            "those of the replay"
        )


def _layer(place: Place | None) -> int | None:
    if place is None or place.layer is None or not place.between:
        return place.layer if place is not None else None
    return place.layer - 1 if place.layer else None  # the layer that made it


def _words(
    one: Side, other: Side, found: Difference | None, session: int | None, actor: str | None, edge: str | None,
    threshold: float, places: int, tokens: int,
) -> str:  # fmt: skip
    if found is None:
        return f"no difference over {threshold:.2g} in {places} places of {tokens} tokens"
    where, by = f"session {session}, position {found.token.position}", found.by
    if by.shapes[0] != by.shapes[1]:
        size = f"{by.shapes[0]} values against {by.shapes[1]}"
    elif found.place.name.endswith("token"):
        size = f"{by.one:g} against {by.other:g}"
    else:
        size = f"{by.size:.2g} of its norm; number {by.index}: {by.one:.6g} against {by.other:.6g}"
    if edge is not None:
        codecs = " against ".join(_codec(side, edge) for side in (one, other))
        return f"edge {edge} changes what goes over it (codec {codecs}): {found.place.name}, {where}: {size}"
    if _given(one, found.place):
        return f"the inputs already differ: {found.place.name}, {where}: {size}"
    layer = _layer(found.place)
    of = f", layer {layer}" if layer is not None else ""
    return f"actor {actor}{of}: {found.place.name} is the first that differs: {where}: {size}"


def _number_of(one: Side, other: Side, session: int) -> int:
    """Return the number that a session has in the run."""
    run = one.run or other.run
    assert run is not None
    return next(number for number, own in run.sessions.items() if own == session)


def _codec(side: Side, edge: str) -> str:
    codecs = {known.name: known.codec for known in side.run.edges} if side.run is not None else {}
    return codecs.get(edge, "no such edge")


def table(found: Divergence, sides: Sequence[str]) -> str:
    """Format the result for people: the answer, then the largest difference at each place."""
    lines = [found.what, *found.notes, "", f"{'place':<34}{'largest difference':>20}"]
    for place, size in found.largest.items():
        end = "" if place.sent else " (as received)"
        mark = "  <- first" if found.first is not None and place == found.first.place else ""
        lines.append(f"{place.name + end:<34}{size:>20.2g}{mark}")
    lines += ["", f"{sides[0]} against {sides[1]}; threshold {found.threshold:.2g}, {found.tokens} tokens"]
    return "\n".join(lines)
