"""How far the clock of a host is ahead of the run's own, at each time: estimated over the control link, without I/O.

A question goes out at t0, is heard at t1 and answered at t2 by the host's clock, and the answer comes at t3. If both ways
took as long, the host is ahead by ((t1 - t0) + (t2 - t3)) / 2; it cannot be further off than half of what the ways took
together. The answer that was fastest says most (Cristian 1989; the clock filter of NTP, RFC 5905). Two clocks drift apart:
what was known at other times is kept, and between two of them the offset is taken to change evenly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

FIRST = 8
"""So many questions with the first signs of life, then one with every `EVERY`."""
EVERY = 20
DRIFT = 50e-6
"""Two clocks may drift apart by so much: what is known of them grows old."""
APART_NS = 10 * 10**9
"""The best estimate of so long is kept."""
MOST = 200
"""If they become more than that, every other one is dropped, and they are kept for twice as long."""


class Estimate(NamedTuple):
    """At a time of the run's clock, the host's showed `offset_ns` more, give or take `error_ns`. Nanoseconds."""

    at_ns: int
    offset_ns: int
    error_ns: int


@dataclass(slots=True)
class Clock:
    """What is known of one. `estimates` in the order of their times, the last one is of now."""

    estimates: list[Estimate] = field(default_factory=list)
    beats: int = 0
    _begun_ns: int = 0
    _apart_ns: int = APART_NS

    def asks(self) -> bool:
        """Whether the sign of life that has come is a time to ask."""
        self.beats += 1
        return self.beats <= FIRST or self.beats % EVERY == 0

    def on_answer(self, asked_ns: int, heard_ns: int, told_ns: int, now_ns: int) -> bool:
        """Whether it says more than what is known."""
        error_ns = (max(0, (now_ns - asked_ns) - (told_ns - heard_ns)) + 1) // 2
        last = self.estimates[-1] if self.estimates else None
        if last is not None and error_ns >= last.error_ns + int((now_ns - last.at_ns) * DRIFT):
            return False
        if last is not None and now_ns - self._begun_ns < self._apart_ns:
            self.estimates.pop()
        else:
            self._begun_ns = now_ns
        self.estimates.append(Estimate(now_ns, ((heard_ns - asked_ns) + (told_ns - now_ns)) // 2, error_ns))
        if len(self.estimates) > MOST:
            del self.estimates[1:-1:2]
            self._apart_ns *= 2
        return True


def is_another(estimates: Sequence[Estimate]) -> bool:
    """Whether it is another clock than the run's. Within the error it is the same, which needs no correction."""
    return any(abs(known.offset_ns) > known.error_ns for known in estimates)


class Correction:
    """Times of another clock in the run's: before the first estimate and after the last one as they say, between two of them
    as if it had drifted evenly."""

    def __init__(self, estimates: Sequence[Estimate]) -> None:
        self._estimates = estimates
        self._shown_ns = [known.at_ns + known.offset_ns for known in estimates]

    def ahead_ns(self, time_ns: int) -> int:
        """How far it was ahead when it showed that time."""
        after = bisect_right(self._shown_ns, time_ns)
        if after == 0 or after == len(self._shown_ns):
            return self._estimates[max(0, after - 1)].offset_ns
        begin, end = self._estimates[after - 1], self._estimates[after]
        passed_ns = time_ns - self._shown_ns[after - 1]
        whole_ns = self._shown_ns[after] - self._shown_ns[after - 1]
        return begin.offset_ns + (end.offset_ns - begin.offset_ns) * passed_ns // whole_ns
