"""Define the messages between supervisor, hosts and clients: tagged structs in msgpack, checked field by field.

Control messages have their own sockets, so data never delays them. Nothing here trusts the other side: an unknown kind, or a
missing, unknown or ill-typed field, is a `ProtocolError`. Each side decodes only the messages that it may receive.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ranvier.transport.format.errors import ProtocolError

from ..component.session import SessionInfo
from ..errors import Cause
from .host_spec import HostLink
from .training_spec import TrainingLink

MAX_BYTES = 16 << 20


class Message(msgspec.Struct, tag_field="kind", forbid_unknown_fields=True):
    """Represent one message of the control sockets."""

    @property
    def kind(self) -> str:
        """Return the kind, as logs and traces name it."""
        return str(self.__struct_config__.tag)


# -- host to supervisor -----------------------------------------------------------------------------------------------


class StateChanged(Message, tag="state"):
    """Report that the host is in another state (lifecycle.py)."""

    state: str
    why: str = ""


class Progress(Message, tag="progress"):
    """Report which share of the weights is loaded, from 0 to 1."""

    share: float


class Ready(Message, tag="ready"):
    """Report that the host has loaded its weights and listens at `address`.

    `capacity_tokens` is the number of positions that it can hold; None means no limit. `held_bytes` is the size of its
    weights. `keeps` says which state of a session it keeps (component/actor.py).
    """

    address: str
    capacity_tokens: int | None
    held_bytes: int
    keeps: str


class Heartbeat(Message, tag="heartbeat"):
    """Report that the host is alive: its steps, how long the current one takes, its queue, its counters."""

    steps: int
    stepping_s: float
    queued: int
    counters: dict[str, int]


class Counters(Message, tag="counters"):
    """Report the last counters of a host that ends."""

    counters: dict[str, int]


class Linked(Message, tag="linked"):
    """Report that the host knows a replica that has joined."""

    peer: str


class SessionFailed(Message, tag="session_failed"):
    """Report that a session cannot continue at this host."""

    session: int
    epoch: int
    error: str
    traceback: str
    cause: Cause


class Refused(Message, tag="refused"):
    """Report a message or a command that was refused."""

    what: str


class Alarm(Message, tag="alarm"):
    """Report that an edge carried NaN or infinity, and which share of the elements that was."""

    edge: str
    session: int
    position: int
    share: float
    at_ns: int


class Saved(Message, tag="saved"):
    """Report that the host has saved its shard after `round` rounds of training."""

    round: int


class Failed(Message, tag="failed"):
    """Report the error that ends the host."""

    error: str
    traceback: str


class Situation(Message, tag="situation"):
    """Answer the `Explain` with the same number `asked`: what the host does and waits for (situation.py)."""

    asked: int
    situation: dict[str, Any]


class Time(Message, tag="time"):
    """Answer `AskTime`: when it was sent (by the supervisor's clock), heard and answered (by the host's)."""

    asked_ns: int
    heard_ns: int
    answered_ns: int


# -- supervisor to host -----------------------------------------------------------------------------------------------


class Command(Message, kw_only=True):
    """Represent what a supervisor asks of a host. `sent_ns` is by the supervisor's clock."""

    sent_ns: int = 0

    @property
    def subject(self) -> tuple[int, int]:
        """Return the session and the epoch that the command names; 0 for each that it does not name."""
        return 0, 0


class Connect(Command, tag="connect"):
    """Give the neighbours' addresses, the links to open, and the label of the lost host that this one replaces, if any."""

    peers: dict[str, str]
    links: tuple[HostLink, ...]
    training: tuple[TrainingLink, ...] = ()
    instead_of: str | None = None


class Open(Command, tag="open"):
    """Open a session."""

    info: SessionInfo

    @property
    def subject(self) -> tuple[int, int]:
        return self.info.session, self.info.epoch


class _OfSession(Command):
    session: int

    @property
    def subject(self) -> tuple[int, int]:
        return self.session, 0


class Hold(_OfSession, tag="hold"):
    """Refuse the rows of a session until it is opened in another epoch, and keep its state."""


class Close(_OfSession, tag="close"):
    """Close a session."""


class Link(Command, tag="link"):
    """Introduce a replica that joins."""

    peer: str
    address: str
    links: tuple[HostLink, ...]


class Unlink(Command, tag="unlink"):
    """Forget a replica that has left."""

    peer: str


class Stop(Command, tag="stop"):
    """Shut down cleanly."""


class Explain(Command, tag="explain"):
    """Ask what the host waits for. Its control thread answers."""

    asked: int


class AskTime(Command, tag="what time"):
    """Ask for the host's clock. Its control thread answers."""


# -- client to supervisor, and its answer -----------------------------------------------------------------------------


class Scale(Message, tag="scale"):
    """Ask for a number of replicas of an actor."""

    actor: str
    replicas: int


class AskWhy(Message, tag="why"):
    """Ask which hosts wait, and for what (`ranvier why`)."""


class AskStatus(Message, tag="status"):
    """Ask for the status of the run (`ranvier top`)."""


class Done(Message, tag="done"):
    """Answer a successful request: what was done, or the requested data."""

    what: str


class Wrong(Message, tag="wrong"):
    """Answer a request that cannot be fulfilled, with the reason."""

    what: str


StepCommand = Connect | Open | Hold | Close | Link | Unlink | Stop
"""Commands for a host's step thread."""
Request = Scale | AskWhy | AskStatus
HostMessage = (
    StateChanged | Progress | Ready | Heartbeat | Counters | Linked | SessionFailed | Refused | Alarm | Saved | Failed
    | Situation | Time
)  # fmt: skip
Answer = Done | Wrong

for_supervisor: msgspec.msgpack.Decoder[HostMessage | Request] = msgspec.msgpack.Decoder(HostMessage | Request)
for_host: msgspec.msgpack.Decoder[StepCommand | Explain | AskTime] = msgspec.msgpack.Decoder(
    StepCommand | Explain | AskTime
)
for_client: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
encode = msgspec.msgpack.Encoder().encode
T = TypeVar("T")


def decode(data: bytes | memoryview, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Decode a message with the decoder of the side that receives it.

    Raises:
        ProtocolError: it is not a message that this side may receive.
    """
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"control: expected at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"control: expected a message of this side, got {len(data)} bytes: {error}") from None
