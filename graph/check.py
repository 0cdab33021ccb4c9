"""Everything about a graph that can be known before a process starts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranvier.actors import kinds
from ranvier.actors.checkpoint import Checkpoint, open_checkpoint
from ranvier.actors.errors import CheckpointError
from ranvier.actors.kinds import Kind, KindError
from ranvier.actors.model import weights
from ranvier.actors.spec import GATEWAY
from ranvier.transport import endpoint
from ranvier.transport.errors import AddressError
from ranvier.transport.spec import TensorSpec

from . import schema, source
from .errors import GraphError, Problem
from .load import Document, read
from .schema import ActorSection, EdgeSection, GraphFile

Ports = Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class CheckedActor:
    """One actor whose kind, ports, layers and weights are known. `elements`: numbers in its weights."""

    name: str
    section: ActorSection
    kind: Kind
    inputs: Ports
    outputs: Ports
    layers: tuple[int, int] | None
    elements: int


@dataclass(frozen=True, slots=True)
class CheckedEdge:
    """One edge between ports that fit. `implied`: it is not in the file (the gateway's own)."""

    source: str
    out: str
    target: str
    into: str
    spec: TensorSpec
    feedback: bool = False
    codec: str = "raw"
    credits_messages: int = 8
    credits_bytes: int = 64 << 20
    implied: bool = False

    @property
    def name(self) -> str:
        return f"{self.source}.{self.out} -> {self.target}.{self.into}"


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph that can run."""

    path: Path
    file: GraphFile
    checkpoint: Checkpoint | None
    actors: Mapping[str, CheckedActor]
    edges: tuple[CheckedEdge, ...]

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def generates(self) -> bool:
        """Whether it is a language model: the gateway sends tokens in and gets tokens out."""
        return any(e.source == GATEWAY and e.out == "token" for e in self.edges) and any(
            e.target == GATEWAY and e.into == "sampled" for e in self.edges
        )

    def expanded(self) -> dict[str, Any]:
        """The long form of the file: every edge and every setting written out."""
        plain = self.file.model_dump(by_alias=True, exclude={"pipeline", "edges"}, exclude_none=True)
        plain["edges"] = [
            {
                "from": f"{e.source}.{e.out}", "to": f"{e.target}.{e.into}", "feedback": e.feedback, "codec": e.codec,
                "credits": e.credits_messages, "credit_bytes": e.credits_bytes,
            }
            for e in self.edges
            if not e.implied
        ]  # fmt: skip
        return plain


def load(path: str | Path, *, allow_code: bool = False, overrides: Mapping[str, str] | None = None) -> Graph:
    """Read and check a graph file.

    Args:
        allow_code: import classes from the graph's own folder (`kind: ./file.py:Class`).
        overrides: values by dotted key, as YAML text: `{"model.dtype": "float32"}`.

    Raises:
        GraphError: with every problem found, each with line and column.
    """
    document = read(Path(path), overrides)
    return _Check(document, schema.validate(document), Path(path), allow_code).graph()


class _Check:
    """Collects problems; stops where later checks would only repeat them."""

    def __init__(self, document: Document, file: GraphFile, path: Path, allow_code: bool) -> None:
        self.document = document
        self.file = file
        self.path = path
        self.folder = path.parent
        self.allow_code = allow_code
        self.problems: list[Problem] = []

    def graph(self) -> Graph:
        self._names()
        found = self._kinds()
        checkpoint = self._checkpoint(found)
        self._stop_if_wrong()
        actors = self._actors(found, checkpoint)
        self._endpoints()
        self._stop_if_wrong()
        self._layers(actors, checkpoint)
        edges = self._edges(actors)
        self._stop_if_wrong()
        self._connected(actors, edges)
        self._cycles(edges)
        self._order(actors, edges, checkpoint)
        self._stop_if_wrong()
        return Graph(self.path, self.file, checkpoint, actors, tuple(edges))

    def _wrong(self, what: str, *path: str | int, key: bool = False) -> None:
        at = self.document.at_key(*path) if key else self.document.at(*path)
        self.problems.append(Problem(what, at))

    def _stop_if_wrong(self) -> None:
        if self.problems:
            raise GraphError(self.document.file, self.problems)

    # -- actors -------------------------------------------------------------------------------------------------

    def _names(self) -> None:
        if GATEWAY in self.file.actors:
            self._wrong(
                f"actor name {GATEWAY!r} is reserved for where clients enter; use another", "actors", GATEWAY, key=True
            )

    def _kinds(self) -> dict[str, Kind]:
        found = {}
        for name, actor in self.file.actors.items():
            try:
                found[name] = kinds.find(actor.kind, self.folder, self.allow_code)
            except KindError as error:
                self._wrong(f"actor {name}: {error}", "actors", name, "kind")
        return found

    def _checkpoint(self, found: Mapping[str, Kind]) -> Checkpoint | None:
        using = [name for name, kind in found.items() if kind.uses_model]
        if self.file.model is None:
            for name in using:
                self._wrong(
                    f"actor {name}: kind {found[name].name!r} needs a model; add model: {{source: …}}", "actors", name
                )
            return None
        trusted = ("model", "source") in self.document.overridden
        try:
            return open_checkpoint(source.resolve(self.file.model.source, self.folder, trusted))
        except (source.SourceError, CheckpointError) as error:
            self._wrong(f"model: {error}", "model", "source")
            return None

    def _actors(self, found: Mapping[str, Kind], checkpoint: Checkpoint | None) -> dict[str, CheckedActor]:
        actors = {}
        for name, kind in found.items():
            section = self.file.actors[name]
            layers = self._layer_range(name, section, kind, checkpoint)
            elements = 0
            if kind.ports_of is not None:
                assert checkpoint is not None and self.file.model is not None
                inputs, outputs = kind.ports_of(checkpoint.config, self.file.model.dtype)
                held = (0, checkpoint.config.layers - 1) if kind.name == "model" else layers
                try:
                    elements = weights.check(checkpoint, kind.name, held)
                except CheckpointError as error:
                    self._wrong(f"actor {name}: {error}; the checkpoint does not fit", "actors", name)
            else:
                inputs, outputs = self._own_ports(name, kind)
            actors[name] = CheckedActor(name, section, kind, inputs, outputs, layers, elements)
        return actors

    def _own_ports(self, name: str, kind: Kind) -> tuple[Ports, Ports]:
        try:
            made = kinds.load_class(kind.implementation, kind.folder)
        except Exception as error:  # code of the user's own may raise anything; it is the file's problem
            self._wrong(f"actor {name}: {type(error).__name__}: {error}; mend the class", "actors", name, "kind")
            return {}, {}
        ports = [*made.inputs.items(), *made.outputs.items()]
        for port, spec in ports:
            if not isinstance(spec, TensorSpec) or not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", port):
                self._wrong(
                    f"actor {name}: port {port!r}: expected a lower-case name and a TensorSpec", "actors", name, "kind"
                )
        if not made.inputs:
            self._wrong(f"actor {name}: {kind.name} has no inputs; state them in its class", "actors", name, "kind")
        return made.inputs, made.outputs

    def _layer_range(
        self, name: str, section: ActorSection, kind: Kind, checkpoint: Checkpoint | None
    ) -> tuple[int, int] | None:
        if not kind.uses_layers:
            if section.layers is not None:
                self._wrong(
                    f"actor {name}: kind {kind.name!r} has no layers; remove the key",
                    "actors",
                    name,
                    "layers",
                    key=True,
                )
            return None
        if section.layers is None or checkpoint is None:
            self._wrong(f"actor {name}: layers are missing; add layers: first-last", "actors", name)
            return None
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", str(section.layers))
        count = checkpoint.config.layers
        if match is None:
            self._wrong(
                f"actor {name}: layers {section.layers!r}: expected first-last, such as 0-14", "actors", name, "layers"
            )
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < count:
            self._wrong(
                f"actor {name}: layers {first}-{last} are out of range; the model has 0-{count - 1}",
                "actors",
                name,
                "layers",
            )
            return None
        return first, last

    def _layers(self, actors: Mapping[str, CheckedActor], checkpoint: Checkpoint | None) -> None:
        """Every layer of the model stands in exactly one blocks actor."""
        owners: dict[int, str] = {}
        blocks = [actor for actor in actors.values() if actor.layers is not None]
        if not blocks or checkpoint is None:
            return
        for actor in blocks:
            assert actor.layers is not None
            own = range(actor.layers[0], actor.layers[1] + 1)
            doubled = [layer for layer in own if layer in owners]
            if doubled:
                self._wrong(
                    f"actor {actor.name}: layer {_ranges(doubled)} is in {owners[doubled[0]]} already; "
                    "give each layer to one actor",
                    *("actors", actor.name, "layers"),
                )
            owners.update(dict.fromkeys(own, actor.name))
        missing = [layer for layer in range(checkpoint.config.layers) if layer not in owners]
        if missing:
            self._wrong(f"layers {_ranges(missing)} are in no actor; add them to one", "actors", key=True)

    def _endpoints(self) -> None:
        taken: dict[str, str] = {}
        if self.file.transport != "ipc":
            try:
                place = endpoint.parse(self.file.transport)
                if place.scheme != "tcp" or place.port:
                    raise AddressError(
                        f"transport {self.file.transport!r}: expected ipc or tcp://address without a port"
                    )
            except AddressError as error:
                self._wrong(f"{error}; for example tcp://127.0.0.1", "transport")
        for name, actor in self.file.actors.items():
            if actor.endpoint is None:
                continue
            try:
                place = endpoint.parse(actor.endpoint)
            except AddressError as error:
                self._wrong(f"actor {name}: {error}; change the endpoint", "actors", name, "endpoint")
                continue
            if place.scheme == "inproc":
                self._wrong(
                    f"actor {name}: inproc reaches no other process; use ipc or tcp", "actors", name, "endpoint"
                )
            elif not (place.scheme == "tcp" and place.port == 0):
                if str(place) in taken:
                    self._wrong(
                        f"actor {name}: endpoint {place} is that of {taken[str(place)]}; give each actor its own",
                        "actors", name, "endpoint",
                    )  # fmt: skip
                taken[str(place)] = name

    # -- edges --------------------------------------------------------------------------------------------------

    def _edges(self, actors: Mapping[str, CheckedActor]) -> list[CheckedEdge]:
        edges = []
        seen: dict[tuple[str, str], int] = {}
        for index, section in enumerate(self.file.edges):
            if (section.source, section.target) in seen:
                self._wrong(f"edge {section.source} -> {section.target} stands here twice; remove one", "edges", index)
                continue
            seen[section.source, section.target] = index
            edge = self._edge(actors, section, index)
            if edge is not None:
                edges.append(edge)
        edges += self._pipeline(actors)
        if not self.problems:
            edges += self._gateway_edges(actors, edges)
        return edges

    def _edge(self, actors: Mapping[str, CheckedActor], section: EdgeSection, index: int) -> CheckedEdge | None:
        name = f"{section.source} -> {section.target}"
        source_actor, out = section.source.split(".")
        target_actor, into = section.target.split(".")
        if section.credits < 1:
            self._wrong(
                f"edge {name}: credits {section.credits}: nothing could ever be sent; give at least 1",
                "edges",
                index,
                "credits",
            )
        source_spec = self._port(actors, source_actor, out, "outputs", index, "from")
        target_spec = self._port(actors, target_actor, into, "inputs", index, "to")
        if source_actor == target_actor == GATEWAY:
            self._wrong(f"edge {name}: goes from the gateway to the gateway; name an actor", "edges", index)
            return None
        if source_spec is not None and target_spec is not None and not source_spec.fits(target_spec):
            self._wrong(
                f"edge {name}: {section.source} gives {source_spec}, {section.target} takes {target_spec}; make them the same",
                "edges", index,
            )  # fmt: skip
            return None
        spec = target_spec if source_actor == GATEWAY else source_spec
        if spec is None:
            return None
        return CheckedEdge(
            source_actor, out, target_actor, into, spec,
            section.feedback, section.codec, section.credits, section.credit_bytes,
        )  # fmt: skip

    def _port(
        self, actors: Mapping[str, CheckedActor], actor: str, port: str, side: str, index: int, key: str
    ) -> TensorSpec | None:
        """The spec of a port; what the gateway takes or gives is what the other end says."""
        if actor == GATEWAY:
            other = self.file.edges[index]
            name, far = (other.target if side == "outputs" else other.source).split(".")
            return self._ports(actors, name, "inputs" if side == "outputs" else "outputs").get(far)
        if actor not in actors:
            self._wrong(f"actor {actor!r} does not exist; {_near(actor, [*actors, GATEWAY])}", "edges", index, key)
            return None
        ports = self._ports(actors, actor, side)
        if port not in ports:
            self._wrong(
                f"actor {actor} has no port {port!r} among its {side}; {_near(port, ports)}", "edges", index, key
            )
        return ports.get(port)

    def _ports(self, actors: Mapping[str, CheckedActor], actor: str, side: str) -> Ports:
        if actor not in actors:
            return {}
        return actors[actor].inputs if side == "inputs" else actors[actor].outputs

    def _pipeline(self, actors: Mapping[str, CheckedActor]) -> list[CheckedEdge]:
        """The edges that `pipeline:` is short for: each actor's ports to the next one's of the same name, and `token`
        back from the last to the first."""
        names = self.file.pipeline or []
        for index, name in enumerate(names):
            if name not in actors:
                self._wrong(f"actor {name!r} does not exist; {_near(name, actors)}", "pipeline", index)
            elif name in names[:index]:
                self._wrong(f"actor {name!r} is in the pipeline twice; remove one", "pipeline", index)
        if self.problems or not names:
            return []
        edges = []
        for index, (name, following) in enumerate(itertools.pairwise(names), 1):
            outputs, inputs = actors[name].outputs, actors[following].inputs
            shared = [port for port in outputs if port in inputs]
            if not shared:
                self._wrong(
                    f"{name} has no output that {following} takes ({', '.join(outputs)} against {', '.join(inputs)}); "
                    "write the edges out", "pipeline", index,
                )  # fmt: skip
            edges += [CheckedEdge(name, port, following, port, outputs[port]) for port in shared]
        first, last = actors[names[0]], actors[names[-1]]
        if "token" in last.outputs and "token" in first.inputs:
            edges.append(CheckedEdge(last.name, "token", first.name, "token", last.outputs["token"], feedback=True))
        for edge in edges:
            if not actors[edge.source].outputs[edge.out].fits(actors[edge.target].inputs[edge.into]):
                self._wrong(
                    f"edge {edge.name}: {edge.source} gives {edge.spec}, {edge.target} takes "
                    f"{actors[edge.target].inputs[edge.into]}; make them the same", "pipeline",
                )  # fmt: skip
        return edges

    def _gateway_edges(self, actors: Mapping[str, CheckedActor], edges: list[CheckedEdge]) -> list[CheckedEdge]:
        made = []
        given = {(edge.source, edge.out, edge.target, edge.into) for edge in edges}
        for actor in actors.values():
            made += [
                CheckedEdge(GATEWAY, port, actor.name, port, actor.inputs[port], implied=True)
                for port in actor.kind.from_gateway
                if (GATEWAY, port, actor.name, port) not in given
            ]
            made += [
                CheckedEdge(actor.name, port, GATEWAY, port, actor.outputs[port], implied=True)
                for port in actor.kind.to_gateway
                if (actor.name, port, GATEWAY, port) not in given
            ]
        return made

    def _connected(self, actors: Mapping[str, CheckedActor], edges: Iterable[CheckedEdge]) -> None:
        fed = {(edge.target, edge.into) for edge in edges}
        used = {(edge.source, edge.out) for edge in edges}
        for actor in actors.values():
            for port in actor.inputs:
                if (actor.name, port) not in fed:
                    self._wrong(
                        f"actor {actor.name}: input {port!r} is open; add an edge to it, or feed it from the client by "
                        f"{GATEWAY}.{port} -> {actor.name}.{port}", "actors", actor.name, key=True,
                    )  # fmt: skip
            for port in actor.outputs:
                if (actor.name, port) not in used and port not in actor.kind.optional:
                    self._wrong(
                        f"actor {actor.name}: output {port!r} is open; add an edge from it, or give it to the client by "
                        f"{actor.name}.{port} -> {GATEWAY}.{port}", "actors", actor.name, key=True,
                    )  # fmt: skip
        reached = _reach({GATEWAY}, [(edge.source, edge.target) for edge in edges])
        for name in actors:
            if name not in reached:
                self._wrong(
                    f"actor {name}: nothing from the gateway ever reaches it; connect it", "actors", name, key=True
                )

    def _cycles(self, edges: Iterable[CheckedEdge]) -> None:
        forward = [(e.source, e.target) for e in edges if not e.feedback and GATEWAY not in (e.source, e.target)]
        cycle = _cycle(forward)
        if cycle:
            steps = set(itertools.pairwise(cycle))
            last = [
                i for i, e in enumerate(self.file.edges) if (e.source.split(".")[0], e.target.split(".")[0]) in steps
            ]
            self._wrong(
                f"cycle {' -> '.join(cycle)} has no feedback edge; mark the edge that carries the result back "
                "with feedback: true", *(("edges", last[-1]) if last else ("pipeline",)),
            )  # fmt: skip
        for index, section in enumerate(self.file.edges):
            if section.feedback:
                source_actor, target_actor = section.source.split(".")[0], section.target.split(".")[0]
                if source_actor not in _reach({target_actor}, forward):
                    self._wrong(
                        f"edge {section.source} -> {section.target} closes no cycle; remove feedback: true",
                        "edges",
                        index,
                        "feedback",
                    )

    def _order(
        self, actors: Mapping[str, CheckedActor], edges: Iterable[CheckedEdge], checkpoint: Checkpoint | None
    ) -> None:
        """Layers follow each other along the edges."""
        if checkpoint is None:
            return
        count = checkpoint.config.layers
        for edge in edges:
            if edge.out != "hidden" or edge.into != "hidden" or GATEWAY in (edge.source, edge.target):
                continue
            before, after = actors[edge.source], actors[edge.target]
            ends = {"embedding": -1}.get(before.kind.name, before.layers[1] if before.layers else None)
            starts = {"head": count}.get(after.kind.name, after.layers[0] if after.layers else None)
            if ends is not None and starts is not None and starts != ends + 1:
                need = "the head" if ends + 1 == count else f"layer {ends + 1}"
                self._wrong(
                    f"edge {edge.name}: after {before.name} comes {need}, "
                    f"but {after.name} {'is the head' if starts == count else f'starts at layer {starts}'}; mend the order",
                    *self._edge_path(edge),
                )

    def _edge_path(self, edge: CheckedEdge) -> tuple[str | int, ...]:
        for index, section in enumerate(self.file.edges):
            if (section.source, section.target) == (f"{edge.source}.{edge.out}", f"{edge.target}.{edge.into}"):
                return ("edges", index)
        return ("pipeline",)


def _reach(start: set[str], arrows: list[tuple[str, str]]) -> set[str]:
    reached, frontier = set(start), set(start)
    while frontier:
        frontier = {target for source_, target in arrows if source_ in frontier} - reached
        reached |= frontier
    return reached


def _cycle(arrows: list[tuple[str, str]]) -> list[str]:
    """The nodes of one cycle, the first repeated at the end; empty if there is none."""
    following: dict[str, list[str]] = {}
    for source_, target in arrows:
        following.setdefault(source_, []).append(target)
    for start in following:
        trail: dict[str, str] = {start: ""}
        stack = [start]
        while stack:
            node = stack.pop()
            for target in following.get(node, ()):
                if target == start:
                    path = [start]
                    while node:
                        path.append(node)
                        node = trail[node]
                    return path[::-1]
                if target not in trail:
                    trail[target] = node
                    stack.append(target)
    return []


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _near(name: str, names: Iterable[str]) -> str:
    import difflib

    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'none'}"
