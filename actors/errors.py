"""Errors of actors and of the requests that they serve."""

from __future__ import annotations

import traceback

from ranvier.transport.format.errors import RanvierError


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


MOST_LETTERS = 16_384
"""Of an error's words, or of its traceback: a step may raise an exception of 30 MB."""


def told(error: BaseException) -> str:
    """Return the error's kind and its words, in letters that can be written, at most `MOST_LETTERS` of them."""
    return f"{type(error).__name__}: {words(error)}"


def words(error: BaseException) -> str:
    """Return the error's own words, without its kind. See `told`."""
    try:
        return _writable(str(error))
    except Exception as own:  # code of the user's own
        return f"(its text cannot be made: {type(own).__name__})"


def traceback_of(error: BaseException) -> str:
    """Return the traceback as Python prints it, in letters that can be written: its end, if it is long."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as own:
        frames = "".join(traceback.format_tb(error.__traceback__))
        text = f"{frames}{told(error)} (not printed by Python: {type(own).__name__})"
    return _writable(text, end=True)


def _writable(text: str, *, end: bool = False) -> str:
    left_out = len(text) - MOST_LETTERS
    if left_out > 0:
        half = MOST_LETTERS // 2
        text = (
            f"{text[:half]} … {left_out} letters left out … {text[-half:]}"
            if end
            else (f"{text[:MOST_LETTERS]} … {left_out} letters left out")
        )
    return text.encode(errors="replace").decode()
