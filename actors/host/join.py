"""Joining: when the rows of one step that come by several edges make a step together. No I/O.

`all`: when every input port holds the step. `first`: when the first comes; the others are dropped and counted. `quorum`:
when so many ports hold it. A step is (session, epoch, position); how many tokens it has may differ from port to port. What a
session gets once is no part of a join: its steps wait at a gate until it is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch

from ranvier.transport.format.header import Row
from ranvier.transport.links.link_state import Received

Step = tuple[int, int, int]
"""Session, epoch, position."""


class Part(NamedTuple):
    """What one message holds for one step at one port."""

    row: Row
    tensor: torch.Tensor
    source: Received


@dataclass(slots=True)
class _Held:
    parts: dict[str, Part] = field(default_factory=dict)
    since_ns: int = 0


class Overdue(NamedTuple):
    """A step that has waited too long: which ports hold it and which do not."""

    row: Row
    present: tuple[str, ...]
    missing: tuple[str, ...]
    since_ns: int


class Join:
    """The steps that wait at one actor.

    Args:
        ports: the input ports.
        needed: how many of them make a step.

    `arrivals` is how many edges come in: so often is one step offered in all, if nothing is lost.
    """

    def __init__(self, ports: Sequence[str], needed: int) -> None:
        self._ports = tuple(ports)
        self._needed = needed
        self.arrivals = 0
        self._held: dict[Step, _Held] = {}
        self._late: dict[Step, int] = {}

    def offer(self, port: str, part: Part) -> dict[str, Part] | None:
        """Take a part in: what makes a step together, if it does now.

        Raises:
            Late: the step was taken without it, or its port has it already.
        """
        step = part.row[:3]
        if step in self._late:
            self._late[step] -= 1
            if not self._late[step]:
                del self._late[step]
            raise Late
        held = self._held.get(step)
        if held is None:
            held = self._held[step] = _Held(since_ns=part.source.received_ns)
        if port in held.parts:
            raise Late
        held.parts[port] = part
        if len(held.parts) < self._needed:
            return None
        del self._held[step]
        if self.arrivals > self._needed:
            self._late[step] = self.arrivals - self._needed
        return {name: held.parts[name] for name in self._ports if name in held.parts}

    def drop(self, session: int) -> Iterator[Part]:
        """Forget a session; what it held."""
        for step in [step for step in self._held if step[0] == session]:
            yield from self._held.pop(step).parts.values()
        for step in [step for step in self._late if step[0] == session]:
            del self._late[step]

    def overdue(self, before_ns: int) -> list[Overdue]:
        """Steps whose first part came before then."""
        return [
            Overdue(
                parts[0].row,
                tuple(held.parts),
                tuple(port for port in self._ports if port not in held.parts),
                held.since_ns,
            )
            for held in list(self._held.values())
            if held.since_ns < before_ns and (parts := list(held.parts.values()))
        ]


W = TypeVar("W")


class Gate(Generic[W]):
    """Steps that wait for what their session gets once.

    Args:
        ports: the input ports that bring it.
    """

    def __init__(self, ports: Iterable[str]) -> None:
        self._ports = set(ports)
        self._there: dict[int, set[str]] = {}
        self._held: dict[int, list[tuple[W, Row, int]]] = {}

    def __contains__(self, port: str) -> bool:
        return port in self._ports

    def came(self, session: int, port: str) -> list[W]:
        """A port has brought what it brings: the steps that may go now."""
        there = self._there.setdefault(session, set())
        there.add(port)
        return [step for step, *_ in self._held.pop(session, ())] if there == self._ports else []

    def holds(self, step: W, row: Row, since_ns: int) -> bool:
        """Keep a step whose session lacks something; False if it may go."""
        if self._there.get(row.session) == self._ports:
            return False
        self._held.setdefault(row.session, []).append((step, row, since_ns))
        return True

    def drop(self, session: int) -> list[W]:
        """Forget a session; what it held."""
        self._there.pop(session, None)
        return [step for step, *_ in self._held.pop(session, ())]

    def overdue(self, before_ns: int) -> list[Overdue]:
        """The first step of each session that has waited since before then."""
        return [
            Overdue(held[0][1], tuple(there), tuple(sorted(self._ports - there)), held[0][2])
            for session, held in list(self._held.items())
            for there in [self._there.get(session, set())]
            if held[0][2] < before_ns
        ]


class Late(Exception):
    """A part whose step was taken without it."""
