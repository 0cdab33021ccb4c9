"""Name the places of a recorded run: where in the model each of its tensors is, according to its plan.

Runs that are cut differently share these names: `hidden 7` is what enters layer 7, whichever actor made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranvier.actors.component.kinds import BUILT_IN, Kind
from ranvier.actors.errors import RecordingError
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.trace.recording_reader import Recorded, RecordedStep, Session, recordings

from ..file.edge_end import ends
from ..trace.trace_lines import TraceError, read_plan
from .values import ENCODER, ENCODER_HIDDEN, GIVEN, HIDDEN, LAST, Order, Place, Values

LAYER = ("query", "key", "value", "attended", "hidden")
"""Names of the tensors that a layer makes, in this order."""
LOGITS, SAMPLED = Place(None, "logits", True), Place(None, "token", True)


def hidden(layer: int, sent: bool = True) -> tuple[Place, Order]:
    """Return the place of the tensor that enters a layer, or leaves the last one."""
    return Place(layer, HIDDEN, sent), (layer, 0, not sent)


def encoder_hidden(layer: int, sent: bool = True) -> tuple[Place, Order]:
    """Return the place of the tensor that enters a layer of an encoder, or leaves the last one."""
    return Place(layer, ENCODER_HIDDEN, sent), (ENCODER + layer, 0, not sent)


def within(layer: int, name: str) -> tuple[Place, Order]:
    """Return the place of a tensor that a layer makes."""
    if name == "hidden":
        return hidden(layer + 1)
    return Place(layer, name, True), (layer, 1 + LAYER.index(name) if name in LAYER else 1, False)


@dataclass(frozen=True, slots=True)
class ModelPart:
    """Describe an actor as a part of the model. `index` is its position in the pipeline, `depth` how many layers precede it."""

    name: str
    layers: tuple[int, int] | None
    index: int
    depth: int

    @property
    def kind(self) -> Kind:
        """Return the kind. A custom kind has no role in the model."""
        return BUILT_IN.get(self.name, Kind(self.name, ""))


@dataclass(frozen=True, slots=True)
class Edge:
    """Describe an edge of the plan, with the actor and port at either end."""

    name: str
    source: str
    out: str
    target: str
    into: str
    codec: str
    feedback: bool


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """Represent a run folder with recordings."""

    folder: Path
    hosts: Mapping[str, list[Recorded]]
    """Recordings by actor, in pipeline order: those of its replicas, and of earlier hosts that were replaced."""
    parts: Mapping[str, ModelPart]
    edges: tuple[Edge, ...]
    sessions: Mapping[int, int]
    """New session numbers, by the session's number in the run. Equal prompts get equal new numbers in every run."""

    @property
    def cut(self) -> Mapping[str, tuple[str, tuple[int, int] | None]]:
        """Return the kind and the layers of each actor."""
        return {actor: (part.name, part.layers) for actor, part in self.parts.items()}

    def values(self) -> Values:
        """Return all tensors that were recorded at edges."""
        made = Values()
        for recorded in self.all():
            for event in recorded.events():
                if isinstance(event, Session):
                    number, log = self.sessions[event.info.session], event.info.log
                    made.prompt[number] = min(made.prompt.get(number, len(log)), len(log))
                    made.logs[number] = max(made.logs.get(number, ()), log, key=len)
                elif isinstance(event, RecordedStep):
                    self._put(made, recorded.host.actor, event)
        return made

    def _put(self, made: Values, actor: str, step: RecordedStep) -> None:
        for port, batch in step.inputs.items():
            place, order, maker = self.taken(actor, port)
            made.put((place, order), maker, self.sessions, batch.rows, batch[port])
            made.takes.setdefault(actor, set()).add(place)
        for port, batch in step.outputs.items():
            if port == "sampled" and self.parts[actor].kind.ends:  # a token is made from the position before its own
                made.put((SAMPLED, (LAST, 2, False)), actor, self.sessions, batch.rows, batch[port], shift=-1)
            elif port not in ("token", "logits") or not self.parts[actor].kind.ends:
                made.put(self.made(actor, port), actor, self.sessions, batch.rows, batch[port])

    def made(self, actor: str, port: str, sent: bool = True) -> tuple[Place, Order]:
        """Return the place of an output: at its sending end, or at its receiving end if not `sent`."""
        part = self.parts[actor]
        kind = part.kind
        if port == "hidden" and kind.encodes:
            return encoder_hidden(part.layers[1] + 1 if part.layers is not None else 0, sent)
        if port == "hidden" and kind.begins and part.layers is None:
            return hidden(0, sent)
        if port == "hidden" and kind.uses_layers and part.layers is not None:
            return hidden(part.layers[1] + 1, sent)
        if kind.ends:
            return Place(None, port, sent), (LAST, 3, not sent)
        return Place(None, f"{actor}.{port}", sent), (self._depth(actor), LAST_PART, not sent)

    def taken(self, actor: str, port: str) -> tuple[Place, Order, str]:
        """Return the place of an input, and the actor that made the input.

        The place has the same name at both ends of an edge.
        """
        into = [edge for edge in self.edges if (edge.target, edge.into) == (actor, port)]
        edge = min(into, key=lambda edge: edge.feedback, default=None)
        if edge is None or edge.source == GATEWAY:
            source = self.parts[actor].kind.encodes
            return Place(None, port, False), (ENCODER - 1 if source else GIVEN, 0, True), GATEWAY
        return *self.made(edge.source, edge.out, sent=False), edge.source

    def inside(self, actor: str, layer: int | None, name: str, seen: int) -> tuple[Place, Order]:
        """Return the place of a tensor inside an actor. `seen` is the number of tensor names that came before."""
        if layer is not None:
            return encoder_hidden(layer + 1) if self.parts[actor].kind.encodes else within(layer, name)
        if name == "embedding":
            return hidden(0)
        if name == "logits":
            return LOGITS, (LAST, 1, False)
        return Place(None, f"{actor}.{name}", True), (self._depth(actor), 1 + seen, False)

    def _depth(self, actor: str) -> float:
        part = self.parts[actor]
        return (part.layers[0] if part.layers is not None else part.depth) + (1 + part.index) * 1e-4

    def all(self) -> Iterator[Recorded]:
        """Yield the recordings of all actors."""
        for hosts in self.hosts.values():
            yield from hosts


LAST_PART = 1 << 20


def read(folder: Path) -> RecordedRun:
    """Read a run folder that holds recordings.

    Raises:
        RecordingError: it is not a run folder, or nothing was recorded there.
    """
    try:
        plan = read_plan(folder)
        edges = tuple(_edge(edge) for edge in plan["edges"])
        kinds = _parts(plan["hosts"], edges)
    except (TraceError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise RecordingError(f"{folder}: no run folder: {type(error).__name__}: {error}") from None
    by_actor: dict[str, list[Recorded]] = {}
    for recorded in recordings(folder):
        if recorded.host.actor not in kinds:
            raise RecordingError(f"{recorded.folder}: {recorded.host.actor} is no actor of {folder / 'plan.json'}")
        by_actor.setdefault(recorded.host.actor, []).append(recorded)
    return RecordedRun(
        folder,
        {actor: by_actor[actor] for actor in kinds if actor in by_actor},
        kinds,
        edges,
        _numbered(by_actor, kinds),
    )


def _numbered(by_actor: Mapping[str, Iterable[Recorded]], parts: Mapping[str, ModelPart]) -> dict[int, int]:
    """Assign numbers from 1 to the sessions, sorted by prompt.

    Sessions with the same prompt keep their order of arrival.

    The order of arrival alone is not enough: requests that are sent at once arrive in a different order each time.
    """
    prompts: dict[int, tuple[int, ...]] = {}
    sources: dict[int, list[int]] = {}
    for actor, hosts in by_actor.items():
        for recorded in hosts:
            for session, log in recorded.sessions:
                prompts[session] = min(prompts.get(session, log), log, key=len)
            if parts[actor].kind.begins and parts[actor].kind.encodes:
                sources.update(_sources(recorded))
    ordered = sorted(prompts, key=lambda session: (prompts[session], sources.get(session, []), session))
    return {session: number for number, session in enumerate(ordered, 1)}


def _sources(recorded: Recorded) -> Iterator[tuple[int, list[int]]]:
    """Yield the tokens that each session gave to an encoder."""
    for event in recorded.events():
        if isinstance(event, RecordedStep):
            for port, batch in event.inputs.items():
                start = 0
                for row in batch.rows:
                    yield row.session, batch[port][start : start + row.tokens].tolist()
                    start += row.tokens


def _edge(plain: Mapping[str, Any]) -> Edge:
    (source, out), (target, into) = ends(plain["name"])
    return Edge(plain["name"], source, out, target, into, plain["codec"], plain["feedback"])


def _parts(hosts: Sequence[Mapping[str, Any]], edges: Sequence[Edge]) -> dict[str, ModelPart]:
    """Return the actors in an order in which each comes after its senders. Feedback edges do not count."""
    left = {host["actor"]: host for host in hosts}
    made: dict[str, ModelPart] = {}
    depth = 0
    while left:
        waits = {
            edge.target for edge in edges if not edge.feedback and edge.source in left and edge.source != edge.target
        }
        actor = next((actor for actor in left if actor not in waits), next(iter(left)))
        host = left.pop(actor)
        layers = (host["layers"][0], host["layers"][1]) if host["layers"] is not None else None
        made[actor] = ModelPart(host["kind"], layers, len(made), depth)
        if layers is not None and not made[actor].kind.encodes:
            depth = max(depth, layers[1] + 1)
    return made
