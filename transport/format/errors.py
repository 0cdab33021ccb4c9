"""Define the errors of this package, with one class for each party that can be at fault.

The message says what was expected and what came.
"""

from __future__ import annotations


class RanvierError(Exception):
    """Serve as the base class of every error that this package raises on purpose."""


class ProtocolError(RanvierError):
    """Report that the peer sent something invalid: a bad header, a wrong shape, an unknown edge, or another version.

    The message is refused; the link and the process continue.
    """


class LinkClosed(RanvierError):
    """Report that this side used a link or a wire after closing it."""


class LinkBroken(RanvierError):
    """Report that the other side is gone, refused the connection, cannot be reached, or never answered."""


class AddressError(RanvierError, ValueError):
    """Report an endpoint that may not be used, such as a wildcard, a path that is too long, or an unknown scheme."""


class ResourceError(RanvierError):
    """Report that this machine has run out of a resource, such as descriptors, disk or memory. The message names it."""


class KeyFileError(RanvierError):
    """Report that a key is missing, is not a valid key, or can be read by other users."""
