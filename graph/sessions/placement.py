"""Choose the replicas of each actor at which a session is opened, and track their free capacity. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ranvier.actors.component.actor import NOTHING, REPLAYED, REWINDS
from ranvier.actors.errors import Overloaded
from ranvier.actors.protocol.host_spec import STICKY, Policy


@dataclass(slots=True)
class Replica:
    """Represent one host as the gateway sees it.

    `capacity_tokens` is the number of positions that its caches hold; None means no limit. `keeps` says what it keeps
    of a session between steps (NOTHING, REWINDS or REPLAYED of actor.py).
    """

    label: str
    capacity_tokens: int | None = None
    keeps: str = REPLAYED
    reserved_tokens: int = 0
    sessions: int = 0
    turn: int = 0
    leaving: bool = False
    down: bool = False
    """The host is lost, and its replacement is not yet there."""

    def fits(self, tokens: int) -> bool:
        return self.capacity_tokens is None or self.reserved_tokens + tokens <= self.capacity_tokens


class Placement:
    """Track all hosts of a run, and what is reserved at them.

    Args:
        policies: policies by actor name. An actor without one is sticky.
    """

    def __init__(self, policies: Mapping[str, Policy] | None = None) -> None:
        self._policies = policies or {}
        self.replicas: dict[str, dict[int, Replica]] = {}
        self._turn = 0

    def join(self, actor: str, replica: int, capacity_tokens: int | None = None, keeps: str = REPLAYED) -> None:
        """Add a replica, at which sessions may be placed from now on."""
        self.replicas.setdefault(actor, {})[replica] = Replica(f"{actor}.{replica}", capacity_tokens, keeps)

    def leave(self, actor: str, replica: int) -> None:
        """Place no new sessions at a replica."""
        self.replicas[actor][replica].leaving = True

    def remove(self, actor: str, replica: int) -> None:
        del self.replicas[actor][replica]

    def down(self, actor: str, replica: int) -> None:
        """Mark a replica as lost. Its reservations remain until its sessions move or its replacement has come."""
        self.replicas[actor][replica].down = True

    def up(self, actor: str, replica: int) -> None:
        """Mark the replacement of a lost replica as up."""
        self.replicas[actor][replica].down = False

    def is_up(self, chosen: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether all replicas of a session are up."""
        return not any(replica.down for replica in self._of(chosen))

    def outlive(self, chosen: Mapping[str, tuple[int, ...]], actor: str) -> bool:
        """Return whether the other actors can continue a session from their current state after `actor` is lost.

        They can if the lost actor kept nothing of the session, and each other one kept nothing or can rewind to a
        position.
        """
        return all(
            self.replicas[name][number].keeps in ((NOTHING,) if name == actor else (NOTHING, REWINDS))
            for name, numbers in chosen.items()
            for number in numbers
        )

    def move(self, before: Mapping[str, tuple[int, ...]], actor: str, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the replicas of a session that lost one of `actor`.

        They are other replicas of that actor if there is room, and otherwise the same as before.
        """
        self.give_back({actor: before[actor]}, tokens)
        try:
            chosen = self._choose(actor, tokens)
        except Overloaded:
            chosen = before[actor]
        self._reserve({actor: chosen}, tokens)
        return {**before, actor: chosen}

    def active(self, actor: str) -> list[int]:
        """Return the replicas of an actor that accept new sessions."""
        return [number for number, replica in sorted(self.replicas[actor].items()) if not replica.leaving]

    def take(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Reserve `tokens` positions for a new session, and return its replicas by actor.

        Raises:
            Overloaded: too few replicas of an actor have room for them.
        """
        chosen = {actor: self._choose(actor, tokens) for actor in self.replicas}
        self._reserve(chosen, tokens)
        return chosen

    def _reserve(self, chosen: Mapping[str, tuple[int, ...]], tokens: int) -> None:
        self._turn += 1
        for replica in self._of(chosen):
            replica.reserved_tokens += tokens
            replica.sessions += 1
            replica.turn = self._turn

    def give_back(self, chosen: Mapping[str, tuple[int, ...]], tokens: int) -> None:
        """Free what a session reserved, once it is over."""
        for replica in self._of(chosen):
            replica.reserved_tokens -= tokens
            replica.sessions -= 1

    def labels(self, chosen: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return the labels of a session's hosts that are up."""
        return [replica.label for replica in self._of(chosen) if not replica.down]

    def _of(self, chosen: Mapping[str, tuple[int, ...]]) -> list[Replica]:
        return [self.replicas[actor][number] for actor, numbers in chosen.items() for number in numbers]

    def _choose(self, actor: str, tokens: int) -> tuple[int, ...]:
        replicas, active = self.replicas[actor], self.active(actor)
        standing = [number for number in active if not replicas[number].down] or active
        able = [number for number in standing if replicas[number].fits(tokens)]
        wanted = self._policies.get(actor, STICKY).opened
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
