"""Where a session goes: which replicas of each actor it is opened at, and what fits there. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ranvier.actors.component.actor import NOTHING, REPLAYED, REWINDS
from ranvier.actors.errors import Overloaded
from ranvier.actors.protocol.host_spec import STICKY, Policy


@dataclass(slots=True)
class Replica:
    """One host as the gateway sees it. `capacity_tokens`: positions that its caches hold; None: no limit. `keeps`: what it has
    of a session between steps (see `Actor`)."""

    label: str
    capacity_tokens: int | None = None
    keeps: str = REPLAYED
    reserved_tokens: int = 0
    sessions: int = 0
    turn: int = 0
    leaving: bool = False
    down: bool = False
    """It is lost, and one in its place is on its way."""

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

    def join(self, actor: str, replica: int, capacity_tokens: int | None = None, keeps: str = REPLAYED) -> None:
        """Sessions may be placed there from now on."""
        self.replicas.setdefault(actor, {})[replica] = Replica(f"{actor}.{replica}", capacity_tokens, keeps)

    def leave(self, actor: str, replica: int) -> None:
        """No new session is placed there."""
        self.replicas[actor][replica].leaving = True

    def remove(self, actor: str, replica: int) -> None:
        del self.replicas[actor][replica]

    def down(self, actor: str, replica: int) -> None:
        """It is lost. What it held stays reserved for its sessions until they move, or one in its place has come."""
        self.replicas[actor][replica].down = True

    def up(self, actor: str, replica: int) -> None:
        """One in its place is there."""
        self.replicas[actor][replica].down = False

    def is_up(self, places: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether all of a session's replicas are there."""
        return not any(replica.down for replica in self._of(places))

    def outlive(self, places: Mapping[str, tuple[int, ...]], actor: str) -> bool:
        """Whether the others that have a session can go on with it where they were after `actor` is lost: that one kept
        nothing, and they can go back to a position."""
        return all(
            self.replicas[name][number].keeps in ((NOTHING,) if name == actor else (NOTHING, REWINDS))
            for name, numbers in places.items()
            for number in numbers
        )

    def move(self, places: Mapping[str, tuple[int, ...]], actor: str, tokens: int) -> dict[str, tuple[int, ...]]:
        """The places of a session that has lost a replica of `actor`: others, or, where there is no room, as before."""
        self.give_back({actor: places[actor]}, tokens)
        try:
            chosen = self._choose(actor, tokens)
        except Overloaded:
            chosen = places[actor]
        self._reserve({actor: chosen}, tokens)
        return {**places, actor: chosen}

    def active(self, actor: str) -> list[int]:
        """The replicas that take new sessions."""
        return [number for number, replica in sorted(self.replicas[actor].items()) if not replica.leaving]

    def take(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Reserve `tokens` positions at the replicas of a new session: those, by actor.

        Raises:
            Overloaded: they do not fit anywhere.
        """
        chosen = {actor: self._choose(actor, tokens) for actor in self.replicas}
        self._reserve(chosen, tokens)
        return chosen

    def _reserve(self, places: Mapping[str, tuple[int, ...]], tokens: int) -> None:
        self._turn += 1
        for replica in self._of(places):
            replica.reserved_tokens += tokens
            replica.sessions += 1
            replica.turn = self._turn

    def give_back(self, places: Mapping[str, tuple[int, ...]], tokens: int) -> None:
        """The session is over."""
        for replica in self._of(places):
            replica.reserved_tokens -= tokens
            replica.sessions -= 1

    def labels(self, places: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The hosts that have the session and are there."""
        return [replica.label for replica in self._of(places) if not replica.down]

    def _of(self, places: Mapping[str, tuple[int, ...]]) -> list[Replica]:
        return [self.replicas[actor][number] for actor, numbers in places.items() for number in numbers]

    def _choose(self, actor: str, tokens: int) -> tuple[int, ...]:
        replicas, active = self.replicas[actor], self.active(actor)
        standing = [number for number in active if not replicas[number].down] or active
        able = [number for number in standing if replicas[number].fits(tokens)]
        wanted = self._policies.get(actor, STICKY).places
        wanted = len(standing) if wanted is None else min(wanted, len(standing))
        if len(able) < wanted:
            full = [replicas[number] for number in standing if number not in able]
            best = max(full, key=lambda r: (r.capacity_tokens or 0) - r.reserved_tokens)
            raise Overloaded(
                f"the session needs {tokens} tokens of KV cache, "
                f"{(best.capacity_tokens or 0) - best.reserved_tokens} of {best.capacity_tokens} are free at {best.label}; "
                "try later, with a shorter prompt or fewer tokens"
            )
        able.sort(key=lambda number: (replicas[number].sessions, replicas[number].turn))
        return tuple(sorted(able[:wanted]))
