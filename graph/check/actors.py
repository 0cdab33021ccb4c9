"""Check the actors of a graph file: names, kinds, the checkpoint, layers and endpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.component import kinds
from ranvier.actors.component.kinds import BUILT_IN, Kind, KindError
from ranvier.actors.errors import CheckpointError
from ranvier.actors.model import weights
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.system import usable_cores

from ..file import source
from ..file.actor_section import ActorSection
from ..file.errors import Problem
from ..file.load import Document
from ..file.schema import GraphFile
from .checked import CheckedActor, Ports
from .findings import Findings, near


class ActorCheck(Findings):
    """Check each actor, and check that all actors together hold every layer exactly once."""

    def __init__(
        self, document: Document, file: GraphFile, problems: list[Problem], folder: Path, allow_code: bool
    ) -> None:
        super().__init__(document, file, problems)
        self.folder = folder
        self.allow_code = allow_code
        self.modules: dict[str, Any] = {}

    def names(self) -> None:
        if GATEWAY in self.file.actors:
            self._wrong(
                f"actor name {GATEWAY!r} is reserved for the place where clients enter; use another name",
                "actors",
                GATEWAY,
                key=True,
            )

    def kinds(self) -> dict[str, Kind]:
        found = {}
        for name, actor in self.file.actors.items():
            try:
                found[name] = kinds.find(actor.kind, self.folder, self.allow_code)
            except KindError as error:
                self._wrong(f"actor {name}: {error}", "actors", name, "kind")
        return found

    def actors(self, found: Mapping[str, Kind], checkpoint: Checkpoint | None) -> dict[str, CheckedActor]:
        actors = {}
        for name, kind in found.items():
            section = self.file.actors[name]
            self._cpus(name, section)
            self._fits_model(name, kind, checkpoint)
            layers = self._layer_range(name, section, kind, checkpoint)
            elements, experts, once = 0, None, kind.once
            if kind.ports_of is not None:
                assert checkpoint is not None and self.file.model is not None
                experts = self._expert_range(name, section, kind, checkpoint)
                inputs, outputs = kind.ports_of(checkpoint.config, self.file.model.dtype, experts or (0, 0))
                if self.problems:
                    continue  # its layers or experts are wrong, so its tensors cannot be looked up
                held = (0, checkpoint.config.layers - 1) if kind.whole else layers
                try:
                    elements = weights.check(checkpoint, kind, held, experts)
                except CheckpointError as error:
                    self._wrong(f"actor {name}: {error}; the checkpoint does not fit", "actors", name)
            else:
                inputs, outputs, once = self._own_ports(name, kind) or ({}, {}, ())
            weights_file = self._weights(name, section)
            actors[name] = CheckedActor(
                name, section, kind, inputs, outputs, layers, elements, weights_file, experts=experts, once=once
            )
        if self.modules:
            self._module_ports(actors)
        return actors

    def _cpus(self, name: str, section: ActorSection) -> None:
        there = usable_cores()
        missing = sorted(set(section.cpus or ()) - there)
        if missing:
            self._wrong(
                f"actor {name}: cpus {missing} are not available; this process may use {sorted(there)}",
                "actors",
                name,
                "cpus",
            )

    def _fits_model(self, name: str, kind: Kind, checkpoint: Checkpoint | None) -> None:
        """Report a kind that does not fit this model."""
        if checkpoint is None or not kind.uses_model:
            return
        family = checkpoint.config.family
        if checkpoint.config.uncut and not kind.whole:
            self._wrong(
                f"actor {name}: the model ({family}) cannot be cut: {checkpoint.config.uncut}; use kind: model for all of it",
                "actors", name, "kind",
            )  # fmt: skip
        elif checkpoint.config.encoder is not None and kind.seq2seq is None:
            self._wrong(
                f"actor {name}: the model ({family}) is an encoder–decoder; use encoder_embedding and encoder, embedding, "
                "decoder and head", "actors", name, "kind",
            )  # fmt: skip
        elif checkpoint.config.encoder is None and kind.has_decoder_memory:
            self._wrong(
                f"actor {name}: the model ({family}) has no encoder; use embedding, blocks and head",
                "actors",
                name,
                "kind",
            )

    def _own_ports(self, name: str, kind: Kind) -> tuple[Ports, Ports, tuple[str, ...]] | None:
        """Return the inputs, outputs and `once` inputs that a class declares.

        Return None for a torch module: its ports depend on what is connected to it.
        """
        try:
            made = kinds.load_class(kind.implementation, kind.folder)
        except Exception as error:  # custom code may raise anything; it is reported like a wrong key
            self._wrong(f"actor {name}: {type(error).__name__}: {error}; fix the class", "actors", name, "kind")
            return {}, {}, ()
        if kinds.is_module(made):
            self.modules[name] = made
            return None
        for key in self.file.actors[name].args:
            if made.args and key not in made.args:
                self._wrong(
                    f"actor {name}: {kind.name} takes no argument {key!r}; {near(key, made.args)}",
                    "actors",
                    name,
                    "args",
                )
        ports = [*made.inputs.items(), *made.outputs.items()]
        for port, spec in ports:
            if not isinstance(spec, TensorSpec) or not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", port):
                self._wrong(
                    f"actor {name}: port {port!r}: expected a lower-case name and a TensorSpec", "actors", name, "kind"
                )
        if not made.inputs.keys() - made.once:
            self._wrong(f"actor {name}: {kind.name} has no inputs; state them in its class", "actors", name, "kind")
        unknown = sorted(set(made.once) - made.inputs.keys())
        if unknown:
            self._wrong(
                f"actor {name}: `once` names {unknown}, which are not inputs; fix the class", "actors", name, "kind"
            )
        return made.inputs, made.outputs, tuple(made.once)

    def _module_ports(self, actors: dict[str, CheckedActor]) -> None:
        """Find the ports of torch modules, each module as soon as the specs of its inputs are known."""
        from ranvier.actors.component import module

        left = dict(self.modules)
        while left:
            known = len(left)
            for name, made in list(left.items()):
                section = self.file.actors[name]
                try:
                    given = {port: TensorSpec.parse(text) for port, text in section.inputs.items()}
                    inputs = {port: given.get(port) or self._fed(name, port, actors) for port in module.inputs_of(made)}
                    unknown = sorted(given.keys() - inputs.keys())
                    if unknown:
                        raise ValueError(f"inputs {unknown} are not parameters of forward ({', '.join(inputs)})")
                    specs = {port: spec for port, spec in inputs.items() if spec is not None}
                    if len(specs) < len(inputs):
                        continue
                    found = module.probe(made, section.args, specs)
                except ValueError as error:
                    self._wrong(
                        f"actor {name}: {error}; fix the class or its inputs, or write it as an Actor, which names its ports",
                        "actors", name,
                    )  # fmt: skip
                    specs, found = {}, module.Probed({}, 0, own_autograd=False)
                del left[name]
                actors[name] = replace(
                    actors[name], inputs=specs, outputs=found.outputs, module_bytes=found.nbytes,
                    own_autograd=found.own_autograd,
                )  # fmt: skip
            if len(left) == known:
                break
        for name, made in left.items():
            needed = next(port for port in module.inputs_of(made) if self._fed(name, port, actors) is None)
            self._wrong(
                f"actor {name}: the spec of its input {needed!r} is unknown; add inputs: {{{needed}: \"float32[rows, 64]\"}}",
                "actors", name,
            )  # fmt: skip

    def _fed(self, name: str, port: str, actors: Mapping[str, CheckedActor]) -> TensorSpec | None:
        for edge in self.file.edges:
            if edge.finish == (name, port):
                source = edge.start
                found = actors[source.actor].outputs.get(source.port) if source.actor in actors else None
                if found is not None:
                    return found
        row = self.file.pipeline or []
        before = row[row.index(name) - 1] if name in row[1:] else None
        return actors[before].outputs.get(port) if before is not None and before in actors else None

    def _weights(self, name: str, section: ActorSection) -> Path | None:
        if section.weights is None:
            return None
        if section.kind in BUILT_IN:
            self._wrong(
                f"actor {name}: kind {section.kind} takes its weights from the model; remove the key",
                "actors", name, "weights", key=True,
            )  # fmt: skip
            return None
        try:
            return source.resolve(section.weights, self.folder, ("actors", name, "weights") in self.document.trusted)
        except source.SourceError as error:
            self._wrong(f"actor {name}: weights: {error}", "actors", name, "weights")
            return None

    def _expert_range(
        self, name: str, section: ActorSection, kind: Kind, checkpoint: Checkpoint
    ) -> tuple[int, int] | None:
        if kind.one_layer and not checkpoint.config.experts:
            self._wrong(
                f"actor {name}: the model ({checkpoint.config.family}) has no experts; use kind: blocks",
                "actors",
                name,
                "kind",
            )
            return None
        if not kind.uses_experts:
            if section.experts is not None:
                self._wrong(
                    f"actor {name}: kind {kind.name!r} has no experts; remove the key",
                    "actors",
                    name,
                    "experts",
                    key=True,
                )
            return None
        numbers, count = _first_last(section.experts), checkpoint.config.experts
        if numbers is None or not numbers[0] <= numbers[1] < count:
            self._wrong(
                f"actor {name}: experts {section.experts!r}: expected first-last within 0-{count - 1}, such as 0-{count - 1}",
                "actors", name, *(("experts",) if section.experts is not None else ()),
            )  # fmt: skip
            return None
        return numbers

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
        numbers, count = _first_last(section.layers), _layers_of(kind, checkpoint)
        if numbers is None:
            self._wrong(
                f"actor {name}: layers {section.layers!r}: expected first-last, such as 0-14", "actors", name, "layers"
            )
            return None
        first, last = numbers
        if not first <= last < count:
            self._wrong(
                f"actor {name}: layers {first}-{last} are out of range; the model has 0-{count - 1}",
                "actors",
                name,
                "layers",
            )
            return None
        if first != last and kind.one_layer:
            self._wrong(
                f"actor {name}: kind {kind.name!r} holds one layer, got {first}-{last}; give one layer",
                "actors",
                name,
                "layers",
            )
        return first, last

    def layers(self, actors: Mapping[str, CheckedActor], checkpoint: Checkpoint | None) -> None:
        """Check that exactly one actor holds each layer of the model, or its attention in a mixture of experts."""
        if checkpoint is None:
            return
        holders = [actor for actor in actors.values() if actor.layers is not None and actor.kind.caches]
        if holders:
            self._each_once(holders, checkpoint.config.layers, "layers")
        encoders = [actor for actor in actors.values() if actor.layers is not None and actor.kind.encodes]
        if checkpoint.config.encoder is not None and (holders or encoders):
            self._each_once(encoders, checkpoint.config.encoder.layers, "layers of the encoder")

    def _each_once(self, holders: list[CheckedActor], count: int, what: str) -> None:
        owners: dict[int, str] = {}
        for actor in holders:
            assert actor.layers is not None
            own = range(actor.layers[0], actor.layers[1] + 1)
            doubled = [layer for layer in own if layer in owners]
            if doubled:
                self._wrong(
                    f"actor {actor.name}: actor {owners[doubled[0]]} already holds "
                    f"{'layer' if len(doubled) == 1 else 'layers'} {_ranges(doubled)}; give each layer to one actor",
                    *("actors", actor.name, "layers"),
                )
            owners.update(dict.fromkeys(own, actor.name))
        missing = [layer for layer in range(count) if layer not in owners]
        if missing:
            self._wrong(f"{what} missing: {_ranges(missing)}; add them to an actor", "actors", key=True)

    def journal(self, generates: bool) -> None:
        """Check that a graph with a journal generates tokens, since a journal holds nothing else."""
        if self.file.journal and not generates:
            self._wrong("journal is for graphs that generate tokens; remove the key", "journal", key=True)


def _layers_of(kind: Kind, checkpoint: Checkpoint) -> int:
    encoder = checkpoint.config.encoder
    return encoder.layers if kind.encodes and encoder is not None else checkpoint.config.layers


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _first_last(text: str | int | None) -> tuple[int, int] | None:
    """Return the bounds of `3-7`, or of `3`, which means `3-3`. Return None for any other text."""
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", str(text))
    return (int(match[1]), int(match[2] or match[1])) if match is not None else None
