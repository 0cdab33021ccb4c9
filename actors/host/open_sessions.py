"""Track the sessions that one actor has open, and those that it holds for a later epoch.

When a stateless actor is lost, the other actors keep their state: they *hold* their sessions, and refuse the sessions'
rows meanwhile. In the next epoch they continue each session from position `SessionInfo.kept`, by `Actor.rewind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..component.actor import REWINDS, Actor, keeps
from ..component.session import SessionInfo
from ..errors import describe
from .scheduler import HostCore


class Onlooker(Protocol):
    """Observe which sessions open and close, as the recording and the spans do."""

    def opened(self, info: SessionInfo, rewound: bool) -> None: ...

    def closed(self, session: int) -> None: ...


class OpenSessions:
    """Open, hold and close the sessions of one host, both at its actor and at its core."""

    def __init__(self, actor: Actor, core: HostCore, onlookers: Sequence[Onlooker] = ()) -> None:
        self._actor = actor
        self._core = core
        self._onlookers = onlookers
        self._rewinds = keeps(actor) == REWINDS
        self._held: set[int] = set()

    def open(self, info: SessionInfo) -> None:
        """Open a session, or continue a held one from position `info.kept`.

        Raises:
            Exception: whatever the actor raised. Rows that already arrived for the session are then refused.
        """
        session = info.session
        rewound = bool(info.kept) and self._rewinds
        try:
            if rewound:
                if session not in self._held:
                    raise ValueError(f"session {session}: expected held positions up to {info.kept}, got none")
                self._actor.rewind(info)
                self._held.discard(session)
            else:
                self.close(session)
                self._actor.open(info)
        except BaseException as error:
            self._core.open(session, info.epoch)
            self._core.close(session)
            if not rewound:
                try:
                    self._actor.close(session)  # it may have taken memory before it failed
                except Exception as own:
                    error.add_note(f"and the session could not be closed: {describe(own)}")
            raise
        self._core.open(session, info.epoch, info.replicas, [read.place.tensor for read in info.reads])
        for onlooker in self._onlookers:
            onlooker.opened(info, rewound)

    def hold(self, session: int) -> None:
        """Refuse the rows of a session until it is opened again. The actor keeps its state."""
        if self._core.close(session):
            self._held.add(session)

    def close(self, session: int) -> None:
        """Close a session at the core and at the actor. Does nothing if it is neither open nor held."""
        if self._core.close(session) or session in self._held:
            self._held.discard(session)
            try:
                self._actor.close(session)
            finally:
                for onlooker in self._onlookers:
                    onlooker.closed(session)
