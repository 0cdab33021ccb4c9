"""Define the messages between a launcher and its zygote: tagged structs in msgpack, one after the other over a pipe.

The msgpack package reads them, because its `Unpacker` accepts a stream in pieces of any size, and bounds its buffer. msgspec
checks the fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgpack
import msgspec

from ranvier.transport.format.errors import ProtocolError

from ..protocol.host_spec import HostSpec

MOST_BYTES = 64 << 20
"""Size of the largest message. A host's part of a plan takes some kilobytes for each of its links."""


class Begin(msgspec.Struct, tag="begin"):
    """Give the folder of the run's sockets, and the file to which the zygote writes its errors from now on."""

    sockets: str
    errors: str


class Start(msgspec.Struct, tag="start"):
    """Ask for a process that runs these actors, and whose output goes to the file `stderr`."""

    specs: list[HostSpec]
    stderr: str


class Imported(msgspec.Struct, tag="imported"):
    """Report that torch is imported, so that hosts can be forked quickly."""


class Started(msgspec.Struct, tag="started"):
    """Report the process id of a host. `key` is the name of the process (`HostSpec.process`)."""

    key: str
    pid: int


class NotStarted(msgspec.Struct, tag="not started"):
    """Report why a host cannot be started."""

    key: str
    why: str


class Exited(msgspec.Struct, tag="exited"):
    """Report the exit code of a host; a negative one is the signal that ended it."""

    key: str
    code: int


Command = Begin | Start
Event = Imported | Started | NotStarted | Exited
T = TypeVar("T")


def pack(message: Command | Event) -> bytes:
    """Return the bytes of a message."""
    data: bytes = msgpack.packb(msgspec.to_builtins(message))
    return data


class Reader(Generic[T]):
    """Read the messages of one pipe.

    Args:
        kind: the union of the messages that may come.
    """

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._unpacker = msgpack.Unpacker(max_buffer_size=MOST_BYTES)

    def feed(self, data: bytes | bytearray) -> Iterator[T]:
        """Add received bytes, and yield the messages that are complete now.

        Raises:
            ProtocolError: the bytes are not a message of that kind, or are too large.
        """
        try:
            self._unpacker.feed(data)
            for plain in self._unpacker:
                message: T = msgspec.convert(plain, self._kind)
                yield message
        except (ValueError, msgpack.exceptions.UnpackException, msgspec.MsgspecError) as error:
            raise ProtocolError(f"zygote: expected {self._kind}, got something else: {error}") from None
