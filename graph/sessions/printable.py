"""Make untrusted text safe to print on a terminal."""

from __future__ import annotations

import re

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with its control characters escaped, except line feeds and tabs.

    Text of other people, or of a model, must not control the terminal. Marks that change the direction of text, and
    lone surrogates, are escaped too.
    """
    return _UNSEEN.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
