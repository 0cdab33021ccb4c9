"""What one host is told at its start: its part of the plan, as plain data that survives JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links.link import LinkSpec

from .training_spec import TrainingLink, TrainingSpec

GATEWAY = "gateway"
"""The reserved actor name of the place where clients enter."""
SUPERVISOR = "supervisor"
"""Who commands the hosts, over sockets of its own."""


def identity(actor: str, replica: int, epoch: int) -> str:
    """The name a host has on the wire. A host that is started anew has a new epoch, so a new name: ZeroMQ ignores a
    peer that comes back under the old one until it has noticed that the old connection is gone."""
    return f"{actor}.{replica}.{epoch}"


def file_name(actor: str, replica: int, epoch: int) -> str:
    """What a host's trace and sockets are named by: those of a host before it remain as they are."""
    return f"{actor}.{replica}" if epoch == 1 else identity(actor, replica, epoch)


def replica_of(name: str) -> int:
    """The replica that an identity, or a label, names."""
    return int(name.split(".")[1])


@dataclass(frozen=True, slots=True)
class Policy:
    """Which replicas of an actor a row goes to.

    `sticky`: the one that its session was given. `round_robin`: the session's replicas in turn. `least_queued`: the one
    with the fewest messages that are not used up. `lowest_latency`: the one where a message took the least time, by a
    moving average. `hedge`: `copies` of them; the first answer counts. With `after`, a percentile, the second copy goes out
    only when the first has taken longer than that share of the messages before it (Dean and Barroso, The Tail at Scale,
    2013).
    """

    name: str = "sticky"
    copies: int = 1
    after: int = 0

    @property
    def by_load(self) -> bool:
        """Whether each sender chooses by what it sees itself. Two senders may then choose differently."""
        return self.name in ("least_queued", "lowest_latency") or self.after > 0

    @property
    def places(self) -> int | None:
        """How many replicas a session is opened at; None: all."""
        return self.copies if self.name in ("sticky", "hedge") and not self.after else None


STICKY = Policy()


@dataclass(frozen=True, slots=True)
class Deadlines:
    """When a host counts as failed, in seconds."""

    start_deadline_s: float = 120.0
    """From start to ready: loading weights is the long part."""
    heartbeat_interval_s: float = 0.5
    heartbeat_deadline_s: float = 15.0
    """Without a sign of life: stopped, or the machine is starved."""
    progress_deadline_s: float = 120.0
    """In one step: alive but stuck."""
    join_deadline_s: float = 60.0
    """For a step that waits at a join for what other edges bring."""
    stop_deadline_s: float = 1.0
    """For a clean end; then killed."""


@dataclass(frozen=True, slots=True)
class Restart:
    """How often an actor that is lost is started anew: `max` times within `window_s` seconds, the first after `backoff_s`, each
    further one within the window after twice as long as the one before. `max` 0: never. An actor that offers `snapshot` is
    asked for one every `snapshot_s` seconds at most."""

    max: int = 5
    window_s: float = 60.0
    backoff_s: float = 0.2
    snapshot_s: float = 1.0


@dataclass(frozen=True, slots=True)
class PortSpec:
    """One port: its spec, and whether several messages may be laid together (the first dimension is tokens or rows). What
    comes at a `once` port comes once a session, before its first step."""

    name: str
    tensor: TensorSpec
    once: bool = False

    @property
    def stacks(self) -> bool:
        return bool(self.tensor.shape) and self.tensor.shape[0] in ("tokens", "rows")


@dataclass(frozen=True, slots=True)
class HostLink:
    """One end of a link at this host: its port, which way it goes, and whether it closes a cycle. A link of an actor to
    itself has both its ends here. `policy` says how to choose among the links of one edge, which lead to the replicas of one
    actor; at the incoming end `repeats` says that a step may come again from another replica. `skips`: a copy without credit
    may be left out. `at_most`, at the outgoing end of a loop of the user's own: how often a row goes round,
    unless the port `until` says that it is done; 0: the actor decides by what it sends. `tap` is called with what goes out
    (taps.py)."""

    port: str
    link: LinkSpec
    outgoing: bool
    feedback: bool = False
    until: str | None = None
    at_most: int = 0
    policy: Policy = STICKY
    skips: bool = False
    repeats: bool = False
    tap: str | None = None

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> HostLink:
        return cls(**{**plain, "link": _link(plain["link"]), "policy": Policy(**plain["policy"])})


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """The ports of an actor whose tensors are kept (recording.py), and how many bytes of them at the most."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    most_bytes: int

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RecordSpec:
        return cls(tuple(plain["inputs"]), tuple(plain["outputs"]), plain["most_bytes"])


STATISTICS = "statistics"
"""The tap that is not a function of the user's own."""


@dataclass(frozen=True, slots=True)
class HostSpec:
    """Everything a host process needs. `implementation` is `module:Class`, or `file.py:Class` with `folder` set; `needed`
    is how many input ports make a step, all if it is not given; `batches` into how many batches it cuts the open sessions."""

    actor: str
    replica: int
    epoch: int
    graph_hash: str
    implementation: str
    folder: str | None
    args: Mapping[str, Any]
    model: str | None
    dtype: str
    layers: tuple[int, int] | None
    cache_tokens: int
    threads: int
    device: str
    inputs: tuple[PortSpec, ...]
    outputs: tuple[PortSpec, ...]
    links: tuple[HostLink, ...]
    endpoint: str
    control: str
    supervisor: str
    run_dir: str
    max_frame_bytes: int
    batch_tokens: int
    cpus: list[int] | None = None
    weights: str | None = None
    needed: int | None = None
    experts: tuple[int, int] | None = None
    precision: str = "dtype"
    batches: int = 1
    trace: bool = True
    tap_folder: str | None = None
    """Where functions of taps lie."""
    trace_sample: float = 1.0
    """The share of sessions, or of a training's micro-batches, whose messages leave records: the same at both ends."""
    trace_bytes: int = 0
    """How long the trace's file may get; 0: as long as there is disk."""
    record: RecordSpec | None = None
    shared_from_bytes: int = 0
    keys: str | None = None
    supervision: Deadlines = field(default_factory=Deadlines)
    restart: Restart = field(default_factory=Restart)
    training: TrainingSpec | None = None

    @property
    def all_links(self) -> Sequence[HostLink | TrainingLink]:
        """What it is to be connected with."""
        return self.training.links if self.training is not None else self.links

    @property
    def identity(self) -> str:
        return identity(self.actor, self.replica, self.epoch)

    @property
    def label(self) -> str:
        """How people and files call this host: `actor.replica`."""
        return f"{self.actor}.{self.replica}"

    def snapshot_of(self, label: str) -> str:
        """Where the host of that label saves its state."""
        return f"{self.run_dir}/state/{label}.safetensors"

    @property
    def board(self) -> str:
        """Where the host writes which sessions are inside its step (step_board.py): beside its control socket."""
        return f"{self.control.removeprefix('ipc://')}.step"

    @property
    def file(self) -> str:
        """See `file_name`."""
        return file_name(self.actor, self.replica, self.epoch)

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> HostSpec:
        fields = dict(plain)
        fields["layers"] = tuple(fields["layers"]) if fields["layers"] is not None else None
        fields["experts"] = tuple(fields["experts"]) if fields["experts"] is not None else None
        fields["inputs"] = tuple(_port(port) for port in fields["inputs"])
        fields["outputs"] = tuple(_port(port) for port in fields["outputs"])
        fields["links"] = tuple(HostLink.from_plain(link) for link in fields["links"])
        fields["supervision"] = Deadlines(**fields["supervision"])
        fields["restart"] = Restart(**fields["restart"])
        record, training = fields["record"], fields["training"]
        fields["record"] = RecordSpec.from_plain(record) if record is not None else None
        fields["training"] = TrainingSpec.from_plain(training) if training is not None else None
        return cls(**fields)


def _tensor(plain: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(plain["dtype"], tuple(plain["shape"]))


def _port(plain: Mapping[str, Any]) -> PortSpec:
    return PortSpec(plain["name"], _tensor(plain["tensor"]), plain["once"])


def _link(plain: Mapping[str, Any]) -> LinkSpec:
    fields = dict(plain)
    fields["tensors"] = tuple((name, _tensor(tensor)) for name, tensor in fields["tensors"])
    return LinkSpec(**fields)
