"""How often refused messages are told of. A peer that sends a million of them must not fill a disk, nor starve a host."""

from __future__ import annotations

PER_S = 10


class Refusals:
    """Lets the first `PER_S` of each second through and counts the others. No I/O: times are the caller's, in seconds."""

    def __init__(self) -> None:
        self._second = -1
        self._told = self._untold = 0

    def one_more(self, now_s: float) -> int | None:
        """Return how many were left out before this one, or None if this one is left out, too."""
        if int(now_s) != self._second:
            self._second, self._told = int(now_s), 0
        if self._told >= PER_S:
            self._untold += 1
            return None
        self._told += 1
        return self.rest()

    def overdue(self, now_s: float) -> int:
        """Return how many were left out in a second that is over, and are not told of yet."""
        return self.rest() if int(now_s) != self._second else 0

    def rest(self) -> int:
        """Return how many were left out since they were last told of."""
        untold, self._untold = self._untold, 0
        return untold


def with_left_out(what: str, left_out: int) -> str:
    """Return the words of a refusal, and how many more there were before it."""
    return f"{what} (and {left_out} more before, left out)" if left_out else what
