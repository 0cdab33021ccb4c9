"""Define the checked graph: actors whose kinds, ports and weights are known, and edges between ports that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ranvier.actors.checkpoint import Checkpoint
from ranvier.actors.component.devices import CPU
from ranvier.actors.component.kinds import Kind
from ranvier.actors.model import weights
from ranvier.actors.model.kernels import native
from ranvier.actors.protocol.host_spec import GATEWAY, STICKY, Policy
from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.wires.endpoint import parse

from ..file.actor_section import ActorSection, Hedge
from ..file.load import Document
from ..file.schema import GraphFile, ModelSection

Ports = Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class CheckedActor:
    """Hold one actor whose kind, ports, layers and weights are known.

    `elements` is the number of elements in the weights of a built-in kind. `weights` is the file with a torch module's
    state, `module_bytes` that state's size in memory, and `own_autograd` says that its `forward` takes gradients itself. `once`
    names the inputs that come once per session.
    """

    name: str
    section: ActorSection
    kind: Kind
    inputs: Ports
    outputs: Ports
    layers: tuple[int, int] | None
    elements: int
    weights: Path | None = None
    module_bytes: int = 0
    own_autograd: bool = False
    experts: tuple[int, int] | None = None
    once: tuple[str, ...] = ()

    def weight_bytes(self, model: ModelSection | None, checkpoint: Checkpoint | None) -> int:
        """Return what the weights take in memory."""
        if model is None or checkpoint is None:
            return self.module_bytes
        itemsize = BY_NAME[model.dtype].itemsize
        if model.weights == "dtype" or not self.kind.uses_model:
            return self.elements * itemsize + self.module_bytes
        on_gpu = self.section.device != CPU
        layers = (0, checkpoint.config.layers - 1) if self.kind.whole else self.layers
        return weights.held_bytes(checkpoint, self.kind, layers, self.experts, itemsize, model.weights, on_gpu=on_gpu)

    @property
    def may_repeat(self) -> bool:
        """Return whether each replica can bind an inbox: the actor has no endpoint, or a tcp one without a port."""
        given = self.section.endpoint
        return given is None or (given.startswith("tcp://") and not parse(given).port)

    @property
    def policy(self) -> Policy:
        """Return how the actor's replicas share its rows."""
        given = self.section.policy
        if isinstance(given, Hedge):
            return Policy("hedge", given.hedge, int(given.after[1:]) if given.after is not None else 0)
        return Policy(given)


@dataclass(frozen=True, slots=True)
class CheckedEdge:
    """Hold one edge between ports that fit. An `implied` edge connects the gateway and is not in the file."""

    source: str
    out: str
    target: str
    into: str
    spec: TensorSpec
    feedback: bool = False
    codec: str = "raw"
    credits_messages: int = 8
    credits_bytes: int = 64 << 20
    until: str | None = None
    at_most: int = 0
    gradient_codec: str = "raw"
    tap: str | None = None
    implied: bool = False

    @property
    def name(self) -> str:
        return f"{self.source}.{self.out} -> {self.target}.{self.into}"

    def is_meant_by(self, name: str) -> bool:
        """Return whether `name` is the name of this edge, or of an actor or a port at one of its ends."""
        ends = (self.source, self.target, f"{self.source}.{self.out}", f"{self.target}.{self.into}")
        return name in ends or name.replace(" ", "") == self.name.replace(" ", "")


@dataclass(frozen=True, slots=True, init=False)
class Graph:
    """Hold a graph that can run: one that `load` has read, or one that is written in Python.

    graph = ranvier.Graph(
        model={"source": "./model"},
        actors={"embed": {"kind": "embedding"}, "all": {"kind": "blocks", "layers": "0-29"}, "head": {"kind": "head"}},
        pipeline=["embed", "all", "head"],
    )

    The keys are those of a graph file, and so are the checks.
    """

    path: Path | None
    """The graph file; None for a graph that is written in Python."""
    folder: Path
    """The graph's relative paths begin here."""
    document: Document
    """It holds what was read, with the position of each value."""
    file: GraphFile
    checkpoint: Checkpoint | None
    actors: Mapping[str, CheckedActor]
    edges: tuple[CheckedEdge, ...]
    overrides: Mapping[str, str]
    """Values by dotted key, as YAML text, that replaced those of the text."""
    allow_code: bool
    warnings: tuple[str, ...]
    """They say what is odd in the graph's model, but does not keep it from running."""

    def __init__(
        self,
        *,
        actors: Mapping[str, Mapping[str, Any]],
        edges: Sequence[str | Mapping[str, Any]] = (),
        folder: str | Path = ".",
        allow_code: bool = False,
        **keys: Any,
    ) -> None:
        """Check a graph that is written in Python.

        Args:
            actors: the actors by name, each with the keys of a graph file's actor.
            edges: `"actor.port -> actor.port"`, or mappings with `from`, `to` and further keys.
            folder: where relative paths begin.
            allow_code: whether classes in the folder may be imported (`kind: ./file.py:Class`).
            keys: the other keys of a graph file, such as `model`, `pipeline`, `name`, `transport`, `training`.

        Raises:
            GraphError: the graph cannot run. The error lists every problem found, each with its key.
        """
        from .check import load  # it makes graphs

        made = load({"actors": actors, "edges": list(edges or ()), **keys}, folder=folder, allow_code=allow_code)
        for each in fields(Graph):
            object.__setattr__(self, each.name, getattr(made, each.name))

    @classmethod
    def checked(cls, **values: Any) -> Graph:
        """Make a graph of what the check has found. `values` has each field."""
        graph = cls.__new__(cls)
        for each in fields(cls):
            object.__setattr__(graph, each.name, values[each.name])
        return graph

    def variant(self, overrides: Mapping[str, Any]) -> Graph:
        """Return this graph with other values, by dotted key: `{"model.dtype": "float32", "actors.lower.threads": 2}`.

        Raises:
            GraphError: the variant cannot run.
        """
        from .check import load  # it makes graphs

        return load(
            self.path if self.path is not None else yaml.safe_load(self.document.text),
            folder=self.folder, allow_code=self.allow_code, overrides={**self.overrides, **overrides},
        )  # fmt: skip

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def keys(self) -> Path | None:
        """Return the folder of keys for tcp, or None if the file names none."""
        return (self.folder / self.file.keys).resolve() if self.file.keys is not None else None

    @property
    def generates(self) -> bool:
        """Return whether the graph generates text: the gateway sends tokens and receives sampled tokens."""
        return any(e.source == GATEWAY and e.out == "token" for e in self.edges) and any(
            e.target == GATEWAY and e.into == "sampled" for e in self.edges
        )

    def read_by_client(self, edge: CheckedEdge) -> bool:
        """Return whether an edge goes to the client only for the requests that read it: `lower.hidden -> gateway.mid`."""
        if edge.target != GATEWAY or not self.generates or edge.source not in self.actors:
            return False
        return edge.into not in self.actors[edge.source].kind.to_gateway

    @property
    def embeds(self) -> bool:
        """Return whether the graph turns the tokens of a text into one vector: `token` goes in, and `embedding` comes out."""
        given = {e.out for e in self.edges if e.source == GATEWAY}
        made = {e.into for e in self.edges if e.target == GATEWAY}
        return self.checkpoint is not None and (given, made) == ({"token"}, {"embedding"})

    @property
    def prefill_chunk(self) -> int:
        """Return the maximum number of prompt tokens in one message.

        A model that cannot be cut (`uncut`) gets its whole prompt in one message.
        """
        if self.checkpoint is not None and self.checkpoint.config.uncut:
            return self.checkpoint.config.context
        if self.file.prefill_chunk is not None:
            return self.file.prefill_chunk
        in_kernels = self.file.model is not None and self.file.model.dtype == "bfloat16"
        return native.prefill_chunk() if in_kernels else native.PREFILL_CHUNK

    @property
    def recorded(self) -> tuple[CheckedEdge, ...]:
        """Return the edges whose messages are recorded."""
        section = self.file.record
        if section is None:
            return ()
        if section.edges == "all":
            return self.edges
        return tuple(edge for edge in self.edges if any(edge.is_meant_by(name) for name in section.edges))

    def together(self, one: str, other: str) -> bool:
        """Return whether two different actors share a process."""
        if one == other or one not in self.actors or other not in self.actors:
            return False
        host = self.actors[one].section.host
        return host is not None and host == self.actors[other].section.host

    def policy(self, actor: str) -> Policy:
        """Return the policy of an actor. The gateway's policy is sticky."""
        return self.actors[actor].policy if actor in self.actors else STICKY

    def expanded(self) -> dict[str, Any]:
        """Return the long form of the file, with every edge and every setting written out."""
        of_local = set() if self.file.transport == "local" else {"shared_from_bytes"}
        plain = self.file.model_dump(by_alias=True, exclude={"pipeline", "edges", *of_local}, exclude_none=True)
        plain["edges"] = [
            {
                "from": f"{e.source}.{e.out}", "to": f"{e.target}.{e.into}", "feedback": e.feedback, "codec": e.codec,
                "credits": e.credits_messages, "credit_bytes": e.credits_bytes,
                **({"gradient_codec": e.gradient_codec} if e.gradient_codec != "raw" else {}),
                **({"tap": e.tap} if e.tap is not None else {}),
                **({"at_most": e.at_most} if e.at_most else {}), **({"until": e.until} if e.until else {}),
            }
            for e in self.edges
            if not e.implied
        ]  # fmt: skip
        return plain
