"""One session as the gateway sees it, and what its client is given."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ranvier.actors.component.session import SessionInfo
from ranvier.actors.host.route import Places
from ranvier.transport.format.header import TensorMeta
from ranvier.transport.format.message import Buffer

Tensors = Mapping[str, tuple[TensorMeta, Buffer]]


@dataclass(frozen=True, slots=True)
class Delivered:
    """One position of a generation: its token and, where asked for, its logits as float32 bytes."""

    position: int
    token: int
    logits: Buffer | None = None


@dataclass(slots=True, eq=False)
class Stream:
    """One session as the gateway sees it. `events` waits for the client; the last one is a `str` (done: the reason) or
    an exception. `info` is that of its present epoch, `asked` the one that the client asked for. While it `waits`, an actor
    that it needs is lost and another one on its way: it is open nowhere, or `held` by the others, who then go on where they
    were."""

    info: SessionInfo
    asked: SessionInfo
    inputs: Tensors
    places: Places
    waits: bool = True
    held: bool = False
    lost_actor: str = ""
    losses: int = 0
    """How often in a row it was inside the step in which the actor `suspected_of` was lost."""
    suspected_of: str = ""
    outputs: dict[str, tuple[TensorMeta, Buffer]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    log: list[int] = field(default_factory=list)
    logits: dict[int, Buffer] = field(default_factory=dict)
    scores: array[float] = field(default_factory=lambda: array("f"))
    events: deque[Delivered | str | Exception] = field(default_factory=deque)
    delivered: int = 0
    over: bool = False
    accepted_ns: int = 0
    submitted_ns: int = 0
    caller: str = ""
    """The span, in hexadecimal digits, that the request came from, where somebody traces it."""
    key: str = ""
    """What the request is called in the run's journal, if there is one."""
    why: str = ""
    """What it waited for shortly before its deadline, in words."""

    @property
    def taken(self) -> int:
        """The positions that every actor has taken for sure in the present epoch."""
        return len(self.log) - 1 if self.generated else self.info.kept

    @property
    def generated(self) -> int:
        """Tokens of the present epoch."""
        return len(self.log) - len(self.info.log)

    @property
    def awaited(self) -> int:
        """The position that the client gets next."""
        return len(self.asked.log) + self.delivered
