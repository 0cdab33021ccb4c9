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

    A host that is started again has a new epoch, so a new name: ZeroMQ ignores a peer that comes back under the old one until
    it has noticed that the old connection is gone.
    """

    actor: str
    replica: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.actor}.{self.replica}.{self.epoch}"

    @property
    def label(self) -> str:
        """Return how people call the host, `actor.replica`."""
        return f"{self.actor}.{self.replica}"

    @property
    def file(self) -> str:
        """Return what the host's trace and sockets are named by. Those of an earlier host of the replica remain."""
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
    """Return whether the identity with which a peer speaks is one of the actor's hosts. A peer may send any bytes."""
    return identity.startswith(actor.encode() + b".")


@lru_cache(maxsize=1 << 16)
def replica_id(text: str) -> ReplicaId:
    """Parse the label of a replica.

    Raises:
        ValueError: it is not `actor.replica`.
    """
    actor, replica = text.split(".")
    return ReplicaId(actor, int(replica))
