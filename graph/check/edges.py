"""Check the edges of a graph file: ports exist and fit, no port is open, and only feedback edges close cycles."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.component.kinds import KindError, inside
from ranvier.actors.protocol.host_spec import GATEWAY, STATISTICS
from ranvier.transport.format import codec
from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.errors import AddressError
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links import codec_choice
from ranvier.transport.wires.endpoint import parse

from ..file.actor_section import Quorum
from ..file.errors import Problem
from ..file.load import Document
from ..file.schema import EdgeSection, GraphFile
from . import dims
from .checked import CheckedActor, CheckedEdge, Ports
from .findings import Findings, near
from .gateway_edges import PROMPTS, gateway_edges

WITHOUT_A_BOUND = "a loop without a bound; add at_most: N, and until: PORT if an output can signal the end"


class EdgeCheck(Findings):
    """Check the edges between actors whose ports are known."""

    def __init__(
        self, document: Document, file: GraphFile, problems: list[Problem], actors: Mapping[str, CheckedActor],
        folder: Path, allow_code: bool,
    ) -> None:  # fmt: skip
        super().__init__(document, file, problems)
        self.actors = actors
        self.folder, self.allow_code = folder, allow_code

    def edges(self, checkpoint: Checkpoint | None) -> list[CheckedEdge]:
        edges = []
        seen: dict[tuple[str, str], int] = {}
        for index, section in enumerate(self.file.edges):
            if (section.source, section.target) in seen:
                self._wrong(f"edge {section.source} -> {section.target} is listed twice; remove one", "edges", index)
                continue
            seen[section.source, section.target] = index
            edge = self._edge(section, index)
            if edge is not None:
                edges.append(edge)
        self._add_pipeline(edges)
        if not self.problems:
            edges += gateway_edges(self.actors.values(), edges, checkpoint)
        return edges

    def _add_pipeline(self, edges: list[CheckedEdge]) -> None:
        """Add the edges of the pipeline. One that is listed, too, has the settings that it has there."""
        listed = {(edge.source, edge.out, edge.target, edge.into): at for at, edge in enumerate(edges)}
        for edge in self._pipeline():
            at = listed.get((edge.source, edge.out, edge.target, edge.into))
            if at is None:
                edges.append(edge)
            elif edge.feedback:
                edges[at] = replace(edges[at], feedback=True)

    def _credits(self, section: EdgeSection) -> int:
        """Return the messages in flight of a listed edge. The gateway's prompts have more, also where their edge is listed."""
        target = self.actors.get(section.finish.actor)
        prompts = (
            section.start.actor == GATEWAY and target is not None and section.finish.port in target.kind.from_gateway
        )
        return PROMPTS if prompts and "credits" not in section.model_fields_set else section.credits

    def _edge(self, section: EdgeSection, index: int) -> CheckedEdge | None:
        name = f"{section.source} -> {section.target}"
        (source_actor, out), (target_actor, into) = section.start, section.finish
        if section.credits < 1:
            self._wrong(
                f"edge {name}: credits {section.credits}: nothing could ever be sent; give at least 1",
                "edges",
                index,
                "credits",
            )
        source_spec = self._port(source_actor, out, "outputs", index, "from")
        target_spec = self._port(target_actor, into, "inputs", index, "to")
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
        self._loop(section, name, index)
        self._codec(section, name, spec, index)
        self._tap(section, name, index)
        return CheckedEdge(
            source_actor, out, target_actor, into, spec,
            section.feedback, section.codec, self._credits(section), section.credit_bytes, section.until, section.at_most or 0,
            section.gradient_codec, section.tap,
        )  # fmt: skip

    def _codec(self, section: EdgeSection, name: str, spec: TensorSpec, index: int) -> None:
        try:
            if codec_choice.candidates(section.gradient_codec) is None:
                codec.parse(section.gradient_codec)
        except ValueError as error:
            self._wrong(f"edge {name}: {error}", "edges", index, "gradient_codec")
        try:
            choices = codec_choice.candidates(section.codec)
            made = codec.parse(section.codec) if choices is None else choices[-1]
        except ValueError as error:
            self._wrong(f"edge {name}: {error}", "edges", index, "codec")
            return
        if made.form != codec.RAW and not BY_NAME[spec.dtype].floats:
            self._wrong(
                f"edge {name}: codec {section.codec} is for floats, the edge carries {spec}; use raw, raw+lz4 or raw+zstd",
                "edges", index, "codec",
            )  # fmt: skip
        if made.number != codec.RAW and GATEWAY in (section.start.actor, section.finish.actor):
            self._wrong(
                f"edge {name}: the gateway reads and writes only raw tensors; remove the codec",
                "edges",
                index,
                "codec",
            )

    def _tap(self, section: EdgeSection, name: str, index: int) -> None:
        if section.tap is None:
            return
        file, separator, function = section.tap.partition(":")
        if section.tap != STATISTICS and not (file.startswith("./") and separator and function.isidentifier()):
            self._wrong(
                f"edge {name}: tap {section.tap!r}: expected {STATISTICS} or ./file.py:function; change it",
                "edges", index, "tap",
            )  # fmt: skip
        elif section.start.actor == GATEWAY:
            self._wrong(
                f"edge {name}: the gateway cannot run a tap; put the tap on a later edge", "edges", index, "tap"
            )
        elif section.tap != STATISTICS:
            try:
                inside(self.folder, file)
            except KindError as error:
                self._wrong(f"edge {name}: tap: {error}", "edges", index, "tap")
            if not self.allow_code:
                self._wrong(
                    f"edge {name}: tap {section.tap} is code of the graph's own folder; pass --allow-code if you trust it",
                    "edges", index, "tap",
                )  # fmt: skip

    def _loop(self, section: EdgeSection, name: str, index: int) -> None:
        """Check `at_most` and `until`: both are for feedback edges, and `until` names an output of the sender."""
        actor = self.actors.get(section.start.actor)
        if actor is None:
            return
        if not section.feedback:
            if section.at_most is not None or section.until is not None:
                self._wrong(
                    f"edge {name}: at_most and until are for feedback edges; add feedback: true", "edges", index
                )
            return
        if section.until is not None and section.until not in actor.outputs:
            self._wrong(
                f"edge {name}: until: actor {actor.name} has no port {section.until!r} among its outputs; "
                f"{near(section.until, actor.outputs)}", "edges", index, "until",
            )  # fmt: skip

    def _port(self, actor: str, port: str, side: str, index: int, key: str) -> TensorSpec | None:
        """Return the spec of a port, or None if it is unknown. A gateway port has the spec of the edge's other end."""
        if actor == GATEWAY:
            other = self.file.edges[index]
            name, far = other.finish if side == "outputs" else other.start
            return self._ports(name, "inputs" if side == "outputs" else "outputs").get(far)
        if actor not in self.actors:
            self._wrong(f"actor {actor!r} does not exist; {near(actor, [*self.actors, GATEWAY])}", "edges", index, key)
            return None
        ports = self._ports(actor, side)
        if port not in ports:
            self._wrong(
                f"actor {actor} has no port {port!r} among its {side}; {near(port, ports)}", "edges", index, key
            )
        return ports.get(port)

    def _ports(self, actor: str, side: str) -> Ports:
        if actor not in self.actors:
            return {}
        return self.actors[actor].inputs if side == "inputs" else self.actors[actor].outputs

    def _pipeline(self) -> list[CheckedEdge]:
        """Return the edges that `pipeline:` is short for.

        They connect each actor's outputs to the next actor's inputs of the same name, and `token` of the last actor
        back to the first.
        """
        names = self.file.pipeline or []
        for index, name in enumerate(names):
            if name not in self.actors:
                self._wrong(f"actor {name!r} does not exist; {near(name, self.actors)}", "pipeline", index)
            elif name in names[:index]:
                self._wrong(f"actor {name!r} is in the pipeline twice; remove one", "pipeline", index)
        if self.problems or not names:
            return []
        edges = []
        for index, (name, following) in enumerate(itertools.pairwise(names), 1):
            outputs, inputs = self.actors[name].outputs, self.actors[following].inputs
            shared = [port for port in outputs if port in inputs]
            if not shared:
                self._wrong(
                    f"{name} has no output that {following} takes ({', '.join(outputs)} against {', '.join(inputs)}); "
                    "write the edges out", "pipeline", index,
                )  # fmt: skip
            edges += [CheckedEdge(name, port, following, port, outputs[port]) for port in shared]
        first, last = self.actors[names[0]], self.actors[names[-1]]
        if "token" in last.outputs and "token" in first.inputs:
            edges.append(CheckedEdge(last.name, "token", first.name, "token", last.outputs["token"], feedback=True))
        for edge in edges:
            if not self.actors[edge.source].outputs[edge.out].fits(self.actors[edge.target].inputs[edge.into]):
                self._wrong(
                    f"edge {edge.name}: {edge.source} gives {edge.spec}, {edge.target} takes "
                    f"{self.actors[edge.target].inputs[edge.into]}; make them the same", "pipeline",
                )  # fmt: skip
        return edges

    def observed(self, edges: Sequence[CheckedEdge]) -> None:
        """Check that recorded edges exist, that exported spans are traced, and that metrics stay on loopback."""
        if self.file.telemetry.otlp is not None and not self.file.trace:
            self._wrong(
                "telemetry: spans are read from the trace, which is off; remove trace: false", "telemetry", "otlp"
            )
        if self.file.telemetry.metrics is not None:
            try:
                parse(f"tcp://{self.file.telemetry.metrics}")
            except AddressError:
                what = (
                    f"telemetry.metrics: {self.file.telemetry.metrics!r:.80}: expected loopback, such as 127.0.0.1:9464"
                )
                self._wrong(f"{what}, or port 0 for any free one", "telemetry", "metrics")
        section = self.file.record
        for index, name in enumerate(section.edges if section is not None and section.edges != "all" else ()):
            if not any(edge.is_meant_by(name) for edge in edges):
                hint = near(name, [*self.actors, *(edge.name for edge in edges)])
                self._wrong(f"record: no edge, port or actor is called {name!r}; {hint}", "record", "edges", index)

    def connected(self, edges: Iterable[CheckedEdge]) -> None:
        fed = {(edge.target, edge.into) for edge in edges}
        used = {(edge.source, edge.out) for edge in edges}
        says_done = {(edge.source, edge.until) for edge in edges}
        if self.file.training is not None:  # an output that a loss uses needs no edge
            used |= {loss.output for loss in self.file.training.loss}
        for actor in self.actors.values():
            self._joinable(actor, edges)
            for port in actor.inputs:
                if (actor.name, port) not in fed:
                    self._wrong(
                        f"actor {actor.name}: input {port!r} is open; add an edge to it, or feed it from the client by "
                        f"{GATEWAY}.{port} -> {actor.name}.{port}", "actors", actor.name, key=True,
                    )  # fmt: skip
            for port in actor.outputs:
                if not {(actor.name, port)} & (used | says_done) and port not in actor.kind.optional:
                    self._wrong(
                        f"actor {actor.name}: output {port!r} is open; add an edge from it, or give it to the client by "
                        f"{actor.name}.{port} -> {GATEWAY}.{port}", "actors", actor.name, key=True,
                    )  # fmt: skip
        reached = _reach({GATEWAY}, [(edge.source, edge.target) for edge in edges])
        for name in self.actors:
            if name not in reached:
                self._wrong(
                    f"actor {name}: nothing from the gateway ever reaches it; connect it", "actors", name, key=True
                )

    def token_returns(self, edges: Iterable[CheckedEdge]) -> None:
        """Check that the token of a head goes back to an actor, which makes the next one of it."""
        returned = {edge.source for edge in edges if edge.out == "token" and edge.source != GATEWAY}
        first = next((actor.name for actor in self.actors.values() if "token" in actor.kind.from_gateway), None)
        if self.file.training is not None or first is None:
            return
        for actor in self.actors.values():
            if actor.kind.ends and actor.name not in returned:
                self._wrong(
                    f"actor {actor.name}: its output 'token' goes nowhere, so no text can be generated; add "
                    f"{{from: {actor.name}.token, to: {first}.token, feedback: true}}", "actors", actor.name, key=True,
                )  # fmt: skip

    def _joinable(self, actor: CheckedActor, edges: Iterable[CheckedEdge]) -> None:
        join = actor.section.join
        if join == "all":
            into = Counter(edge.into for edge in edges if edge.target == actor.name and not edge.feedback)
            for port in [port for port, count in into.items() if count > 1]:
                self._wrong(
                    f"actor {actor.name}: {into[port]} edges lead to its input {port!r}, and join: all takes one per step; "
                    "give each edge a separate port, or set join: first", "actors", actor.name, key=True,
                )  # fmt: skip
        joined = len(actor.inputs) - len(actor.once)
        if isinstance(join, Quorum) and join.quorum > joined:
            self._wrong(
                f"actor {actor.name}: quorum {join.quorum} can never be reached: it has {joined} "
                f"{'input' if joined == 1 else 'inputs'} to join ({', '.join(actor.inputs)}); lower it",
                "actors", actor.name, "join",
            )  # fmt: skip

    def cycles(self, edges: Iterable[CheckedEdge]) -> None:
        forward = [(e.source, e.target) for e in edges if not e.feedback and GATEWAY not in (e.source, e.target)]
        cycle = _cycle(forward)
        if cycle:
            steps = set(itertools.pairwise(cycle))
            last = [i for i, e in enumerate(self.file.edges) if (e.start.actor, e.finish.actor) in steps]
            self._wrong(
                f"cycle {' -> '.join(cycle)} has no feedback edge; mark the edge that carries the result back "
                "with feedback: true", *(("edges", last[-1]) if last else ("pipeline",)),
            )  # fmt: skip
        for index, section in enumerate(self.file.edges):
            if section.feedback and section.start.actor not in _reach({section.finish.actor}, forward):
                self._wrong(
                    f"edge {section.source} -> {section.target} closes no cycle; remove feedback: true",
                    "edges",
                    index,
                    "feedback",
                )

    def loops(self, edges: Iterable[CheckedEdge]) -> None:
        """Check that every loop has a bound. A language model's token loop needs none: it ends with its stream."""
        edges = list(edges)
        forward = [(e.source, e.target) for e in edges if not e.feedback and GATEWAY not in (e.source, e.target)]
        for edge in [edge for edge in edges if edge.feedback and edge.source in _reach({edge.target}, forward)]:
            of_tokens = edge.out == "token" and self.actors[edge.source].kind.uses_model
            if not edge.at_most and not of_tokens:
                self._wrong(f"edge {edge.name}: {WITHOUT_A_BOUND}", *self._edge_path(edge))

    def dims(self, edges: Iterable[CheckedEdge]) -> None:
        """Check that a named dimension has one size, and a gateway port one spec, over all edges."""
        edges = list(edges)
        given: dict[str, CheckedEdge] = {}
        for edge in edges:
            if edge.source == GATEWAY:
                other = given.setdefault(edge.out, edge)
                if (other.spec.dtype, len(other.spec.shape)) != (edge.spec.dtype, len(edge.spec.shape)):
                    self._wrong(
                        f"edge {other.name} takes {other.spec}, edge {edge.name} takes {edge.spec}, and the client gives one "
                        f"tensor to both; make them the same, or name two ports of the {GATEWAY}", *self._edge_path(edge),
                    )  # fmt: skip
        for conflict in dims.conflicts(self.actors, edges):
            last = next((e for e in edges if e.name == conflict.second.edge), None)
            self._wrong(str(conflict), *(self._edge_path(last) if last is not None else ("edges",)))

    def order(self, edges: Iterable[CheckedEdge], checkpoint: Checkpoint | None) -> None:
        """Check that layers follow each other along the edges."""
        if checkpoint is None:
            return
        count = checkpoint.config.layers
        for edge in edges:
            if edge.out != "hidden" or GATEWAY in (edge.source, edge.target):
                continue
            before, after = self.actors[edge.source], self.actors[edge.target]
            self._sides(edge, before, after, checkpoint)
            if edge.into != "hidden":
                continue
            outside = (-1 if before.kind.begins else None), (count if after.kind.ends else None)
            ends = before.layers[1] if before.layers else outside[0]
            starts = after.layers[0] if after.layers else outside[1]
            if ends is not None and starts is not None and starts != ends + 1:
                need = "the head" if ends + 1 == count else f"layer {ends + 1}"
                self._wrong(
                    f"edge {edge.name}: expected {need} after {before.name}, "
                    f"but {after.name} {'is the head' if starts == count else f'starts at layer {starts}'}; fix the order",
                    *self._edge_path(edge),
                )

    def _sides(self, edge: CheckedEdge, before: CheckedActor, after: CheckedActor, checkpoint: Checkpoint) -> None:
        """Check that only the encoder's last hidden states go to decoders, and only as their `memory`."""
        encoder = checkpoint.config.encoder
        if encoder is None or not before.kind.uses_model or not after.kind.uses_model:
            return
        of_encoder = before.kind.encodes
        last = of_encoder and before.layers is not None and before.layers[1] == encoder.layers - 1
        if edge.into == "memory" and not last:
            self._wrong(
                f"edge {edge.name}: memory comes from layer {encoder.layers - 1} of the encoder, not from {before.name}; "
                "fix the order", *self._edge_path(edge),
            )  # fmt: skip
        elif edge.into == "hidden" and of_encoder != after.kind.encodes:
            self._wrong(
                f"edge {edge.name}: {before.name} belongs to the {'encoder' if of_encoder else 'decoder'}, {after.name} "
                "does not; connect the encoder's last layer to the decoders' memory", *self._edge_path(edge),
            )  # fmt: skip

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
    """Return the nodes of one cycle, with the first repeated at the end. Return an empty list if there is no cycle."""
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
