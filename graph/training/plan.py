"""What training makes of a checked graph: who learns, the links that gradients go back by, the schedule, every host's part.

Gradients go back along the edges that activations went: the same number, the ends swapped, messages of kind `grad`. Losses,
norms and the sums of shared weights have links of their own, numbered after the edges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ranvier.actors.protocol import schedule as schedules
from ranvier.actors.protocol.host_spec import GATEWAY, HostSpec
from ranvier.actors.protocol.schedule import Schedule, Stages
from ranvier.actors.protocol.training_spec import OUTPUT, Loss, Optimizer, TrainingLink, TrainingSpec
from ranvier.transport.format.tensor_spec import TensorSpec

from ..file.checked import Graph
from ..file.errors import GraphError
from ..file.training_section import TrainingSection
from ..plan.plan import Plan

NEXT = "target"
"""What the data calls the tokens that should come next."""


class TrainingError(GraphError):
    """A graph that cannot be trained as its file says."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A plan, and what training adds. `schedule` is one round's: a step's, or, asynchronously, what lies between two pauses.
    `steps_of_round` steps are one round."""

    plan: Plan
    section: TrainingSection
    stages: Stages
    schedule: Schedule
    steps_of_round: int
    losses: Mapping[str, tuple[Loss, ...]]
    learning: frozenset[str]
    links: Mapping[tuple[str, int], tuple[TrainingLink, ...]]
    shared: Mapping[str, Mapping[str, str]]
    targets: Mapping[str, TensorSpec]

    @property
    def graph(self) -> Graph:
        return self.plan.graph

    @property
    def rounds(self) -> int:
        return self.section.steps // self.steps_of_round

    @property
    def validate_rounds(self) -> int:
        """Rounds between two validations; 0: there are none."""
        return self.section.validate_.every // self.steps_of_round if self.section.validate_ is not None else 0

    @property
    def terms(self) -> dict[str, list[tuple[str, float]]]:
        """What the losses of each actor are called, and what they count."""
        made: dict[str, list[tuple[str, float]]] = {}
        for actor, losses in self.losses.items():
            ports = [loss.port for loss in losses]
            made[actor] = [
                (f"{actor}.{loss.port}" + (f" {loss.kind}" if ports.count(loss.port) > 1 else ""), loss.weight)
                for loss in losses
            ]
        return made

    @property
    def inputs(self) -> list[TrainingLink]:
        """The links by which data goes in."""
        return [link for link in self.links[GATEWAY, 0] if link.role == OUTPUT]

    @property
    def resumable(self) -> str:
        """16 hexadecimal digits over all that a checkpoint and who goes on from it must agree on."""
        left_out = set() if self.asynchronous else {"validate_", "save", "schedule", "recompute"}
        graph = self.graph
        told = [
            sorted(
                (name, actor.kind.implementation, actor.layers, actor.section.args, actor.section.replicas)
                for name, actor in graph.actors.items()
            ),
            [edge.name for edge in graph.edges],
            repr(graph.checkpoint.config) if graph.checkpoint is not None else None,
            self.section.model_dump(exclude=left_out),
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def asynchronous(self) -> bool:
        return self.section.schedule == "async"

    @property
    def updates(self) -> int:
        """Of each stage, over the whole training."""
        of_round = sum(action.kind == schedules.UPDATE for action in next(iter(self.schedule.stages.values())))
        return of_round * self.rounds

    def _share(self, replicas: int) -> float:
        """What a micro-batch counts of an update."""
        if self.asynchronous:
            return 1 / self.section.accumulate
        return (replicas if self.section.average_every else 1) / self.section.micro_batches

    def optimizer(self) -> Optimizer:
        return Optimizer(**self.section.optimizer.model_dump())

    def hosts(self, run_dir: Path, sockets: Path, out: Path, first: int, resume: Path | None) -> list[HostSpec]:
        """Every host's part. `first`: the round to begin with; `resume`: the folder of the shards to go on from."""
        section = self.section
        made = []
        for spec in self.plan.place(run_dir, sockets):
            actor = self.graph.actors[spec.actor]
            validate = section.validate_
            training = TrainingSpec(
                links=self.links[spec.actor, spec.replica],
                replicas=actor.section.replicas,
                average_every=section.average_every,
                losses=self.losses.get(spec.actor, ()),
                actions=tuple(map(str, self.schedule.stages[spec.actor])),
                micro_batches=self.schedule.micro_batches,
                of_step=section.micro_batches,
                rounds=self.rounds,
                updates=self.updates,
                optimizer=self.optimizer(),
                kind=actor.kind.name,
                share=self._share(actor.section.replicas),
                first=first,
                context=section.data.context,
                trains=spec.actor in self.learning,
                stashes=self.asynchronous,
                recompute=section.recompute,
                validate_every=self.validate_rounds,
                validation=validate.batches if validate is not None else 0,
                save_every=section.save.every // self.steps_of_round if section.save is not None else 0,
                folder=str(out),
                resume=str(resume) if resume is not None else None,
                seed=section.seed,
                lora=(section.lora.rank, section.lora.alpha / section.lora.rank) if section.lora is not None else None,
                shared=self.shared.get(spec.actor, {}),
            )
            made.append(replace(spec, links=(), training=training))
        return made
