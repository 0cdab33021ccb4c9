"""Errors of actors and of the requests that they serve."""

from __future__ import annotations

from ranvier.transport.errors import RanvierError


class ActorFailed(RanvierError):
    """An actor raised, died or stopped answering.

    Attributes:
        actor: `actor.replica`.
        session: the session that was lost, or None if the whole actor is gone.
        remote_traceback: what Python printed over there, or "".
    """

    def __init__(self, actor: str, what: str, *, session: int | None = None, remote_traceback: str = "") -> None:
        self.actor = actor
        self.session = session
        self.remote_traceback = remote_traceback
        tail = f"\n\nTraceback of {actor}:\n{remote_traceback.rstrip()}" if remote_traceback else ""
        super().__init__(f"actor {actor}: {what}{tail}")


class CheckpointError(RanvierError):
    """A model file is not what it must be: truncated, missing a tensor, wrong shape. Names file and tensor."""


class Overloaded(RanvierError):
    """Turned away at the door: there is no room for the request now. Nothing was started; try later or smaller."""
