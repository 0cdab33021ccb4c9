"""Open sessions at an actor that fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ranvier.actors.component.actor import Actor
from ranvier.actors.component.session import SessionInfo
from ranvier.actors.host.open_sessions import OpenSessions


class Failing(Actor):
    """Take memory for a session, and then fail."""

    def __init__(self, *, also_at_close: bool) -> None:
        self.taken: set[int] = set()
        self.also_at_close = also_at_close

    def open(self, session: SessionInfo) -> None:
        self.taken.add(session.session)
        raise MemoryError("no room")

    def close(self, session: int) -> None:
        self.taken.discard(session)
        if self.also_at_close:
            raise KeyError(session)


@pytest.mark.parametrize("also_at_close", [False, True])
def test_a_failed_open_gives_back_what_it_took(also_at_close: bool) -> None:
    """Close the session at the actor, and report the error of `open`, with that of `close` as a note."""
    actor = Failing(also_at_close=also_at_close)
    core: Any = SimpleNamespace(open=lambda *_: None, close=lambda _: False)
    with pytest.raises(MemoryError, match="no room") as caught:
        OpenSessions(actor, core).open(SessionInfo(7, 1, 10))
    assert not actor.taken
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == also_at_close and all("could not be closed: KeyError" in note for note in notes)
