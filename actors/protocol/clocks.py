"""Estimate how far the clock of a host is ahead of the run's clock, over the control link and without I/O.

A question is sent at t0, received at t1 and answered at t2 by the host's clock, and the answer arrives at t3. If both ways
take equally long, the host is ahead by ((t1 - t0) + (t2 - t3)) / 2. The error is at most half of the time that both ways take
together. So the fastest answer is the most accurate (Cristian 1989; the clock filter of NTP, RFC 5905). Two clocks drift
apart. Therefore earlier estimates are kept, and between two estimates the offset is taken to change evenly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

FIRST = 8
"""Number of heartbeats and other signs of life that are each followed by a question; later only every `EVERY`-th is."""
EVERY = 20
DRIFT = 50e-6
"""Assumed drift between two clocks, in seconds per second. The error of an estimate grows at this rate."""
APART_NS = 10 * 10**9
"""Length of a period of which only the best estimate is kept, in nanoseconds."""
MOST = 200
"""Largest number of estimates. When there are more, every other one is dropped, and the period doubles."""


class Estimate(NamedTuple):
    """Say that the host's clock was ahead by `offset_ns`, give or take `error_ns`, at `at_ns` of the run's clock."""

    at_ns: int
    offset_ns: int
    error_ns: int


@dataclass(slots=True)
class Clock:
    """Hold the estimates of one host's clock in the order of their times; the last one is of the current period."""

    estimates: list[Estimate] = field(default_factory=list)
    beats: int = 0
    _begun_ns: int = 0
    _apart_ns: int = APART_NS

    def asks(self) -> bool:
        """Count a sign of life of the host, and return whether to send a question now."""
        self.beats += 1
        return self.beats <= FIRST or self.beats % EVERY == 0

    def on_answer(self, asked_ns: int, heard_ns: int, answered_ns: int, now_ns: int) -> bool:
        """Keep an answer if it is better than the last estimate, and return whether it is.

        The arguments are t0, t1, t2 and t3 of the module's description, in nanoseconds.
        """
        error_ns = (max(0, (now_ns - asked_ns) - (answered_ns - heard_ns)) + 1) // 2
        last = self.estimates[-1] if self.estimates else None
        if last is not None and error_ns >= last.error_ns + int((now_ns - last.at_ns) * DRIFT):
            return False
        if last is not None and now_ns - self._begun_ns < self._apart_ns:
            self.estimates.pop()
        else:
            self._begun_ns = now_ns
        self.estimates.append(Estimate(now_ns, ((heard_ns - asked_ns) + (answered_ns - now_ns)) // 2, error_ns))
        if len(self.estimates) > MOST:
            del self.estimates[1:-1:2]
            self._apart_ns *= 2
        return True


def is_another(estimates: Sequence[Estimate]) -> bool:
    """Return whether the clock differs from the run's by more than the error. If not, it needs no correction."""
    return any(abs(known.offset_ns) > known.error_ns for known in estimates)


class Correction:
    """Convert times of another clock to the run's clock.

    Before the first and after the last estimate the offset is constant. Between two estimates it changes evenly.
    """

    def __init__(self, estimates: Sequence[Estimate]) -> None:
        self._estimates = estimates
        self._shown_ns = [known.at_ns + known.offset_ns for known in estimates]

    def ahead_ns(self, time_ns: int) -> int:
        """Return how far the clock was ahead when it showed `time_ns`, in nanoseconds."""
        after = bisect_right(self._shown_ns, time_ns)
        if after == 0 or after == len(self._shown_ns):
            return self._estimates[max(0, after - 1)].offset_ns
        begin, end = self._estimates[after - 1], self._estimates[after]
        passed_ns = time_ns - self._shown_ns[after - 1]
        whole_ns = self._shown_ns[after] - self._shown_ns[after - 1]
        return begin.offset_ns + (end.offset_ns - begin.offset_ns) * passed_ns // whole_ns
