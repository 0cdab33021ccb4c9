"""Connect the two threads of a host: commands go to the step thread, events to the control thread.

The threads share nothing else. Deques and integers are safe under the interpreter's lock. A message to its own inbox
wakes the step thread, and trio's `run_sync_soon` wakes the control thread. So neither ever waits for the other.
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
    """Hold a command of the supervisor, and when it arrived, in nanoseconds of this machine's clock."""

    kind: str
    fields: Mapping[str, Any]
    received_ns: int


class Crossing:
    """Hold what exactly one step thread and one control thread share.

    The step thread writes `steps`, `stepping_since_ns` (0 when waiting) and `stepped_ns` (the end of the last step);
    the control thread reads them. `situation` returns what the step thread waits for; the control thread calls it.
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

    # -- called by the step thread ------------------------------------------------------------------------------

    def tell(self, kind: str, **fields: Any) -> None:
        """Queue an event for the supervisor."""
        self._early.append((kind, fields))
        if self._token is not None:
            self._token.run_sync_soon(self._pass_on)

    @property
    def untold(self) -> bool:
        """Return whether an event is queued that the control thread has not passed on yet."""
        return bool(self._early)

    # -- called by the control thread ---------------------------------------------------------------------------

    def attach(self, events: trio.MemorySendChannel[Event]) -> None:
        """Send events to this channel from now on, first those that are queued already."""
        self._events = events
        self._token = trio.lowlevel.current_trio_token()
        self._pass_on()

    def command(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Queue a command for the step thread, and wake it."""
        self.commands.append(Command(kind, fields, time.monotonic_ns()))
        if self.waker is not None:
            self.waker.wake()

    def _pass_on(self) -> None:
        assert self._events is not None
        while self._early:
            self._events.send_nowait(self._early.popleft())
