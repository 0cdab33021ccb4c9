"""Endpoints: where a wire may be bound. Checked before a socket exists.

`inproc://name`, `ipc:///absolute/path` (at most 107 bytes: the kernel's limit for a socket's path) and
`tcp://address:port`, without keys on loopback alone. Wildcards and abstract sockets are refused: the first let strangers in,
the second have no permissions.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from ..format.errors import AddressError

MAX_IPC_PATH_BYTES = 107
_BESIDE = "ipc://./"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A checked address. `scheme` is inproc, ipc or tcp; `place` what follows; `port` 0 means: any free one."""

    scheme: str
    place: str
    port: int = 0

    def __str__(self) -> str:
        if self.scheme != "tcp":
            return f"{self.scheme}://{self.place}"
        return f"tcp://{f'[{self.place}]' if ':' in self.place else self.place}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether bytes stay in this machine's memory without passing a network stack."""
        return self.scheme != "tcp"


def settled(text: str, folder: Path) -> str:
    """Return an endpoint of a file in `folder` as wires take it: `ipc://./name` is a socket of that folder."""
    return f"ipc://{folder.resolve() / text.removeprefix(_BESIDE)}" if text.startswith(_BESIDE) else text


def parse(text: str, *, guarded: bool = False) -> Endpoint:
    """The endpoint in `text`. Where connections are `guarded` by keys, it may be beyond loopback.

    Raises:
        AddressError: it may not be used; the message says what to write instead.
    """
    scheme, separator, place = text.partition("://")
    if not separator or not place:
        raise AddressError(f"endpoint {text!r}: expected ipc:///path, tcp://address:port or inproc://name")
    if scheme == "inproc":
        return Endpoint(scheme, place)
    if scheme == "ipc":
        return _ipc(text, place)
    if scheme == "tcp":
        return _tcp(text, place, guarded)
    raise AddressError(f"endpoint {text!r}: unknown scheme {scheme!r}; use ipc, tcp or inproc")


def _ipc(text: str, place: str) -> Endpoint:
    if place.startswith("@"):
        raise AddressError(f"endpoint {text!r}: an abstract socket has no permissions; use a path")
    if not os.path.isabs(place):
        raise AddressError(f"endpoint {text!r}: expected an absolute path")
    size = len(os.fsencode(place))
    if size > MAX_IPC_PATH_BYTES:
        raise AddressError(
            f"endpoint {text!r}: the path is {size} bytes long, at most {MAX_IPC_PATH_BYTES} are possible; "
            "use a shorter folder"
        )
    return Endpoint("ipc", place)


def _tcp(text: str, place: str, guarded: bool) -> Endpoint:
    host, separator, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator:
        host, port = place, "0"
    if host in ("*", "0.0.0.0", "::", ""):
        raise AddressError(f"endpoint {text!r}: would listen on every interface; name one address")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise AddressError(f"endpoint {text!r}: {host!r} is not an address; use numbers such as 127.0.0.1") from None
    if not (address.is_loopback or guarded):
        raise AddressError(
            f"endpoint {text!r}: {host} is not loopback, and tcp beyond loopback needs CURVE keys; see `ranvier keys new`"
        )
    if not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"endpoint {text!r}: expected a port from 0 to 65535, got {port!r}")
    return Endpoint("tcp", str(address), int(port))
