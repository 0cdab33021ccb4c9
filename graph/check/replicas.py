"""Check that replica policies fit the graph, so that no row is lost or out of order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ranvier.actors.component.inside import READS
from ranvier.actors.protocol.host_spec import GATEWAY

from ..file.errors import Problem
from ..file.load import Document
from ..file.schema import GraphFile
from .checked import CheckedActor, CheckedEdge
from .findings import Findings


class ReplicaCheck(Findings):
    """Check the replicas of actors in a graph whose edges are known."""

    def __init__(
        self, document: Document, file: GraphFile, problems: list[Problem], actors: Mapping[str, CheckedActor]
    ) -> None:
        super().__init__(document, file, problems)
        self.actors = actors

    def policies(self, edges: Iterable[CheckedEdge], generates: bool) -> None:
        edges = list(edges)
        for actor in self.actors.values():
            policy, replicas = actor.policy, actor.section.replicas
            if policy.copies > replicas:
                self._no(
                    actor,
                    f"hedge {policy.copies} needs {policy.copies} replicas, got {replicas}; raise replicas or lower hedge",
                )
            if replicas > 1 and not actor.may_repeat:
                self._no(
                    actor,
                    f"endpoint {actor.section.endpoint} can be bound by only one of its {replicas} replicas; "
                    "remove the endpoint, or its port",
                )
            if generates and policy.opened is None:
                self._no(
                    actor,
                    f"policy {policy.name}{' with after' if policy.after else ''} would put tokens out of order: "
                    "a stream must stay at its replicas; use sticky, or hedge without after",
                )
            if actor.once and policy.opened is None:
                self._no(
                    actor,
                    f"only one replica of a session gets the `once` inputs ({', '.join(actor.once)}), but policy {policy.name} "
                    "sends later steps to other replicas; use sticky, or hedge without after",
                )
            if policy.by_load:
                self._one_sender(actor, edges)
            ports = {edge.out for edge in edges if edge.source == actor.name != edge.target}
            ports.discard(READS)  # the gateway takes any replica's
            if policy.copies > 1 and len(ports) > 1:
                self._no(
                    actor,
                    f"policy hedge: its outputs {', '.join(sorted(ports))} could come from different replicas for one step; "
                    "give it one output, or use another policy",
                )

    def _one_sender(self, actor: CheckedActor, edges: list[CheckedEdge]) -> None:
        """Check that one sender chooses the replica for all parts of a step.

        With a policy that goes by load, each sender decides from its own observations. So two senders could choose
        different replicas.
        """
        incoming = [edge for edge in edges if edge.target == actor.name != edge.source]
        if len(incoming) > 1:
            self._no(
                actor,
                f"{len(incoming)} edges lead to it ({', '.join(edge.name for edge in incoming)}), and each could choose "
                "another replica; use sticky, round_robin, or hedge without after",
            )
        for edge in incoming:
            if edge.source != GATEWAY and self.actors[edge.source].policy.copies > 1:
                self._no(
                    actor,
                    f"{edge.source} is hedged, so each step comes from several replicas, and each could choose another "
                    "replica; use sticky, round_robin, or hedge without after",
                )

    def _no(self, actor: CheckedActor, what: str) -> None:
        section = self.file.actors[actor.name]
        given = "policy" if "policy" in section.model_fields_set else "replicas"
        self._wrong(f"actor {actor.name}: {what}", "actors", actor.name, given)
