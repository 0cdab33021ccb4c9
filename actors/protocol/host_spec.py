"""Define what one host receives at its start: its part of the plan, as plain data that survives JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ranvier.transport.format.host_id import HostId
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links.link import LinkSpec

from .training_spec import TrainingLink, TrainingSpec

GATEWAY = "gateway"
"""Reserved actor name of the gateway, where clients enter."""
SUPERVISOR = "supervisor"
"""Reserved name of the supervisor, which commands the hosts over separate sockets."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Say how to choose the replicas of an actor that a row goes to.

    `sticky`: the replica that the session was given. `round_robin`: the session's replicas in turn. `least_queued`: the
    replica with the fewest messages that are not used up. `lowest_latency`: the replica where a message takes the least time,
    by a moving average. `hedge`: `copies` replicas; the first answer counts. `after` is a percentile: the second copy is sent
    only when the first has taken longer than that share of the messages before it (Dean and Barroso, The Tail at Scale, 2013).
    """

    name: str = "sticky"
    copies: int = 1
    after: int = 0

    @property
    def by_load(self) -> bool:
        """Return whether each sender chooses by the load that it sees itself. Two senders may then choose differently."""
        return self.name in ("least_queued", "lowest_latency") or self.after > 0

    @property
    def opened(self) -> int | None:
        """Return the number of replicas at which a session is opened; None means all."""
        return self.copies if self.name in ("sticky", "hedge") and not self.after else None


STICKY = Policy()


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Define when a host counts as failed, in seconds."""

    start_deadline_s: float = 120.0
    """Limit from start to ready; most of this time loads weights."""
    heartbeat_interval_s: float = 0.5
    heartbeat_deadline_s: float = 15.0
    """Limit without a heartbeat: the host has stopped, or its machine is overloaded."""
    progress_deadline_s: float = 120.0
    """Limit for one step: the host is alive but stuck."""
    join_deadline_s: float = 60.0
    """Limit for a step that waits at a join for messages of other edges."""
    stop_deadline_s: float = 1.0
    """Limit for a clean end; then the host is killed."""


@dataclass(frozen=True, slots=True)
class Restart:
    """Define how often a lost actor is restarted: at most `max` times within `window_s` seconds; 0 means never.

    The first restart waits for `backoff_s` seconds. Each further one within the window waits for twice as long as the one
    before. An actor that offers `snapshot` is asked for one at most every `snapshot_s` seconds.
    """

    max: int = 5
    window_s: float = 60.0
    backoff_s: float = 0.2
    snapshot_s: float = 1.0


@dataclass(frozen=True, slots=True)
class PortSpec:
    """Describe one port of an actor by its name and its spec.

    A `once` port receives one message per session, before the session's first step.
    """

    name: str
    tensor: TensorSpec
    once: bool = False

    @property
    def stacks(self) -> bool:
        """Return whether several messages may be combined, because the first dimension is tokens or rows."""
        return bool(self.tensor.shape) and self.tensor.shape[0] in ("tokens", "rows")


@dataclass(frozen=True, slots=True)
class HostLink:
    """Describe one end of a link at this host: its port, its direction, and whether it closes a cycle (`feedback`).

    A link from an actor to itself has both of its ends here. `policy` says how to choose among the links of one edge, which
    lead to the replicas of one actor. With `skips`, a copy without credit may be left out. At an incoming end, `repeats` says
    that a step may come again from another replica.

    `at_most` is set at the outgoing end of a custom loop. A row goes round at most that often. It stops earlier when the port
    `until` reports that it is done. With 0, the actor decides by what it sends. `tap` is the function that sees outgoing
    tensors (taps.py). `asked` is set at the outgoing end of an edge to the client of a model: the name under which requests
    read it. It carries only the rows of sessions that do.
    """

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
    asked: str = ""


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """Name the ports of an actor whose tensors are recorded (recording_writer.py), and limit the recorded bytes."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    most_bytes: int


STATISTICS = "statistics"
"""Name of the built-in tap. Every other tap is a custom function."""


@dataclass(frozen=True, slots=True)
class HostSpec:
    """Hold everything that a host process needs.

    `implementation` is `module:Class`, or `file.py:Class` with `folder` set. `needed` is the number of input ports that must
    hold a step before it runs; None means all. `batches` is the number of batches among which open sessions are divided.
    """

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
    device_bytes: int = 0  # of the weights, on a device that is not the processor
    weights: str | None = None
    needed: int | None = None
    experts: tuple[int, int] | None = None
    precision: str = "dtype"
    fast: bool = False
    """Products may depend on the number of tokens (`products: fast`)."""
    own_autograd: bool = False
    """The `forward` of the actor's torch module takes gradients itself."""
    batches: int = 1
    trace: bool = True
    tap_folder: str | None = None
    """Folder with the files of custom taps."""
    trace_sample: float = 1.0
    """Share of sessions, or of a training's micro-batches, whose messages are traced; the same ones at both ends."""
    trace_bytes: int = 0
    """Largest size of the trace file, in bytes; 0 means no limit."""
    record: RecordSpec | None = None
    shared_from_bytes: int = 0
    keys: str | None = None
    supervision: Deadlines = field(default_factory=Deadlines)
    restart: Restart = field(default_factory=Restart)
    training: TrainingSpec | None = None
    host: str | None = None
    """Name of the process that this actor shares with others; None: it has a process of its own."""

    @property
    def all_links(self) -> Sequence[HostLink | TrainingLink]:
        """Return the links of this host: those of a training if it trains, otherwise those of the graph."""
        return self.training.links if self.training is not None else self.links

    @property
    def id(self) -> HostId:
        """Return the name of the host in this epoch."""
        return HostId(self.actor, self.replica, self.epoch)

    @property
    def identity(self) -> str:
        """Return the host's name on a wire, `actor.replica.epoch`."""
        return str(self.id)

    @property
    def process(self) -> str:
        """Return the name of the process, `host.replica.epoch` or the identity. Actors with the same one share it."""
        return str(HostId(self.host or self.actor, self.replica, self.epoch))

    @property
    def log_name(self) -> str:
        """Return the base name of the file that gets the standard error of the process."""
        return HostId(self.host or self.actor, self.replica, self.epoch).label

    @property
    def label(self) -> str:
        """Return the name of this host for people and files, `actor.replica`."""
        return self.id.label

    def snapshot_of(self, label: str) -> str:
        """Return the path at which the host of that label saves its state."""
        return f"{self.run_dir}/state/{label}.safetensors"

    @property
    def board(self) -> str:
        """Return the path of the host's step board (step_board.py), which lies beside its control socket."""
        return f"{self.control.removeprefix('ipc://')}.step"

    @property
    def file(self) -> str:
        """Return the base name of the host's files (see `HostId.file`)."""
        return self.id.file
