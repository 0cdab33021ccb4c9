"""Connect the two threads of a host: commands go to the step thread, events to the control thread.

The threads share nothing else. Deques and integers are safe under the interpreter's lock. A message to its own inbox
wakes the step thread, and trio's `run_sync_soon` wakes the control thread. So neither ever waits for the other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import trio

from ranvier.transport.links.wire import Waker

from ..protocol.control_protocol import HostMessage, StepCommand
from .ring import Ring


class ReceivedCommand(NamedTuple):
    """Hold a command of the supervisor, and when it arrived, in nanoseconds of this machine's clock."""

    command: StepCommand
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
        self.commands: deque[ReceivedCommand] = deque()
        self.waker: Waker | None = None
        self._events: trio.MemorySendChannel[HostMessage] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._early: deque[HostMessage] = deque()

    # -- called by the step thread ------------------------------------------------------------------------------

    def report(self, message: HostMessage) -> None:
        """Queue a message for the supervisor."""
        self._early.append(message)
        if self._token is not None:
            self._token.run_sync_soon(self._pass_on)

    @property
    def unsent(self) -> bool:
        """Return whether a message is queued that the control thread has not passed on yet."""
        return bool(self._early)

    # -- called by the control thread ---------------------------------------------------------------------------

    def attach(self, events: trio.MemorySendChannel[HostMessage]) -> None:
        """Pass messages to this channel from now on, first those that are queued already."""
        self._events = events
        self._token = trio.lowlevel.current_trio_token()
        self._pass_on()

    def command(self, command: StepCommand) -> None:
        """Queue a command for the step thread, and wake it."""
        self.commands.append(ReceivedCommand(command, time.monotonic_ns()))
        if self.waker is not None:
            self.waker.wake()

    def _pass_on(self) -> None:
        assert self._events is not None
        while self._early:
            self._events.send_nowait(self._early.popleft())
