"""Define the errors of actors and of the requests that they serve."""

from __future__ import annotations

import traceback
from enum import StrEnum

from ranvier.transport.format.errors import RanvierError


class Cause(StrEnum):
    """Say why an actor, or one session at it, failed."""

    RAISED = "raised"
    """Its code raised an exception. The same work would raise it again."""
    DIED = "died"
    """Its process ended, or a process that it needs."""
    SILENT = "silent"
    """It gave no sign of life: it hangs, or was stopped."""
    LATE = "late"
    """It is alive, but missed a deadline: of its start, of a step, of a join."""
    REFUSED = "refused"
    """Its process could not be started, or it received a message that it must refuse."""


class ActorFailed(RanvierError):
    """Report that an actor raised an exception, died or stopped answering.

    Attributes:
        actor: `actor.replica`.
        cause: the kind of failure, for code that decides what to do next.
        what: what happened, without the actor's name and the traceback.
        session: the session that was lost, or None if the whole actor is gone.
        remote_traceback: the traceback that Python printed in the actor's process, or "".
    """

    def __init__(
        self, actor: str, what: str, cause: Cause, *, session: int | None = None, remote_traceback: str = ""
    ) -> None:
        self.actor = actor
        self.cause = cause
        self.session = session
        self.remote_traceback = remote_traceback
        self.what = what
        tail = f"\n\nTraceback of {actor}:\n{remote_traceback.rstrip()}" if remote_traceback else ""
        super().__init__(f"actor {actor}: {what}{tail}")

    def of(self, session: int, times: int) -> ActorFailed:
        """Return this error for a session that ends, because the actor failed in its steps `times` times in a row."""
        what = f"session {session}: {self.what}; that happened {times} times in a row"
        return ActorFailed(self.actor, what, self.cause, session=session, remote_traceback=self.remote_traceback)

    def but(self, more: str) -> ActorFailed:
        """Return this error with `more` appended to its text."""
        what = f"{self.what}; {more}"
        return ActorFailed(self.actor, what, self.cause, session=self.session, remote_traceback=self.remote_traceback)


class CheckpointError(RanvierError):
    """Report an invalid model file: it is truncated, lacks a tensor, or has a tensor of the wrong shape.

    The message names the file and the tensor.
    """


class NotBuiltIn(CheckpointError):
    """Signal a family of models, or a feature of one, that is not built in."""


class NotFinite(RanvierError):
    """Report that a model has computed NaN or infinity, from which no text can follow."""

    def __init__(self, what: str, found: float) -> None:
        super().__init__(
            f"{what}: expected finite numbers, got {found}; the numbers of the model do not fit into its dtype or its "
            "weights are damaged: try model.dtype: bfloat16 or float32"
        )


class Overloaded(RanvierError):
    """Report that there is no room for a request now.

    Nothing was started; try again later, or with a smaller request.
    """


class Expired(RanvierError):
    """Report that the deadline of a request passed before the request was done. Its resources are free again."""


class RecordingError(RanvierError):
    """Report that a recording does not exist, is damaged, or lacks what was asked for."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 process", "2 processes", "0 messages"."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "sh", "ch", "x")) else "s"
    return f"{number} {noun}{ending}"


MOST_LETTERS = 16_384
"""Largest length of an error's text or traceback, in characters: a step may raise an exception of 30 MB."""


def describe(error: BaseException) -> str:
    """Return the type and the text of an error as valid UTF-8, with at most `MOST_LETTERS` characters of the text."""
    return f"{type(error).__name__}: {words(error)}"


def words(error: BaseException) -> str:
    """Return the text of an error without its type (see `describe`)."""
    try:
        return _writable(str(error))
    except Exception as own:  # custom code raised this
        return f"(its text cannot be read: str() raised {type(own).__name__})"


def traceback_of(error: BaseException) -> str:
    """Return the traceback as Python prints it, as valid UTF-8. The middle of a long one is left out."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as own:
        frames = "".join(traceback.format_tb(error.__traceback__))
        text = f"{frames}{describe(error)} (not printed by Python: {type(own).__name__})"
    return _writable(text, end=True)


def _writable(text: str, *, end: bool = False) -> str:
    left_out = len(text) - MOST_LETTERS
    if left_out > 0:
        half = MOST_LETTERS // 2
        text = (
            f"{text[:half]} … {left_out} characters left out … {text[-half:]}"
            if end
            else (f"{text[:MOST_LETTERS]} … {left_out} characters left out")
        )
    return text.encode(errors="replace").decode()
