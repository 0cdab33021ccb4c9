"""Hold the state of a session at the gateway, and the events for its client."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ranvier.actors.component.session import SessionInfo
from ranvier.actors.host.route import Replicas
from ranvier.transport.format.header import TensorMeta
from ranvier.transport.format.message import Buffer

from .readings import Readings

Tensors = Mapping[str, tuple[TensorMeta, Buffer]]
MOST_LOSSES = 4
"""A session counts as the cause after this many losses in a row, and ends.

A loss counts if the session was inside the step in which the actor was lost. Progress, or the loss of another actor,
restarts the count.
"""
SUSPECTED = 2
"""A session is suspected from this many losses in a row on.

Only one suspected session is open at a time, which separates the cause from the sessions that shared its steps.
"""


@dataclass(frozen=True, slots=True)
class Delivered:
    """Hold one position of a generation: its token and, if requested, its logits and log-probabilities as float32 bytes."""

    position: int
    token: int
    logits: Buffer | None = None
    logprobs: Buffer | None = None
    reads: Mapping[str, bytes] = field(default_factory=dict)
    """Values by place, as float32 bytes: what the request reads at the position before, from which the token was made."""


@dataclass(slots=True, eq=False)
class Stream:
    """Hold the state of one session at the gateway.

    `events` holds what the client has not yet taken. The last event is a `str` (the session is done; the string is the
    reason) or an exception. `info` belongs to the current epoch, and `asked` is what the client requested. While the
    session `waits`, it is not open: it is new, or an actor is lost and its replacement is not yet there. Meanwhile no
    actor has it open, or the other actors have it `held` and later continue where they stopped.
    """

    info: SessionInfo
    asked: SessionInfo
    inputs: Tensors
    replicas: Replicas
    waits: bool = True
    held: bool = False
    lost_actor: str = ""
    losses: int = 0
    """Times in a row that the session was inside the step in which the actor `suspected_of` was lost."""
    suspected_of: str = ""
    outputs: dict[str, tuple[TensorMeta, Buffer]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    log: list[int] = field(default_factory=list)
    numbers: dict[tuple[str, int], Buffer] = field(default_factory=dict)
    """Logits and log-probabilities that have come, by port and position."""
    readings: Readings | None = None
    """Holds what the session reads inside the model, if it reads anything."""
    scores: array[float] = field(default_factory=lambda: array("f"))
    events: deque[Delivered | str | Exception] = field(default_factory=deque)
    delivered: int = 0
    over: bool = False
    accepted_ns: int = 0
    submitted_ns: int = 0
    caller: str = ""
    """The caller's span, in hexadecimal digits; empty if the request is not traced."""
    key: str = ""
    """Name of the request in the run's journal, if there is one."""
    why: str = ""
    """Description of what the session waited for shortly before its deadline."""

    def lost(self, actor: str, inside: bool) -> None:
        """Note that an actor of the session was lost, perhaps `inside` a step that the session was part of."""
        if inside and not self.waits:
            self.losses = self.losses + 1 if self.suspected_of == actor else 1
            self.suspected_of = actor
        self.lost_actor = actor

    @property
    def suspected(self) -> bool:
        """Return whether the session may be the cause of the losses."""
        return self.losses >= SUSPECTED

    def complete(self, position: int) -> bool:
        """Return whether the token of a position, and everything that the client asked for there, has come."""
        info = self.info
        if position >= len(self.log):
            return False
        return (
            not (info.logits and ("logits", position) not in self.numbers)
            and not (info.logprobs is not None and ("logprobs", position) not in self.numbers)
            and (self.readings is None or self.readings.complete(position))
        )

    def forget(self) -> None:
        """Forget what actors compute again: what was not delivered, and numbers and outputs so far."""
        del self.log[self.awaited :]
        self.outputs.clear()
        self.rounds.clear()
        self.numbers.clear()
        del self.scores[:]

    def taken_out(self, position: int) -> Delivered:
        """Return a position that is complete, for the client. Its numbers are kept no longer."""
        numbers = self.numbers
        logits, logprobs = numbers.pop(("logits", position), None), numbers.pop(("logprobs", position), None)
        reads = self.readings.at(position - 1) if self.readings is not None else {}
        return Delivered(position, self.log[position], logits, logprobs, reads)

    def lacks(self, answers: frozenset[str] | set[str]) -> str:
        """Say what has not come: some of the `answers` of a call, or without them the next token."""
        missing = (
            ", ".join(sorted(answers - self.outputs.keys())) if answers else f"a token at position {len(self.log)}"
        )
        return f"expected {missing}, got {', '.join(sorted(self.outputs)) or 'nothing'}"

    @property
    def taken(self) -> int:
        """Return the number of positions that every actor has processed for sure, and of which everything is read."""
        taken = len(self.log) - 1 if self.generated else self.info.kept
        return taken if self.readings is None else min(taken, self.readings.known)

    @property
    def generated(self) -> int:
        """Return the number of tokens generated in the current epoch."""
        return len(self.log) - len(self.info.log)

    @property
    def awaited(self) -> int:
        """Return the position that the client gets next."""
        return len(self.asked.log) + self.delivered
