"""Limit how often refused messages are reported: a peer that sends a million must not fill a disk or starve a host."""

from __future__ import annotations

PER_S = 10


class Refusals:
    """Report the first `PER_S` refusals of each second, and count the rest.

    The class does no I/O. The caller passes times in seconds.
    """

    def __init__(self) -> None:
        self._second = -1
        self._passed = self._left_out = 0

    def one_more(self, now_s: float) -> int | None:
        """Count one refusal. Return how many were left out before it, or None if it is left out, too."""
        if int(now_s) != self._second:
            self._second, self._passed = int(now_s), 0
        if self._passed >= PER_S:
            self._left_out += 1
            return None
        self._passed += 1
        return self.rest()

    def overdue(self, now_s: float) -> int:
        """Return how many refusals were left out and not reported, once their second is over."""
        return self.rest() if int(now_s) != self._second else 0

    def rest(self) -> int:
        """Return how many refusals were left out since the last report, and count from 0 again."""
        left_out, self._left_out = self._left_out, 0
        return left_out


def with_left_out(what: str, left_out: int) -> str:
    """Return the text of a refusal, with the number of refusals that were left out before it."""
    return f"{what} (and {left_out} more before, left out)" if left_out else what
