"""Keys for tcp: who has which, and the handler that ties a key to the name of its actor.

Every actor, the gateway too, has a CURVE key pair (Curve25519; https://rfc.zeromq.org/spec/25/). Both ends of a connection
prove that they hold their secret ones, everything between is encrypted, and a connection's key decides as which actor it may
speak.
A folder holds `NAME.pub` of all and `NAME.key`, mode 0600, of those that run here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth.thread

from ..files import read_bounded
from ..format.errors import KeyFileError

DOMAIN = "ranvier"
"""Of ZeroMQ's authentication (ZAP): without one, a connection is not asked about."""
MOST_KEY_BYTES = 256
KEY_BYTES = 40
"""Of a key as text (Z85)."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that one process needs: its own pair, and everyone's public key by the actor's name."""

    actor: str
    public: bytes
    secret: bytes
    publics: Mapping[str, bytes]

    def of(self, peer: str) -> bytes:
        """The public key of an identity's actor.

        Raises:
            KeyFileError: it has none.
        """
        actor = peer.partition(".")[0]
        if actor not in self.publics:
            raise KeyFileError(f"{self.actor}: no key of {actor}; make one with `ranvier keys new`")
        return self.publics[actor]


def write(folder: Path, names: Iterable[str]) -> list[Path]:
    """Make a key pair for each name that has none: the files written.

    Raises:
        KeyFileError: the folder cannot be written to.
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
        raise KeyFileError(f"{error.filename}: is there, and the other of the pair is not; remove it") from None
    except OSError as error:
        raise KeyFileError(f"{error.filename or folder}: {error.strerror}") from None
    return written


def read(folder: Path, actor: str) -> Keys:
    """The keys of one actor's process.

    Raises:
        KeyFileError: a file is missing or no key, or others may read the secret one.
    """
    secret = folder / f"{actor}.key"
    try:
        mode = secret.stat().st_mode & 0o777
        publics = {path.stem: _key(path) for path in sorted(folder.glob("*.pub"))}
    except OSError as error:
        raise KeyFileError(f"{error.filename}: {error.strerror}; make keys with `ranvier keys new`") from None
    if mode & 0o077:
        raise KeyFileError(f"{secret}: expected mode 0600, got {mode:04o}: others may read it; chmod 600")
    if actor not in publics:
        raise KeyFileError(f"{folder / actor}.pub: no such file; make keys with `ranvier keys new`")
    own = _key(secret)
    if zmq.curve_public(own) != publics[actor]:
        raise KeyFileError(f"{secret}: expected the secret key of {actor}.pub, got that of another")
    return Keys(actor, publics[actor], own, publics)


def _key(path: Path) -> bytes:
    text = read_bounded(path, MOST_KEY_BYTES).strip()
    if len(text) != KEY_BYTES:
        raise KeyFileError(f"{path}: expected a key of {KEY_BYTES} letters, got {len(text)}")
    return text


class Doorkeeper(zmq.auth.thread.ThreadAuthenticator):
    """Answers ZeroMQ's question who may connect, from a thread of its own. Start it before anything is bound: where nobody
    answers, nobody gets in."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys) -> None:
        super().__init__(context)
        self._actors = {public: actor for actor, public in keys.publics.items()}
        self.configure_curve_callback(DOMAIN, self)

    def callback(self, _domain: str, public: bytes) -> bool:
        """Whether the key is one of the graph's."""
        return public in self._actors

    def curve_user_id(self, client_public_key: bytes) -> str:
        """Whose it is; messages of the connection carry that."""
        from zmq.utils import z85

        return self._actors[z85.encode(client_public_key)]


def guard(socket: zmq.Socket[bytes], keys: Keys) -> None:
    """Make a socket that is to be bound take only connections with keys."""
    socket.curve_server = 1
    socket.curve_secretkey = keys.secret
    socket.zap_domain = DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def present(socket: zmq.Socket[bytes], keys: Keys, peer: str) -> None:
    """Give a socket that is to be connected this process's keys, and the one that `peer` must have."""
    socket.curve_serverkey = keys.of(peer)
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
