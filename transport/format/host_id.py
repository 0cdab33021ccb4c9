"""Name the processes of a run: one replica of an actor, and the host that runs it in one epoch.

On a wire, in files and in messages to users the names are text, `actor.replica.epoch` and `actor.replica`. Inside the program
they are these types. Actors' names hold no dots.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class ReplicaId(NamedTuple):
    """Name one replica of an actor: `actor.replica`, the label that people and files use."""

    actor: str
    replica: int

    def __str__(self) -> str:
        return f"{self.actor}.{self.replica}"


class HostId(NamedTuple):
    """Name the host of a replica in one epoch: `actor.replica.epoch`, its identity on a wire.

    A restarted host has a new epoch, and so a new name. ZeroMQ would ignore a peer that reconnects under its old name until
    it notices that the old connection is gone.
    """

    actor: str
    replica: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.actor}.{self.replica}.{self.epoch}"

    @property
    def label(self) -> str:
        """Return the name of the host for people, `actor.replica`."""
        return f"{self.actor}.{self.replica}"

    @property
    def file(self) -> str:
        """Return the base name of the host's files. It differs in each epoch, so files of an earlier host remain."""
        return self.label if self.epoch == 1 else str(self)


@lru_cache(maxsize=1 << 16)
def host_id(text: str) -> HostId:
    """Parse the identity of a host.

    Raises:
        ValueError: it is not `actor.replica.epoch`.
    """
    actor, replica, epoch = text.split(".")
    return HostId(actor, int(replica), int(epoch))


def claims_to_be(identity: bytes, actor: str) -> bool:
    """Return whether the identity that a peer sent names a host of the actor. A peer may send any bytes."""
    return identity.startswith(actor.encode() + b".")


@lru_cache(maxsize=1 << 16)
def replica_id(text: str) -> ReplicaId:
    """Parse the label of a replica.

    Raises:
        ValueError: it is not `actor.replica`.
    """
    actor, replica = text.split(".")
    return ReplicaId(actor, int(replica))
