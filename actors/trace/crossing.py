"""Where the two threads of a host meet, and the only place: commands to the step thread, events to the control thread.

Plain deques and integers under the interpreter's lock; the step thread is woken by a message to its own inbox, the
control thread by trio's `run_sync_soon`, so neither ever waits for the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import trio

from ranvier.transport.links.wire import Waker

from .ring import Ring

Event = tuple[str, Mapping[str, Any]]


class Command(NamedTuple):
    """What the supervisor wants, and when it came, in nanoseconds of this machine's clock."""

    kind: str
    fields: Mapping[str, Any]
    received_ns: int


class Crossing:
    """Shared by exactly one step thread and one control thread.

    `steps`, `stepping_since_ns` (0 when waiting) and `stepped_ns` (when the last step ended) are written by the step thread
    and read by the heartbeat. `situation` says what the step thread waits for; the control thread calls it.
    """

    def __init__(self) -> None:
        self.ring = Ring()
        self.steps = 0
        self.stepping_since_ns = 0
        self.stepped_ns = 0
        self.situation: Callable[[], dict[str, Any]] | None = None
        self.queued = 0
        self.counters: dict[str, int] = {}
        self.commands: deque[Command] = deque()
        self.waker: Waker | None = None
        self._events: trio.MemorySendChannel[Event] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._early: deque[Event] = deque()

    # -- of the step thread -------------------------------------------------------------------------------------

    def tell(self, kind: str, **fields: Any) -> None:
        """An event for the supervisor."""
        self._early.append((kind, fields))
        if self._token is not None:
            self._token.run_sync_soon(self._pass_on)

    @property
    def untold(self) -> bool:
        """Whether an event was told that the control thread has not passed on yet."""
        return bool(self._early)

    # -- of the control thread ----------------------------------------------------------------------------------

    def attach(self, events: trio.MemorySendChannel[Event]) -> None:
        """Events go to this channel from now on, those told before first."""
        self._events = events
        self._token = trio.lowlevel.current_trio_token()
        self._pass_on()

    def command(self, kind: str, fields: Mapping[str, Any]) -> None:
        """A command for the step thread."""
        self.commands.append(Command(kind, fields, time.monotonic_ns()))
        if self.waker is not None:
            self.waker.wake()

    def _pass_on(self) -> None:
        assert self._events is not None
        while self._early:
            self._events.send_nowait(self._early.popleft())
