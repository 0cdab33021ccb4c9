"""Errors by blame. Whoever is at fault has a class; the message says what was expected and what came."""

from __future__ import annotations


class RanvierError(Exception):
    """The root of every error this package raises on purpose."""


class ProtocolError(RanvierError):
    """The peer sent what it must not: bad header, wrong shape, unknown edge, another version.

    The message is refused; the link and the process go on.
    """


class LinkClosed(RanvierError):
    """This side has closed the link or the wire and may not use it any more."""


class LinkBroken(RanvierError):
    """The other side is gone or cannot be reached: refused, unreachable, or never answered."""


class AddressError(RanvierError, ValueError):
    """An endpoint that may not be used: a wildcard, a path too long, an unknown scheme."""


class ResourceError(RanvierError):
    """This machine has run out of something: descriptors, disk, memory. The message says of what."""


class KeyFileError(RanvierError):
    """A key is missing, is none, or may be read by others."""
