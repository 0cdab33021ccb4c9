"""Check over which wires and addresses the actors of a graph can be reached, and with which keys."""

from __future__ import annotations

from pathlib import Path

from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.transport.format.errors import AddressError, KeyFileError
from ranvier.transport.system import LINUX
from ranvier.transport.wires import curve, endpoint

from ..file.errors import Problem
from ..file.load import Document
from ..file.schema import GraphFile
from .findings import Findings


class WireCheck(Findings):
    """Check the keys `transport`, `endpoint` and `keys` of a graph."""

    def __init__(self, document: Document, file: GraphFile, problems: list[Problem], folder: Path) -> None:
        super().__init__(document, file, problems)
        self.folder = folder

    def keys(self) -> None:
        """Check that the gateway and every actor have keys that nobody else can read."""
        given = self.file.keys
        if given is None:
            return
        inside = (self.folder / given).resolve().is_relative_to(self.folder.resolve())
        if ("keys",) not in self.document.trusted and not inside:
            self._wrong(f"keys {given!r} leaves the graph's folder; give it by --set keys=PATH if you mean it", "keys")
            return
        for name in (GATEWAY, *self.file.actors):
            try:
                curve.read(self.folder / given, name)
            except KeyFileError as error:
                self._wrong(str(error), "keys")
                return

    def endpoints(self) -> None:
        self._transport()
        taken: dict[str, str] = {}
        for name, actor in self.file.actors.items():
            if actor.endpoint is None:
                continue
            if self.file.transport == "local":
                self._wrong(
                    f"actor {name}: an endpoint belongs to transport ipc or tcp, and this graph has transport local; "
                    "remove the endpoint, or change the transport",
                    "actors", name, "endpoint", key=True,
                )  # fmt: skip
                continue
            try:
                where = endpoint.parse(
                    endpoint.settled(actor.endpoint, self.folder), guarded=self.file.keys is not None
                )
                self._in_folder(name, where)
            except AddressError as error:
                self._wrong(f"actor {name}: {error}; change the endpoint", "actors", name, "endpoint")
                continue
            if where.scheme in ("inproc", "local"):
                self._wrong(
                    f"actor {name}: endpoint {where}: expected ipc or tcp, got {where.scheme}; use ipc or tcp",
                    "actors", name, "endpoint",
                )  # fmt: skip
            elif not (where.scheme == "tcp" and where.port == 0):
                if str(where) in taken:
                    self._wrong(
                        f"actor {name}: endpoint {where} is already used by {taken[str(where)]}; give each actor another "
                        "endpoint",
                        "actors", name, "endpoint",
                    )  # fmt: skip
                taken[str(where)] = name

    def _transport(self) -> None:
        """Check the form of `transport`, and that `shared_from_bytes` is set only for transport local."""
        transport = self.file.transport
        if transport != "local" and "shared_from_bytes" in self.file.model_fields_set:
            self._wrong(
                f"shared_from_bytes belongs to transport local, and this graph has transport {transport}; remove it, or set "
                "transport: local",
                "shared_from_bytes", key=True,
            )  # fmt: skip
        if transport == "local" and not LINUX:
            self._wrong("transport local needs Linux's sockets and shared memory; use ipc", "transport")
        if transport in ("ipc", "local"):
            return
        try:
            wrong = (
                not transport.startswith("tcp://") or endpoint.parse(transport, guarded=self.file.keys is not None).port
            )
        except AddressError as error:
            self._wrong(f"{error}; for example tcp://127.0.0.1", "transport")
            return
        if wrong:
            self._wrong(
                f"transport: expected ipc, local or tcp://address without a port, got {transport!r}; use ipc, local, or for "
                "example tcp://127.0.0.1",
                "transport",
            )  # fmt: skip

    def _in_folder(self, name: str, where: endpoint.Endpoint) -> None:
        """Check that a socket lies in the graph's folder, at a path that is free. `--set` may put it elsewhere.

        Raises:
            AddressError: the socket lies elsewhere, or its path is taken.
        """
        if where.scheme != "ipc":
            return
        path = Path(where.location)
        if ("actors", name, "endpoint") not in self.document.trusted and not path.parent.resolve().is_relative_to(
            self.folder.resolve()
        ):
            raise AddressError(f"endpoint {str(where)!r} leaves the graph's folder; write {'ipc://./' + path.name!r}")
        if path.is_symlink() or (path.exists() and not path.is_socket()):
            raise AddressError(f"endpoint {str(where)!r}: there is a file that is not a socket")
