"""Errors of actors and of the requests that they serve."""

from __future__ import annotations

from ranvier.transport.errors import RanvierError


class ActorFailed(RanvierError):
    """An actor raised, died or stopped answering.

    Attributes:
        actor: `actor.replica`.
        what: what happened, without the actor's name and the traceback.
        session: the session that was lost, or None if the whole actor is gone.
        remote_traceback: what Python printed over there, or "".
    """

    def __init__(self, actor: str, what: str, *, session: int | None = None, remote_traceback: str = "") -> None:
        self.actor = actor
        self.session = session
        self.remote_traceback = remote_traceback
        self.what = what
        tail = f"\n\nTraceback of {actor}:\n{remote_traceback.rstrip()}" if remote_traceback else ""
        super().__init__(f"actor {actor}: {what}{tail}")

    def of(self, session: int, times: int) -> ActorFailed:
        """The same as what ended a session that was begun anew in vain."""
        what = f"session {session}: {self.what}; that happened {times} times in a row"
        return ActorFailed(self.actor, what, session=session, remote_traceback=self.remote_traceback)

    def but(self, more: str) -> ActorFailed:
        """The same with more to say."""
        what = f"{self.what}; {more}"
        return ActorFailed(self.actor, what, session=self.session, remote_traceback=self.remote_traceback)


class CheckpointError(RanvierError):
    """A model file is not what it must be: truncated, missing a tensor, wrong shape. Names file and tensor."""


class Overloaded(RanvierError):
    """Turned away at the door: there is no room for the request now. Nothing was started; try later or smaller."""


class Expired(RanvierError):
    """The deadline of a request passed before it was done. What it held is free again."""


class RecordingError(RanvierError):
    """There is no such recording, or it is damaged, or it lacks what was asked for."""


def told(error: Exception) -> str:
    """Its kind and its words, as they can be written."""
    return f"{type(error).__name__}: {error}".encode(errors="replace").decode()
