"""Create and read the keys for tcp, and tie the key of each connection to the name of its actor.

Every actor, and also the gateway, has a CURVE key pair (Curve25519; https://rfc.zeromq.org/spec/25/). Both ends of a
connection prove that they hold their secret keys, and all traffic is encrypted. A connection can act only as the actor that
its key belongs to. A folder holds `NAME.pub` of every actor, and `NAME.key`, mode 0600, of each actor that runs here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth.thread
from zmq.utils import z85

from ..files import read_bounded
from ..format.errors import KeyFileError
from ..format.host_id import host_id

DOMAIN = "ranvier"
"""Domain of ZeroMQ's authentication (ZAP). Without a domain, ZeroMQ does not ask the handler about a connection."""
MOST_KEY_BYTES = 256
KEY_BYTES = 40
"""Length of a key as text (Z85), in bytes."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Hold the keys that one process needs: its own pair, and the public key of each actor by name."""

    actor: str
    public: bytes
    secret: bytes
    publics: Mapping[str, bytes]

    def of(self, peer: str) -> bytes:
        """Return the public key of the actor that an identity names.

        Raises:
            KeyFileError: this process has no key of that actor.
        """
        actor = host_id(peer).actor
        if actor not in self.publics:
            raise KeyFileError(f"{self.actor}: no key of {actor}; make one with `ranvier keys new`")
        return self.publics[actor]


def write(folder: Path, names: Iterable[str]) -> list[Path]:
    """Create a key pair for each name that has none, and return the written files.

    Raises:
        KeyFileError: the folder cannot be written to, or it holds only one file of a pair.
    """
    written = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            files = folder / f"{name}.key", folder / f"{name}.pub"
            if all(path.exists() for path in files):
                continue
            public, secret = zmq.curve_keypair()
            for path, key, mode in zip(files, (secret, public), (0o600, 0o644), strict=True):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(key + b"\n")
                written.append(path)
    except FileExistsError as error:
        raise KeyFileError(f"{error.filename}: exists without the other file of its key pair; remove it") from None
    except OSError as error:
        raise KeyFileError(f"{error.filename or folder}: {error.strerror}") from None
    return written


def read(folder: Path, actor: str) -> Keys:
    """Read the keys for the process of one actor.

    Raises:
        KeyFileError: a file is missing or holds no key, the pair does not match, or other users can read the secret key.
    """
    secret = folder / f"{actor}.key"
    try:
        mode = secret.stat().st_mode & 0o777
        publics = {path.stem: _key(path) for path in sorted(folder.glob("*.pub"))}
        own = _key(secret)
    except OSError as error:
        raise KeyFileError(f"{error.filename}: {error.strerror}; make keys with `ranvier keys new`") from None
    if mode & 0o077:
        raise KeyFileError(f"{secret}: expected mode 0600, got {mode:04o}: other users can read it; run chmod 600")
    if actor not in publics:
        raise KeyFileError(f"{folder / actor}.pub: no such file; make keys with `ranvier keys new`")
    if zmq.curve_public(own) != publics[actor]:
        raise KeyFileError(f"{secret}: expected the secret key of {actor}.pub, got the secret key of another pair")
    return Keys(actor, publics[actor], own, publics)


def _key(path: Path) -> bytes:
    text = read_bounded(path, MOST_KEY_BYTES).strip()
    if len(text) != KEY_BYTES:
        raise KeyFileError(f"{path}: expected a key of {KEY_BYTES} characters, got {len(text)}")
    if not set(text) <= set(z85.Z85CHARS):
        raise KeyFileError(f"{path}: expected a key in Z85, got other characters; make keys with `ranvier keys new`")
    return text


class Doorkeeper(zmq.auth.thread.ThreadAuthenticator):
    """Decide for ZeroMQ, in a separate thread, which connections are accepted.

    Start this thread before any socket is bound: without its answer ZeroMQ refuses every connection.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys) -> None:
        super().__init__(context)
        self._actors = {public: actor for actor, public in keys.publics.items()}
        self.configure_curve_callback(DOMAIN, self)

    def callback(self, _domain: str, public: bytes) -> bool:
        """Return whether the key belongs to an actor of the graph."""
        return public in self._actors

    def curve_user_id(self, client_public_key: bytes) -> str:
        """Return the actor that the key belongs to. Messages of the connection carry this name."""
        return self._actors[z85.encode(client_public_key)]


def guard(socket: zmq.Socket[bytes], keys: Keys) -> None:
    """Make a socket accept only connections with keys. Call it before the socket is bound."""
    socket.curve_server = 1
    socket.curve_secretkey = keys.secret
    socket.zap_domain = DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def present(socket: zmq.Socket[bytes], keys: Keys, peer: str) -> None:
    """Give a socket this process's keys and the key that `peer` must have. Call it before the socket connects."""
    socket.curve_serverkey = keys.of(peer)
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
