"""Open the wire that an address names."""

from __future__ import annotations

from pathlib import Path

from ..format.host_id import host_id
from ..links.wire import ProcessWire
from .curve import read
from .local import LocalWire
from .zeromq import ZeroWire


def open_wire(
    me: str, address: str, *, max_frame_bytes: int, shared_from_bytes: int = 0, keys: Path | None = None
) -> ProcessWire:
    """Open the wire of one process.

    Args:
        me: the identity others see, `actor.replica.epoch`.
        address: `local:///path`, `ipc:///path` or `tcp://address:port`.
        max_frame_bytes: larger frames are refused.
        shared_from_bytes: over `local`, tensors of at least this many bytes go through shared memory; 0: none do.
        keys: the folder of the keys that tcp needs.

    Raises:
        AddressError: the address may not be used or is in use.
        KeyFileError: a key is missing or may be read by others.
        ResourceError: there are not enough descriptors.
    """
    if address.startswith("local://"):
        return LocalWire(me, address, max_frame_bytes=max_frame_bytes, shared_from_bytes=shared_from_bytes)
    return ZeroWire(
        me,
        address,
        max_frame_bytes=max_frame_bytes,
        keys=read(keys, host_id(me).actor) if keys is not None else None,
    )
