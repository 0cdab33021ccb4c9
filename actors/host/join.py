"""Join the rows of one step that arrive on several edges. No I/O.

With `all`, a step is complete when every input port holds it. With `first`, the first port is enough; rows that arrive
later are dropped and counted. With `quorum`, a given number of ports is enough. A step is identified by session, epoch
and position. Its number of tokens may differ from port to port.

Inputs that a session gets only once (`once` ports) are not joined. The steps of the session wait at a gate until they
arrive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch

from ranvier.transport.format.header import Row
from ranvier.transport.links.link_state import Received

Step = tuple[int, int, int]
"""Identifies a step: session, epoch, position."""


class Part(NamedTuple):
    """Hold what one message brought for one step at one port."""

    row: Row
    tensor: torch.Tensor
    source: Received


@dataclass(slots=True)
class _Held:
    parts: dict[str, Part] = field(default_factory=dict)
    since_ns: int = 0


class Overdue(NamedTuple):
    """Describe a step that waits too long: which ports hold it and which do not."""

    row: Row
    present: tuple[str, ...]
    missing: tuple[str, ...]
    since_ns: int


class Join:
    """Keep the incomplete steps of one actor.

    Args:
        ports: the input ports.
        needed: the number of ports that complete a step.

    `arrivals` is the number of incoming edges. Each step is offered that many times, unless a message is lost.
    """

    def __init__(self, ports: Sequence[str], needed: int) -> None:
        self._ports = tuple(ports)
        self._needed = needed
        self.arrivals = 0
        self._held: dict[Step, _Held] = {}
        self._late: dict[Step, int] = {}

    def offer(self, port: str, part: Part) -> dict[str, Part] | None:
        """Add a part. Return all parts of the step by port if it is complete now, else None.

        Raises:
            Late: the step was taken without this part, or its port already has one.
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
        """Forget a session, and yield the parts that it held."""
        for step in [step for step in self._held if step[0] == session]:
            yield from self._held.pop(step).parts.values()
        for step in [step for step in self._late if step[0] == session]:
            del self._late[step]

    def overdue(self, before_ns: int) -> list[Overdue]:
        """Return the incomplete steps whose first part arrived before `before_ns`."""
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
    """Hold back steps until their session has received its `once` inputs.

    Args:
        ports: the `once` input ports.
    """

    def __init__(self, ports: Iterable[str]) -> None:
        self._ports = set(ports)
        self._there: dict[int, set[str]] = {}
        self._held: dict[int, list[tuple[W, Row, int]]] = {}

    def __contains__(self, port: str) -> bool:
        return port in self._ports

    def came(self, session: int, port: str) -> list[W]:
        """Note that a `once` port has received its input. Return the steps that may run now."""
        there = self._there.setdefault(session, set())
        there.add(port)
        return [step for step, *_ in self._held.pop(session, ())] if there == self._ports else []

    def holds(self, step: W, row: Row, since_ns: int) -> bool:
        """Keep a step whose session lacks a `once` input. Return False, without keeping it, if the step may run."""
        if self._there.get(row.session) == self._ports:
            return False
        self._held.setdefault(row.session, []).append((step, row, since_ns))
        return True

    def drop(self, session: int) -> list[W]:
        """Forget a session, and return the steps that it held."""
        self._there.pop(session, None)
        return [step for step, *_ in self._held.pop(session, ())]

    def overdue(self, before_ns: int) -> list[Overdue]:
        """Return the first held step of each session whose wait began before `before_ns`."""
        return [
            Overdue(held[0][1], tuple(there), tuple(sorted(self._ports - there)), held[0][2])
            for session, held in list(self._held.items())
            for there in [self._there.get(session, set())]
            if held[0][2] < before_ns
        ]


class Late(Exception):
    """Signal a part whose step was taken without it, or whose port already has one."""
