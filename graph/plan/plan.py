"""Resolve a graph into a plan: processes, endpoints, links, bytes and credits, as plain data that prints."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.component.devices import CPU
from ranvier.actors.component.kinds import Kind
from ranvier.actors.model import weights
from ranvier.actors.model.kernels import native
from ranvier.actors.protocol.host_spec import (
    GATEWAY,
    Deadlines,
    HostLink,
    HostSpec,
    PortSpec,
    RecordSpec,
    Restart,
)
from ranvier.transport.format import codec
from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.host_id import HostId
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links import codec_choice
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.system import usable_cores
from ranvier.transport.wires.endpoint import parse, settled

from ..check.checked import CheckedActor, CheckedEdge, Graph
from ..file.actor_section import ActorSection, Quorum, RestartSection

EPOCH = 1
"""The epoch of the hosts that a run starts with. A restarted host has the next one."""
Live = Mapping[str, Mapping[int, int]]
"""The epoch of each live replica, by actor and replica."""
_GATEWAY = {0: EPOCH}


@dataclass(frozen=True, slots=True)
class PlannedHost:
    """Describe the processes of one actor, one per replica: what each of them runs and holds."""

    actor: str
    kind: str
    layers: tuple[int, int] | None
    threads: int
    cpus: list[int] | None
    weight_bytes: int
    cache_bytes_per_token: int
    cache_tokens: int
    replicas: int
    policy: str
    host: str | None
    """Name of the process that it shares with other actors."""


@dataclass(frozen=True, slots=True)
class PlannedEdge:
    """Describe one edge, with its bytes per token before and after the codec.

    Where the codec compresses, the bytes after it are a maximum. Both are None if the tensor's size does not follow
    from the number of tokens.
    """

    index: int
    name: str
    tensor: str
    bytes_per_token: int | None
    wire_bytes_per_token: int | None
    codec: str
    credits_messages: int
    credits_bytes: int
    feedback: bool
    wire: str
    """ipc, local or tcp; or memory, between actors of one process."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Describe a run of the graph before it starts. Both ends of a link must agree on `hash`."""

    graph: Graph
    hash: str
    hosts: tuple[PlannedHost, ...]
    edges: tuple[PlannedEdge, ...]
    products: str | None
    """`repeatable` or `fast`; None without a model, or if its dtype is float32."""

    def to_plain(self) -> dict[str, Any]:
        """Return the plan as plain data, for `--json` and the run folder."""
        return {
            "name": self.graph.name,
            "hash": self.hash,
            "products": self.products,
            "prefill_chunk": self.graph.prefill_chunk,
            "hosts": [{name: getattr(host, name) for name in PlannedHost.__slots__} for host in self.hosts],
            "edges": [{name: getattr(edge, name) for name in PlannedEdge.__slots__} for edge in self.edges],
        }

    @property
    def replicas(self) -> int:
        """Return the number of hosts that the run starts with. Some may share a process."""
        return sum(host.replicas for host in self.hosts)

    @property
    def processes(self) -> int:
        """Return the number of processes that the run starts with."""
        return _processes(self.graph)

    @property
    def shared(self) -> list[tuple[str, ...]]:
        """Return the actors of each process, of one replica each."""
        return shared(self.graph)

    @property
    def live(self) -> dict[str, dict[int, int]]:
        """Return the replicas that a run starts with, and their epochs."""
        actors = self.graph.actors.values()
        return {actor.name: dict.fromkeys(range(actor.section.replicas), EPOCH) for actor in actors}

    def keys(self, run_dir: Path) -> Path | None:
        """Return the folder of the keys for tcp: the graph's, or the run's own. None if no edge uses tcp."""
        if self.graph.keys is not None or all(edge.wire != "tcp" for edge in self.edges):
            return self.graph.keys
        return run_dir / "keys"

    def links(self, actor: str, replica: int, live: Live) -> tuple[HostLink, ...]:
        """Return the links of one host, or of the gateway, to all `live` hosts.

        An actor's edge to itself stays in the replica.
        """
        return tuple(self._links(actor, replica, live))

    def _links(self, actor: str, replica: int, live: Live) -> Iterator[HostLink]:
        graph = self.graph
        for index, edge in enumerate(graph.edges):
            loop = edge.source == edge.target
            if edge.source == actor:
                skips = sum(e.target == edge.target != e.source for e in graph.edges) == 1
                for other in [replica] if loop else live.get(edge.target, _GATEWAY):
                    yield HostLink(
                        edge.out, self._link(index, edge, replica, other, live), True, edge.feedback, edge.until,
                        edge.at_most, policy=graph.policy(edge.target), skips=skips, tap=edge.tap,
                        asked=edge.into if graph.read_by_client(edge) else "",
                    )  # fmt: skip
            if edge.target == actor:
                repeats = not loop and graph.policy(edge.source).copies > 1
                for other in [replica] if loop else live.get(edge.source, _GATEWAY):
                    link = self._link(index, edge, other, replica, live)
                    yield HostLink(edge.into, link, outgoing=False, feedback=edge.feedback, repeats=repeats)

    def host_specs(self, run_dir: Path, sockets: Path) -> list[HostSpec]:
        """Return the specs of all hosts, with their endpoints under `sockets`.

        Raises:
            AddressError: a socket's path would be too long.
        """
        live = self.live
        return [self.host(actor, replica, live, run_dir, sockets) for actor in live for replica in live[actor]]

    def gateway_endpoint(self, sockets: Path) -> str:
        return self._endpoint(None, GATEWAY, sockets)

    def _endpoint(self, given: str | None, name: str, sockets: Path) -> str:
        if given is None:
            transport = self.graph.file.transport
            given = transport if transport.startswith("tcp") else f"{transport}://{sockets / name}"
        return str(parse(settled(given, self.graph.folder), guarded=self.graph.keys is not None))

    def _link(self, index: int, edge: CheckedEdge, source: int, target: int, live: Live) -> LinkSpec:
        return LinkSpec(
            edge=index,
            name=edge.name,
            source=HostId(edge.source, source, live.get(edge.source, _GATEWAY)[source]),
            target=HostId(edge.target, target, live.get(edge.target, _GATEWAY)[target]),
            tensors=((edge.out, edge.spec),),
            credits_messages=edge.credits_messages,
            credits_bytes=edge.credits_bytes,
            wire=self.edges[index].wire,
            codec=edge.codec,
            prompt=self.graph.policy(edge.target).by_load,
        )

    @property
    def _batches(self) -> int:
        """Return the number of batches that the sessions of a token loop are split into, at every actor.

        There is one batch for each process with layers, but at most one per core. It is not enough that the first actor
        splits the sessions: an actor with two batches in its queue would merge them, and its neighbours would wait.
        """
        comes_back = any(edge.feedback and edge.into == "token" for edge in self.graph.edges)
        caching = [any(self.graph.actors[name].kind.caches for name in actors) for actors in self.shared]
        stages = sum(caching)  # actors of one process take turns
        return max(1, min(stages, len(usable_cores()))) if comes_back and self.graph.generates else 1

    def host(self, name: str, replica: int, live: Live, run_dir: Path, sockets: Path) -> HostSpec:
        """Return the spec of one replica of an actor. `live` holds all replicas, this one included.

        Raises:
            AddressError: a socket's path would be too long.
        """
        actor = self.graph.actors[name]
        file, section = self.graph.file, actor.section
        epoch = live[name][replica]
        own = HostId(name, replica, epoch).file
        checkpoint = self.graph.checkpoint
        return HostSpec(
            actor=actor.name,
            replica=replica,
            epoch=epoch,
            graph_hash=self.hash,
            implementation=implementation_of(actor.kind, checkpoint),
            folder=actor.kind.folder,
            args=section.args,
            model=str(checkpoint.path) if checkpoint is not None and actor.kind.uses_model else None,
            dtype=file.model.dtype if file.model is not None else "float32",
            layers=actor.layers,
            cache_tokens=section.cache_tokens,
            threads=_threads(self.graph, section),
            cpus=section.cpus,
            needed=_needed(section),
            experts=actor.experts,
            batches=self._batches,
            precision=file.model.weights if file.model is not None else "dtype",
            fast=self.products == "fast",
            weights=str(actor.weights) if actor.weights is not None else None,
            own_autograd=actor.own_autograd,
            device=section.device,
            device_bytes=0 if section.device == CPU else actor.weight_bytes(file.model, checkpoint),
            inputs=_ports(actor.inputs, actor.once),
            outputs=_ports(actor.outputs),
            links=self.links(name, replica, live),
            endpoint=self._endpoint(section.endpoint, own, sockets),
            control=str(parse(f"ipc://{sockets / own}.c")),
            supervisor=str(parse(f"ipc://{sockets / 'supervisor'}")),
            run_dir=str(run_dir),
            max_frame_bytes=file.max_frame_bytes,
            record=self._record(name),
            shared_from_bytes=file.shared_from_bytes,
            keys=str(keys) if (keys := self.keys(run_dir)) is not None else None,
            batch_tokens=section.batch_tokens,
            tap_folder=str(self.graph.folder.resolve()),
            trace=bool(file.trace),
            trace_sample=file.sampling.sample,
            trace_bytes=file.sampling.megabytes << 20,
            supervision=Deadlines(**file.supervision.model_dump()),
            restart=_restart(section.restart or file.restart),
            host=section.host,
        )

    def _record(self, name: str) -> RecordSpec | None:
        """Return which inputs and outputs of an actor are recorded, or None if none are."""
        section, edges = self.graph.file.record, self.graph.recorded
        inputs = tuple(dict.fromkeys(edge.into for edge in edges if edge.target == name))
        outputs = tuple(dict.fromkeys(edge.out for edge in edges if edge.source == name))
        if section is None or not (inputs or outputs):
            return None
        return RecordSpec(inputs, outputs, section.megabytes << 20)


def plan(graph: Graph) -> Plan:
    """Resolve a checked graph into a plan. This starts and opens nothing."""
    edges = tuple(_edge(graph, index, edge) for index, edge in enumerate(graph.edges))
    hosts = tuple(_planned(graph, actor) for actor in graph.actors.values())
    return Plan(graph, _hash(graph), hosts, edges, products(graph))


def products(graph: Graph) -> str | None:
    """Return how the model's products are computed: as the graph says, or repeatable if that costs this processor little.

    Only the kernels can repeat a product whatever the number of tokens; torch's libraries choose by it.
    """
    model, checkpoint = graph.file.model, graph.checkpoint
    if model is None or checkpoint is None or model.dtype == "float32":
        return None
    if model.products is not None:
        return model.products
    there = native.library() is not None and model.dtype == "bfloat16" and weights.repeats(checkpoint.config)
    return "repeatable" if there and native.repeatable_is_cheap() else "fast"


def implementation_of(kind: Kind, checkpoint: Checkpoint | None) -> str:
    """Return the class that runs an actor of a kind with this model."""
    if checkpoint is not None and checkpoint.config.encoder is not None and kind.seq2seq is not None:
        return kind.seq2seq
    if kind.foreign is not None and checkpoint is not None and not checkpoint.config.runs(blocks=kind.holds_blocks):
        return kind.foreign
    return kind.implementation


def _threads(graph: Graph, section: ActorSection) -> int:
    """Return the given number of threads, or the process's share of the cores.

    Processes that compute at the same time must not wait for each other's threads.
    """
    return section.threads or max(1, len(section.cpus or usable_cores()) // _processes(graph))


def shared(graph: Graph) -> list[tuple[str, ...]]:
    """Return the actors of each process, of one replica each."""
    found: dict[tuple[str, bool], list[str]] = {}
    for name, actor in graph.actors.items():
        found.setdefault((actor.section.host or name, actor.section.host is not None), []).append(name)
    return [tuple(names) for names in found.values()]


def _processes(graph: Graph) -> int:
    return sum(graph.actors[actors[0]].section.replicas for actors in shared(graph))


def _restart(given: RestartSection | str) -> Restart:
    return Restart(**given.model_dump()) if isinstance(given, RestartSection) else Restart(max=0)


def _needed(section: ActorSection) -> int | None:
    """Return how many inputs a step needs, or None for all."""
    if isinstance(section.join, Quorum):
        return section.join.quorum
    return 1 if section.join == "first" else None


def _policy(actor: CheckedActor) -> str:
    policy = actor.policy
    if policy.name != "hedge":
        return policy.name
    return f"hedge {policy.copies}" + (f" after p{policy.after}" if policy.after else "")


def _planned(graph: Graph, actor: CheckedActor) -> PlannedHost:
    itemsize = BY_NAME[graph.file.model.dtype].itemsize if graph.file.model is not None else 0
    layers = actor.layers
    cached = 0
    if actor.kind.caches and graph.checkpoint is not None:
        count = layers[1] - layers[0] + 1 if layers is not None else graph.checkpoint.config.layers
        cached = graph.checkpoint.config.kv_elements_per_token_and_layer * count * itemsize
    return PlannedHost(
        actor=actor.name,
        kind=actor.kind.name,
        layers=layers,
        threads=_threads(graph, actor.section),
        cpus=actor.section.cpus,
        weight_bytes=actor.weight_bytes(graph.file.model, graph.checkpoint),
        cache_bytes_per_token=cached,
        cache_tokens=actor.section.cache_tokens if cached else 0,
        replicas=actor.section.replicas,
        policy=_policy(actor),
        host=actor.section.host,
    )


def _edge(graph: Graph, index: int, edge: CheckedEdge) -> PlannedEdge:
    return PlannedEdge(
        index, edge.name, str(edge.spec), bytes_per_token(edge.spec), _wire_bytes(edge), edge.codec,
        edge.credits_messages, edge.credits_bytes, edge.feedback, _wire(graph, edge),
    )  # fmt: skip


def _wire(graph: Graph, edge: CheckedEdge) -> str:
    """Return the kind of wire of an edge. It is tcp if one end of the edge listens on tcp, and memory within a process."""
    if graph.together(edge.source, edge.target):
        return "memory"
    sections = [graph.file.actors.get(end) for end in (edge.source, edge.target)]
    given = [section.endpoint if section is not None else None for section in sections]
    kinds = {(address or graph.file.transport).partition(":")[0] for address in given}
    return "tcp" if "tcp" in kinds else kinds.pop()


def bytes_per_token(spec: TensorSpec) -> int | None:
    """Return the bytes of one token, or of one row.

    Return None if the first dimension is neither tokens nor rows, or if another dimension has no fixed size.
    """
    if not spec.shape or spec.shape[0] not in ("tokens", "rows"):
        return None
    sizes = [size for size in spec.shape[1:] if isinstance(size, int)]
    return math.prod(sizes) * BY_NAME[spec.dtype].itemsize if len(sizes) == len(spec.shape) - 1 else None


def _wire_bytes(edge: CheckedEdge) -> int | None:
    if bytes_per_token(edge.spec) is None:
        return None
    if codec_choice.candidates(edge.codec) is not None:
        return bytes_per_token(edge.spec)  # at most
    made, itemsize = codec.parse(edge.codec), BY_NAME[edge.spec.dtype].itemsize
    shape = (1, *(size for size in edge.spec.shape[1:] if isinstance(size, int)))
    if made.form == codec.TOPK:
        return codec.kept(math.prod(shape), made.share) * (codec.INDEX_BYTES + itemsize)
    return codec.form_bytes(made.form, itemsize, shape)[1]


def _ports(ports: Mapping[str, TensorSpec], once: Sequence[str] = ()) -> tuple[PortSpec, ...]:
    return tuple(PortSpec(name, spec, name in once) for name, spec in ports.items())


def _hash(graph: Graph) -> str:
    """Return a hash, 16 hexadecimal digits, of what both ends of a link must agree on.

    That is the expanded file and the model's architecture.
    """
    config = graph.checkpoint.config if graph.checkpoint is not None else None
    text = json.dumps([graph.expanded(), repr(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
