"""Notice that every actor has been idle for so long that no open session will be answered any more."""

from __future__ import annotations

from ranvier.actors.supervise.supervision import Supervision

from ..file.schema import SupervisionSection

LATE_NS = 3_000_000_000
"""Longest time between two checks for idle actors, in nanoseconds (3 s).

A check normally comes one tick after the last message. A later check restarts the count of idle time, because this
process itself may have been suspended.
"""


class Quiet:
    """Measure how long all actors have been idle. No I/O, and no clock of its own."""

    def __init__(self, supervision: Supervision, limits: SupervisionSection) -> None:
        self._supervision, self._limits = supervision, limits
        self._since_ns = self._looked_ns = 0
        self._steps = -1

    def since_ns(self, now_ns: int) -> int | None:
        """Return since when all actors have been idle, if that is longer than `join_deadline_s`; else None."""
        supervision, limits = self._supervision, self._limits
        # if this check is late, this process may have been suspended: answers from that time are still unread
        late, self._looked_ns = now_ns - self._looked_ns > LATE_NS, now_ns
        if late or not supervision.quiet or supervision.steps != self._steps or not self._since_ns:
            self._since_ns, self._steps = now_ns, supervision.steps
        # a step that has just begun is reported with the next heartbeat
        quiet_s = (now_ns - self._since_ns) / 1e9 - 2 * limits.heartbeat_interval_s
        return self._since_ns if quiet_s > limits.join_deadline_s else None
