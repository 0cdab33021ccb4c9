"""Check endpoints, which are the addresses that wires bind, before a socket exists.

Valid endpoints are `inproc://name`, `ipc:///absolute/path`, `local:///absolute/path` and `tcp://address:port`. A path has at
most 107 bytes, the kernel's limit for sockets. Without keys, tcp is allowed only on loopback. Wildcards are refused because
they admit strangers, and abstract sockets because they have no permissions.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from .. import system
from ..format.errors import AddressError

MAX_PATH_BYTES = system.MOST_SOCKET_PATH_BYTES
_BESIDE = "ipc://./"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Hold a checked address.

    `scheme` is inproc, ipc, local or tcp. `location` is a name, a path or a host. `port` 0 means any free port.
    """

    scheme: str
    location: str
    port: int = 0

    def __str__(self) -> str:
        if self.scheme != "tcp":
            return f"{self.scheme}://{self.location}"
        return f"tcp://{f'[{self.location}]' if ':' in self.location else self.location}:{self.port}"


def settled(text: str, folder: Path) -> str:
    """Return an endpoint of a graph file in `folder` as wires accept it: `ipc://./name` becomes a socket in that folder."""
    return f"ipc://{folder.resolve() / text.removeprefix(_BESIDE)}" if text.startswith(_BESIDE) else text


def parse(text: str, *, guarded: bool = False) -> Endpoint:
    """Parse an endpoint. If connections are `guarded` by keys, a tcp address may be beyond loopback.

    Raises:
        AddressError: the endpoint may not be used; the message says what to write instead.
    """
    scheme, separator, location = text.partition("://")
    if not separator or not location:
        raise AddressError(f"endpoint {text!r}: expected ipc:///path, tcp://address:port or inproc://name")
    if scheme == "inproc":
        return Endpoint(scheme, location)
    if scheme in ("ipc", "local"):
        return _path(text, scheme, location)
    if scheme == "tcp":
        return _tcp(text, location, guarded)
    raise AddressError(f"endpoint {text!r}: unknown scheme {scheme!r}; use ipc, tcp or inproc")


def _path(text: str, scheme: str, path: str) -> Endpoint:
    if path.startswith("@"):
        raise AddressError(f"endpoint {text!r}: an abstract socket has no permissions; use a path")
    if not os.path.isabs(path):
        raise AddressError(f"endpoint {text!r}: expected an absolute path")
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise AddressError(
            f"endpoint {text!r}: the path is {size} bytes long, at most {MAX_PATH_BYTES} are possible; "
            "use a shorter folder"
        )
    return Endpoint(scheme, path)


def _tcp(text: str, location: str, guarded: bool) -> Endpoint:
    host, separator, port = location.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator:
        host, port = location, "0"
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
