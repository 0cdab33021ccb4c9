"""Limit how often an actor is restarted, and delay each restart: a budget over a sliding window. No I/O."""

from __future__ import annotations

from collections import deque

from ..protocol.host_spec import Restart


class Restarts:
    """Count the restarts of one actor, over all its replicas. Times are seconds of the driver's clock."""

    def __init__(self, policy: Restart) -> None:
        self.policy = policy
        self._at_s: deque[float] = deque()

    def take(self, now_s: float) -> float | None:
        """Take one restart from the budget. Return the seconds to wait before it, or None if the budget is used up."""
        while self._at_s and self._at_s[0] <= now_s - self.policy.window_s:
            self._at_s.popleft()
        if len(self._at_s) >= self.policy.max:
            return None
        self._at_s.append(now_s)
        return float(self.policy.backoff_s * 2 ** (len(self._at_s) - 1))

    def __str__(self) -> str:
        return (
            f"it was restarted {self.policy.max} time{'s' * (self.policy.max != 1)} within {self.policy.window_s:g} s"
        )
