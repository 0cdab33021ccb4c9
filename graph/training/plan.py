"""Define the training plan of a graph: which actors learn, gradient links, the schedule, and every host's part.

Gradients go back along the edges of the activations: the same number, the ends swapped, messages of kind `grad`.
Losses, norms and the sums of shared weights have separate links, numbered after the edges.
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

from ..check.checked import Graph
from ..file.errors import GraphError
from ..file.training_section import TrainingSection
from ..plan.plan import Plan

NEXT = "target"
"""The name, in the data, of the next tokens, which a language model learns to predict."""


class TrainingError(GraphError):
    """Report that a graph cannot be trained as its file says."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Extend a plan with what training needs.

    `schedule` covers one round of `steps_of_round` steps. A round is one step or, with an asynchronous schedule, all
    steps between two pauses.
    """

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
        """Return the number of rounds between two validations, or 0 without validation."""
        return self.section.validate_.every // self.steps_of_round if self.section.validate_ is not None else 0

    @property
    def terms(self) -> dict[str, list[tuple[str, float]]]:
        """Return the names and weights of the losses, by actor."""
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
        """Return the links that carry data from the gateway to the hosts."""
        return [link for link in self.links[GATEWAY, 0] if link.role == OUTPUT]

    @property
    def resumable(self) -> str:
        """Return a hash (16 hexadecimal digits) of all that a checkpoint and a training that resumes it must share."""
        left_out = set() if self.asynchronous else {"validate_", "save", "schedule", "recompute"}
        graph = self.graph
        lines = [
            sorted(
                (name, actor.kind.implementation, actor.layers, actor.section.args, actor.section.replicas)
                for name, actor in graph.actors.items()
            ),
            [edge.name for edge in graph.edges],
            repr(graph.checkpoint.config) if graph.checkpoint is not None else None,
            self.section.model_dump(exclude=left_out),
        ]
        return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def asynchronous(self) -> bool:
        return self.section.schedule == "async"

    @property
    def updates(self) -> int:
        """Return the number of updates of each stage over the whole training."""
        of_round = sum(action.kind == schedules.UPDATE for action in next(iter(self.schedule.stages.values())))
        return of_round * self.rounds

    def _share(self, replicas: int) -> float:
        """Return the weight of one micro-batch in an update."""
        if self.asynchronous:
            return 1 / self.section.accumulate
        return (replicas if self.section.average_every else 1) / self.section.micro_batches

    def optimizer(self) -> Optimizer:
        return Optimizer(**self.section.optimizer.model_dump())

    def hosts(self, run_dir: Path, sockets: Path, out: Path, first: int, resume: Path | None) -> list[HostSpec]:
        """Return the specs of all hosts, each with its part in the training.

        `first` is the round to begin with. `resume` is the folder of the shards to continue from, if any.
        """
        section = self.section
        made = []
        for spec in self.plan.host_specs(run_dir, sockets):
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
            made.append(replace(spec, links=(), training=training, host=None))
        return made
