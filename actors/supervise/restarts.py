"""How often an actor may be started anew, and how long to wait before: a budget over a sliding window. No I/O."""

from __future__ import annotations

from collections import deque

from ..protocol.host_spec import Restart


class Restarts:
    """The restarts of one actor, all its replicas together. Times are seconds of the driver's clock."""

    def __init__(self, policy: Restart) -> None:
        self.policy = policy
        self._at_s: deque[float] = deque()

    def take(self, now_s: float) -> float | None:
        """One more restart: the seconds to wait before it, or None if the budget is used up."""
        while self._at_s and self._at_s[0] <= now_s - self.policy.window_s:
            self._at_s.popleft()
        if len(self._at_s) >= self.policy.max:
            return None
        self._at_s.append(now_s)
        return float(self.policy.backoff_s * 2 ** (len(self._at_s) - 1))

    def __str__(self) -> str:
        return f"it was started anew {self.policy.max} times within {self.policy.window_s:g} s"
