"""Define what a launcher and its zygote say to each other: tagged structs in msgpack, one after the other over a pipe.

The msgpack package reads them, because its `Unpacker` takes a stream in whatever pieces it comes, and bounds what it buffers.
msgspec checks the fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgpack
import msgspec

from ranvier.transport.format.errors import ProtocolError

from ..protocol.host_spec import HostSpec

MOST_BYTES = 64 << 20
"""Largest message. A host's part of a plan has some kilobytes for each of its links."""


class Begin(msgspec.Struct, tag="begin"):
    """Say where the run's sockets are, and where the zygote writes its errors from now on."""

    sockets: str
    errors: str


class Start(msgspec.Struct, tag="start"):
    """Ask for a host, whose output goes to the file `stderr`."""

    spec: HostSpec
    stderr: str


class Imported(msgspec.Struct, tag="imported"):
    """Report that torch is imported: hosts can be forked in no time."""


class Started(msgspec.Struct, tag="started"):
    """Report the process of a host, which is known by its identity."""

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
        """Take in what came, and give the messages that are complete now.

        Raises:
            ProtocolError: it is no message of that kind, or too large.
        """
        try:
            self._unpacker.feed(data)
            for plain in self._unpacker:
                message: T = msgspec.convert(plain, self._kind)
                yield message
        except (ValueError, msgpack.exceptions.UnpackException, msgspec.MsgspecError) as error:
            raise ProtocolError(f"zygote: expected {self._kind}, got something else: {error}") from None
