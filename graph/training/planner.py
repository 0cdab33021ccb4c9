"""Make the training plan of a checked graph: which actors learn, which losses are minimised, links and schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ranvier.actors.component.kinds import BUILT_IN
from ranvier.actors.errors import words
from ranvier.actors.model import weights
from ranvier.actors.protocol import schedule as schedules
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.protocol.schedule import Schedule, ScheduleError, Stages
from ranvier.actors.protocol.training_spec import (
    BALANCE,
    INPUT,
    INPUT_GRADIENT,
    LOGITS,
    LOSS,
    NORM,
    OUTPUT,
    OUTPUT_GRADIENT,
    RING,
    SHARED,
    TARGET,
    Loss,
    TrainingLink,
)
from ranvier.transport.files import read_text
from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.header import GRAD, STATE
from ranvier.transport.format.host_id import HostId
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links.link import LinkSpec

from ..check.checked import CheckedActor, CheckedEdge, Graph
from ..file.edge_end import End
from ..file.errors import Problem
from ..plan.plan import EPOCH, plan
from .plan import NEXT, TrainingError, TrainingPlan

CREDIT_BYTES = 1 << 30
_NUMBER = TensorSpec("float64", (1,))

MOST_BYTES = 1 << 20
"""Size limit of a schedule file."""


def training_plan(graph: Graph) -> TrainingPlan:
    """Return the training plan of a graph.

    Raises:
        TrainingError: the graph cannot be trained; the error says why and what to do.
    """
    return _Planning(graph).made()


LEARN = tuple(kind.name for kind in BUILT_IN.values() if kind.learns)
"""The built-in kinds that can be trained."""


class _Planning:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        if graph.file.training is None:
            raise self._wrong("there is no training: in this file; add it, with data, batch and steps")
        self.section = graph.file.training
        self.edges = [(index, edge) for index, edge in enumerate(graph.edges) if self._carries(edge)]
        self.next_number = len(graph.edges)
        self.links: dict[tuple[str, int], list[TrainingLink]] = {
            (name, replica): [] for name in (*graph.actors, GATEWAY) for replica in range(self._replicas(name))
        }

    def _wrong(self, what: str, *at: str | int) -> TrainingError:
        document = self.graph.document
        return TrainingError(document.file, [Problem(f"training: {what}", document.at("training", *at))])

    def _carries(self, edge: CheckedEdge) -> bool:
        """Return whether an edge takes part in training. Edges to the client and the feedback of tokens do not.

        Raises:
            TrainingError: the edge is feedback of anything but tokens.
        """
        if edge.target == GATEWAY:
            return False
        if edge.feedback:
            if edge.out == "token" and self.graph.generates:
                return False
            raise self._wrong(
                f"edge {edge.name} is feedback, and loops cannot be trained; write the rounds out as actors"
            )
        return True

    def made(self) -> TrainingPlan:
        section, graph = self.section, self.graph
        for name in section.frozen:
            if name not in graph.actors:
                raise self._wrong(f"frozen: no actor is called {name!r}; there are {', '.join(graph.actors)}", "frozen")
        if section.batch % section.micro_batches:
            raise self._wrong(
                f"a batch of {section.batch} cannot be cut into {section.micro_batches} micro-batches of one size; change one",
                "micro_batches",
            )
        for actor in graph.actors.values():
            self._check(actor)
        stages = self._stages()
        losses = self._losses()
        learning = frozenset(name for name, actor in graph.actors.items() if self._learns(actor))
        steps_of_round = self._steps_of_round()
        schedule = self._schedule(stages, steps_of_round)
        self._link_edges(learning)
        targets = self._link_losses(losses)
        shared = self._share(learning)
        if section.optimizer.clip is not None and section.schedule != "async" and not section.average_every:
            self._link_norms(stages)
        self._link_rings()
        return TrainingPlan(
            plan(graph), section, stages, schedule, steps_of_round, losses, learning,
            {host: tuple(links) for host, links in self.links.items()}, shared, targets,
        )  # fmt: skip

    def _learns(self, actor: CheckedActor) -> bool:
        """Return whether an actor learns. With LoRA, built-in kinds learn only if they have blocks."""
        has_blocks = actor.layers is not None or actor.kind.whole or not actor.kind.uses_model
        return (self.section.lora is None or has_blocks) and actor.name not in self.section.frozen

    # -- what can be trained --------------------------------------------------------------------------------------

    def _check(self, actor: CheckedActor) -> None:
        kind, checkpoint = actor.kind, self.graph.checkpoint
        self._check_replicas(actor)
        if kind.uses_model:
            config = checkpoint.config if checkpoint is not None else None
            if not kind.learns or config is None or not (config.native or config.experts) or config.encoder:
                raise self._wrong(
                    f"actor {actor.name}: kind {kind.name} of this model can run, but cannot be trained; kinds that "
                    f"can are {', '.join(LEARN)} of llama, mistral, qwen2, qwen3, gemma3, gpt2, mixtral, "
                    "qwen2_moe and qwen3_moe"
                )
            if self.graph.file.model is not None and self.graph.file.model.weights != "dtype":
                raise self._wrong(f"model: weights: {self.graph.file.model.weights} cannot be trained; leave it out")
        for port, spec in actor.inputs.items():
            if "rows" in spec.shape:
                raise self._wrong(
                    f"actor {actor.name}: input {port} is {spec}: micro-batches are one row each; write another name than rows"
                )

    def _check_replicas(self, actor: CheckedActor) -> None:
        section, count = self.section, actor.section.replicas
        if count == 1:
            return
        if section.schedule == "async":
            raise self._wrong(
                f"actor {actor.name}: {count} replicas: async allows only one; leave replicas out", "schedule"
            )
        if section.micro_batches % count:
            raise self._wrong(
                f"actor {actor.name}: {count} replicas cannot share {section.micro_batches} micro-batches; give a multiple",
                "micro_batches",
            )
        if section.validate_ is not None and section.validate_.batches % count:
            raise self._wrong(
                f"actor {actor.name}: {count} replicas cannot share {section.validate_.batches} batches; give a multiple",
                "validate",
            )
        pauses = [pause.every for pause in (section.validate_, section.save) if pause is not None]
        for every in [section.steps, *pauses] if section.average_every else []:
            if every % section.average_every:
                raise self._wrong(
                    f"average_every: {section.average_every} does not divide {every} steps, after which all replicas "
                    "must be the same",
                    "average_every",
                )

    def _replicas(self, name: str) -> int:
        return self.graph.actors[name].section.replicas if name in self.graph.actors else 1

    def _stages(self) -> Stages:
        pairs = [(edge.source, edge.target) for _, edge in self.edges if edge.source != GATEWAY]
        order: list[str] = []
        while len(order) < len(self.graph.actors):
            order += [
                name
                for name in self.graph.actors
                if name not in order and all(source in order for source, target in pairs if target == name)
            ]
        workers = {}
        for name, actor in self.graph.actors.items():
            if actor.section.cpus is not None:
                workers[name] = ",".join(map(str, actor.section.cpus))
        return Stages(tuple(order), tuple(dict.fromkeys(pairs)), workers)

    def _losses(self) -> dict[str, tuple[Loss, ...]]:
        graph = self.graph
        ends = [name for name, actor in graph.actors.items() if actor.kind.ends]
        given = [
            (loss.output, Loss(loss.output.port, loss.kind, loss.target, loss.weight)) for loss in self.section.loss
        ]
        if not given and ends:
            given = [(End(ends[0], LOGITS), Loss(LOGITS, "cross_entropy", NEXT))]
        if not given:
            raise self._wrong("no loss; add loss: [{of: ACTOR.PORT, kind: cross_entropy, target: NAME}]")
        made: dict[str, list[Loss]] = {}
        for of, loss in given:
            name, kind = of.actor, loss.kind
            actor = graph.actors.get(name)
            outputs = self._minimised(actor) if actor is not None else []
            if loss.port not in outputs:
                there = f"it has {', '.join(outputs)}" if actor is not None else f"there are {', '.join(graph.actors)}"
                raise self._wrong(f"loss of {of}: no such output; {there}", "loss")
            if (kind == "mean") != (loss.target is None):
                raise self._wrong(
                    f"loss of {of}: {kind} takes {'no' if kind == 'mean' else 'a'} target; change it", "loss"
                )
            made.setdefault(name, []).append(loss)
        return {name: tuple(losses) for name, losses in made.items()}

    def _minimised(self, actor: CheckedActor) -> list[str]:
        """Return the outputs that a loss may be computed from."""
        kind, checkpoint = actor.kind, self.graph.checkpoint
        made = [LOGITS] if kind.ends else list(actor.outputs)
        mixes = checkpoint is not None and checkpoint.config.experts and kind.caches
        return [*made, BALANCE] if mixes and (actor.layers is not None or kind.whole) else made

    def _steps_of_round(self) -> int:
        """Return the number of steps in a round. Asynchronous stages stop only for validation, saving, and the end."""
        section = self.section
        pauses = {
            name: pause.every
            for name, pause in (("validate", section.validate_), ("save", section.save))
            if pause is not None
        }
        if section.schedule != "async":
            return 1
        found = math.gcd(section.steps, *pauses.values())
        for name, every in pauses.items():
            if section.steps % every:
                raise self._wrong(
                    f"{name}: every {every} of {section.steps} steps: async stops there; give a divisor of the steps",
                    name,
                    "every",
                )
        return found

    def _schedule(self, stages: Stages, steps_of_round: int) -> Schedule:
        section = self.section
        count = section.micro_batches * steps_of_round
        try:
            if section.schedule in schedules.NAMES:
                made = schedules.make(section.schedule, stages, count, section.accumulate)
            else:
                file = (self.graph.folder / section.schedule).resolve()
                if not file.is_relative_to(self.graph.folder.resolve()):
                    raise self._wrong(f"schedule {section.schedule!r} leaves the graph's folder", "schedule")
                made = schedules.parse(read_text(file, MOST_BYTES), stages)
                if made.micro_batches != section.micro_batches:
                    raise self._wrong(
                        f"schedule {section.schedule} has {made.micro_batches} micro-batches, micro_batches is "
                        f"{section.micro_batches}; make them the same",
                        "schedule",
                    )
            schedules.check(made, stages)
        except ScheduleError as error:
            raise self._wrong(f"schedule {section.schedule}: {error}", "schedule") from None
        except (OSError, UnicodeDecodeError) as error:
            raise self._wrong(
                f"schedule {section.schedule!r}: neither one of {', '.join(schedules.NAMES)} nor a file: {words(error)}",
                "schedule",
            ) from None
        return made

    # -- links ----------------------------------------------------------------------------------------------------

    def _link_edges(self, learning: frozenset[str]) -> None:
        reached = set(learning)
        for _ in self.graph.actors:
            reached |= {edge.target for _, edge in self.edges if edge.source in reached}
        for index, edge in self.edges:
            there = self._link(index, edge.name, edge.source, edge.target, edge.out, edge.spec, edge.codec)
            self._add_all(OUTPUT, edge.out, INPUT, edge.into, there)
            if edge.source in reached and BY_NAME[edge.spec.dtype].floats:
                name = f"{edge.name} (gradient)"
                back = self._link(index, name, edge.target, edge.source, edge.out, edge.spec, edge.gradient_codec)
                self._add_all(INPUT_GRADIENT, edge.into, OUTPUT_GRADIENT, edge.out, replace(back, kind=GRAD))

    def _link_rings(self) -> None:
        for name in self.graph.actors:
            count = self._replicas(name)
            for replica in range(count) if count > 1 else ():
                following = (replica + 1) % count
                if replica == 0:
                    link = self._own(f"{name} (ring)", name, name, "part", TensorSpec("float32", ("tokens",)))
                self._add(RING, name, RING, name, link, replica, following)

    def _link_losses(self, losses: Mapping[str, Sequence[Loss]]) -> dict[str, TensorSpec]:
        targets: dict[str, TensorSpec] = {}
        for name, terms in losses.items():
            actor = self.graph.actors[name]
            for target in dict.fromkeys(term.target for term in terms if term.target is not None):
                term = next(term for term in terms if term.target == target)
                spec = (
                    TensorSpec("int64", ("tokens",))
                    if term.port not in actor.outputs or actor.kind.uses_model
                    else None
                )
                if spec is None:
                    made = actor.outputs[term.port]
                    spec = TensorSpec("int64", made.shape[:-1]) if term.kind == "cross_entropy" else made
                targets[target] = spec
                link = self._own(f"{GATEWAY}.{target} -> {name} (target)", GATEWAY, name, target, spec)
                self._add_all(OUTPUT, target, TARGET, target, link)
            spec = TensorSpec("float64", ("tokens", len(terms), 2))
            self._add_all(
                LOSS, "loss", LOSS, name, self._own(f"{name} -> {GATEWAY} (loss)", name, GATEWAY, "loss", spec)
            )
        return targets

    def _link_norms(self, stages: Stages) -> None:
        for name in stages.names:
            for other in (*stages.names, *((GATEWAY,) if name == stages.names[0] else ())):
                link = self._own(f"{name} -> {other} (norm)", name, other, "norm", _NUMBER)
                for replica in range(self._replicas(other)):  # all replicas have the same norm; the first one sends it
                    if (other, replica) != (name, 0):
                        self._add(NORM, other, NORM, name, link, 0, replica)

    def _share(self, learning: frozenset[str]) -> dict[str, dict[str, str]]:
        """Link the two ends of a tied model. Both hold the same matrix, and the gradients of both are added up.

        Return the shared weights of each actor, and which actor adds up their gradients.
        """
        graph = self.graph
        if graph.checkpoint is None or not graph.checkpoint.config.tied or self.section.lora is not None:
            return {}  # with LoRA the matrix itself does not change
        begins = [name for name, actor in graph.actors.items() if actor.kind.begins and not actor.kind.whole]
        ends = [name for name, actor in graph.actors.items() if actor.kind.ends and not actor.kind.whole]
        if not begins or not ends:
            return {}
        [first], [last] = begins, ends
        if (first in learning) != (last in learning):
            raise self._wrong(
                f"frozen: {first} and {last} hold one matrix (the model is tied); freeze both or none", "frozen"
            )
        if first not in learning:
            return {}
        if self._replicas(first) > 1 or self._replicas(last) > 1:
            raise self._wrong(f"{first} and {last} hold one matrix (the model is tied): give each of them one replica")
        [slot] = [slot for slot in weights.embedding(graph.checkpoint.config) if slot.name == "embedding"]
        spec = TensorSpec("float32", slot.shape)
        there = self._own(f"{last} -> {first} (shared)", last, first, "embedding", spec)
        self._add(SHARED, f"{first}/head", SHARED, f"{last}/embedding", there)
        back = self._own(f"{first} -> {last} (shared)", first, last, "embedding", spec)
        self._add(SHARED, f"{last}/embedding", SHARED, f"{first}/head", back)
        return {first: {"embedding": first}, last: {"head": first}}

    def _own(self, name: str, source: str, target: str, port: str, spec: TensorSpec) -> LinkSpec:
        """Return a link that is not an edge of the graph."""
        number = self.next_number
        self.next_number += 1
        return replace(self._link(number, name, source, target, port, spec), kind=STATE)

    def _link(
        self, number: int, name: str, source: str, target: str, port: str, spec: TensorSpec, codec: str = "raw"
    ) -> LinkSpec:
        return LinkSpec(
            number, name, HostId(source, 0, EPOCH), HostId(target, 0, EPOCH), ((port, spec),),
            credits_messages=2 * self.section.micro_batches + 8, credits_bytes=CREDIT_BYTES,
            wire=self.graph.file.transport.partition(":")[0], codec=codec,
        )  # fmt: skip

    def _add_all(self, outgoing: str, port: str, incoming: str, into: str, link: LinkSpec) -> None:
        """Add links between all replicas that have a micro-batch in common.

        Replica r of n takes the micro-batches whose number modulo n is r.
        """
        ours, theirs = self._replicas(link.source.actor), self._replicas(link.target.actor)
        pairs = {(number % ours, number % theirs) for number in range(math.lcm(ours, theirs))}
        for replica, other in sorted(pairs):
            self._add(outgoing, port, incoming, into, link, replica, other, ours, theirs)

    def _add(
        self, outgoing: str, port: str, incoming: str, into: str, link: LinkSpec, replica: int = 0, other: int = 0,
        ours: int = 1, theirs: int = 1,
    ) -> None:  # fmt: skip
        source, target = link.source.actor, link.target.actor
        link = replace(link, source=HostId(source, replica, EPOCH), target=HostId(target, other, EPOCH))
        at, there = (other, replica) if ours * theirs > 1 else (0, 0)
        self.links[source, replica].append(TrainingLink(outgoing, port, link, True, theirs, at if theirs > 1 else 0))
        self.links[target, other].append(TrainingLink(incoming, into, link, False, ours, there if ours > 1 else 0))
