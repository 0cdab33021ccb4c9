"""Count durations in buckets of equal ratio, so that percentiles of any number of them cost no memory."""

from __future__ import annotations

import math
from collections import Counter

PER_OCTAVE = 8
"""Buckets between a duration and twice that. A percentile is off by at most 4.5 %."""


def bucket(nanoseconds: int) -> int:
    """Return the bucket of a duration. Bucket 0 holds all up to 1 µs."""
    return int(PER_OCTAVE * math.log2(nanoseconds / 1e3)) + 1 if nanoseconds > 1000 else 0


def microseconds(bucket: int) -> float:
    """Return the duration in the middle of a bucket, in microseconds; 0 for bucket 0."""
    return float(2 ** ((bucket - 0.5) / PER_OCTAVE)) if bucket else 0.0


def percentile(counts: Counter[int], share: float) -> float | None:
    """Return a percentile (0 to 1) by nearest rank, in microseconds; None if there are no durations."""
    rank, seen = max(1, math.ceil(share * counts.total())), 0
    for each in sorted(counts):
        seen += counts[each]
        if seen >= rank:
            return microseconds(each)
    return None
