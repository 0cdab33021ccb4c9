"""Where a session goes: which replicas of each actor it is opened at, and what fits there. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ranvier.actors.errors import Overloaded
from ranvier.actors.spec import STICKY, Policy


@dataclass(slots=True)
class Replica:
    """One host as the gateway sees it. `capacity_tokens`: positions that its caches hold; None: no limit."""

    label: str
    capacity_tokens: int | None = None
    reserved_tokens: int = 0
    sessions: int = 0
    turn: int = 0
    leaving: bool = False

    def fits(self, tokens: int) -> bool:
        return self.capacity_tokens is None or self.reserved_tokens + tokens <= self.capacity_tokens


class Placement:
    """All hosts of a run and what they hold.

    Args:
        policies: of actors, by name; `sticky` where none is given.
    """

    def __init__(self, policies: Mapping[str, Policy] | None = None) -> None:
        self._policies = policies or {}
        self.replicas: dict[str, dict[int, Replica]] = {}
        self._turn = 0

    def join(self, actor: str, replica: int, capacity_tokens: int | None = None) -> None:
        """Sessions may be placed there from now on."""
        self.replicas.setdefault(actor, {})[replica] = Replica(f"{actor}.{replica}", capacity_tokens)

    def leave(self, actor: str, replica: int) -> None:
        """No new session is placed there."""
        self.replicas[actor][replica].leaving = True

    def remove(self, actor: str, replica: int) -> None:
        del self.replicas[actor][replica]

    def active(self, actor: str) -> list[int]:
        """The replicas that take new sessions."""
        return [number for number, replica in sorted(self.replicas[actor].items()) if not replica.leaving]

    def take(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Reserve `tokens` positions at the replicas of a new session: those, by actor.

        Raises:
            Overloaded: they do not fit anywhere.
        """
        chosen = {actor: self._choose(actor, tokens) for actor in self.replicas}
        self._turn += 1
        for replica in self._of(chosen):
            replica.reserved_tokens += tokens
            replica.sessions += 1
            replica.turn = self._turn
        return chosen

    def give_back(self, places: Mapping[str, tuple[int, ...]], tokens: int) -> None:
        """The session is over."""
        for replica in self._of(places):
            replica.reserved_tokens -= tokens
            replica.sessions -= 1

    def labels(self, places: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The hosts that have the session."""
        return [replica.label for replica in self._of(places)]

    def _of(self, places: Mapping[str, tuple[int, ...]]) -> list[Replica]:
        return [self.replicas[actor][number] for actor, numbers in places.items() for number in numbers]

    def _choose(self, actor: str, tokens: int) -> tuple[int, ...]:
        replicas, active = self.replicas[actor], self.active(actor)
        able = [number for number in active if replicas[number].fits(tokens)]
        wanted = self._policies.get(actor, STICKY).places
        wanted = len(active) if wanted is None else min(wanted, len(active))
        if len(able) < wanted:
            full = [replicas[number] for number in active if number not in able]
            best = max(full, key=lambda r: (r.capacity_tokens or 0) - r.reserved_tokens)
            raise Overloaded(
                f"the session needs {tokens} tokens of KV cache, "
                f"{(best.capacity_tokens or 0) - best.reserved_tokens} of {best.capacity_tokens} are free at {best.label}; "
                "try later, with a shorter prompt or fewer tokens"
            )
        able.sort(key=lambda number: (replicas[number].sessions, replicas[number].turn))
        return tuple(sorted(able[:wanted]))
