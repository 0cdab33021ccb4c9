"""What others wrote, as a terminal may be given it."""

from __future__ import annotations

import re

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text in which control characters are spelled out, other than the ends of lines and tabs. What others wrote, a
    model among them, must not steer a terminal."""
    return _UNSEEN.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
