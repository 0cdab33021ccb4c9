"""How far the clock of a host is ahead of the run's own: estimated over the control link, without I/O.

A question goes out at t0, is heard at t1 and answered at t2 by the host's clock, and the answer comes at t3. If both ways
took as long, the host is ahead by ((t1 - t0) + (t2 - t3)) / 2; it cannot be further off than half of what the ways took
together. The answer that was fastest says most (Cristian 1989; the clock filter of NTP, RFC 5905).
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST = 8
"""So many questions with the first signs of life, then one with every `EVERY`."""
EVERY = 20
DRIFT = 50e-6
"""Two clocks may drift apart by so much: what is known of them grows old."""


@dataclass(slots=True)
class Clock:
    """Nanoseconds. `offset_ns` is what the host's clock shows more than the run's, give or take `error_ns`."""

    offset_ns: int = 0
    error_ns: int = 0
    at_ns: int = 0
    heard: int = 0
    beats: int = 0

    def asks(self) -> bool:
        """Whether the sign of life that has come is a time to ask."""
        self.beats += 1
        return self.beats <= FIRST or self.beats % EVERY == 0

    def on_answer(self, asked_ns: int, heard_ns: int, told_ns: int, now_ns: int) -> bool:
        """Whether it says more than what is known."""
        error_ns = (max(0, (now_ns - asked_ns) - (told_ns - heard_ns)) + 1) // 2
        self.heard += 1
        if self.heard > 1 and error_ns >= self.error_ns + int((now_ns - self.at_ns) * DRIFT):
            return False
        self.offset_ns, self.error_ns = ((heard_ns - asked_ns) + (told_ns - now_ns)) // 2, error_ns
        self.at_ns = now_ns
        return True

    @property
    def shift_ns(self) -> int:
        """What is to be taken off the host's times. Within the error it is the same clock, which needs no correction."""
        return self.offset_ns if abs(self.offset_ns) > self.error_ns else 0
