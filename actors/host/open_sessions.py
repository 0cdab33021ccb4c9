"""The sessions that one actor has open, and those that it holds for a later epoch.

When an actor without a state is lost, the others need not forget what they have: they *hold* their sessions, whose rows are
refused meanwhile, and take them up in the next epoch where the log says, by `Actor.rewind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..component.actor import REWINDS, Actor, keeps
from ..component.session import SessionInfo
from .scheduler import HostCore


class Onlooker(Protocol):
    """Whoever follows the sessions: the recording, the spans."""

    def opened(self, info: SessionInfo, rewound: bool) -> None: ...

    def closed(self, session: int) -> None: ...


class OpenSessions:
    """Of one host: its actor, and the core that takes or refuses the rows."""

    def __init__(self, actor: Actor, core: HostCore, onlookers: Sequence[Onlooker] = ()) -> None:
        self._actor = actor
        self._core = core
        self._onlookers = onlookers
        self._rewinds = keeps(actor) == REWINDS
        self._held: set[int] = set()

    def open(self, info: SessionInfo) -> None:
        """Open a session, or take up one that is held at position `info.kept`.

        Raises:
            Exception: whatever the actor raised. Then what came for the session already is refused with it.
        """
        session = info.session
        rewound = bool(info.kept) and self._rewinds
        try:
            if rewound:
                if session not in self._held:
                    raise ValueError(f"session {session}: expected {info.kept} positions to be held, none are")
                self._actor.rewind(info)
                self._held.discard(session)
            else:
                self.close(session)
                self._actor.open(info)
        except BaseException:
            self._core.open(session, info.epoch)
            self._core.close(session)
            raise
        self._core.open(session, info.epoch, info.places)
        for onlooker in self._onlookers:
            onlooker.opened(info, rewound)

    def hold(self, session: int) -> None:
        """Refuse its rows until it is opened anew, and forget nothing."""
        if self._core.close(session):
            self._held.add(session)

    def close(self, session: int) -> None:
        """Idempotent."""
        if self._core.close(session) or session in self._held:
            self._held.discard(session)
            try:
                self._actor.close(session)
            finally:
                for onlooker in self._onlookers:
                    onlooker.closed(session)
