"""Guard the server's door, before any endpoint: names of hosts, origins, keys, sizes and times of bodies.

A page of another origin that a user visits can send requests to a server on loopback, and a name that an attacker controls can
be bound to loopback's address. So the names in `Host` and `Origin` are checked, and a POST must be JSON, which no foreign form
can send.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ranvier.transport.files import read_bounded

from ..bridge.problems import DENIED, Problem
from ..file.errors import RequestError

MOST_KEYS_BYTES = 1 << 20
BODY_S = 30.0
"""Time in which a request's body must be there."""
OPEN = ("/health", "/")
"""Paths that need no key: load balancers and browsers ask them. The page asks the user for the key."""
OPEN_FILES = "/page/files/"


@dataclass(frozen=True, slots=True)
class Door:
    """Describe who may come in."""

    names: frozenset[str]
    """Names in `Host` that are this server's; empty: any (for another address than loopback)."""
    origins: frozenset[str] = frozenset()
    """Origins of pages that may ask, beside those of loopback."""
    keys: tuple[bytes, ...] = ()
    """Hashes of the keys; empty: no key is needed."""
    most_bytes: int = 32 << 20


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Return the hashes of the keys in a file: a key a line; empty lines and those that begin with # do not count.

    Raises:
        RequestError: there is no such file, or no key in it.
    """
    try:
        text = read_bounded(path, MOST_KEYS_BYTES).decode()
    except (OSError, ValueError) as error:
        raise RequestError(f"--api-key-file {path}: {error}") from None
    keys = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise RequestError(f"--api-key-file {path}: expected a key a line, got none")
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def is_loopback(name: str) -> bool:
    """Return whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower().rstrip(".") == "localhost" or name.lower().rstrip(".").endswith(".localhost")


class Guard:
    """Let requests in that may come in, with an id and the name of their key. `posts` are the paths that take bodies."""

    def __init__(self, app: ASGIApp, door: Door, posts: frozenset[str]) -> None:
        self._app, self._door, self._posts = app, door, posts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        allowed = self._allows(origin)
        extra = [(b"x-content-type-options", b"nosniff")]
        if origin is not None and allowed:
            extra += [
                (b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin"),
                (b"access-control-expose-headers", b"x-request-id, retry-after"),
            ]  # fmt: skip

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                name = scope.get("state", {}).get("request_id", request_id)  # of the rest of a stream, the stream's own
                message = {
                    **message, "headers": [*message.get("headers", ()), (b"x-request-id", name.encode()), *extra]
                }  # fmt: skip
            await send(message)

        try:
            self._check_names(headers, origin, allowed)
            if scope["method"] == "OPTIONS" and origin is not None:
                await _preflight(answer)
                return
            scope["state"] = {**scope.get("state", {}), "request_id": request_id, "key": self._key(scope, headers)}
            body = await self._body(scope, headers, receive)
        except Problem as problem:
            await _refuse(problem, answer)
            return
        await self._app(scope, receive if body is None else _replayed(body, receive), answer)

    def _allows(self, origin: str | None) -> bool:
        if origin is None:
            return True
        parts = urlsplit(origin)
        return origin in self._door.origins or (
            parts.scheme in ("http", "https") and parts.hostname is not None and is_loopback(parts.hostname)
        )

    def _check_names(self, headers: dict[str, str], origin: str | None, allowed: bool) -> None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self._door.names and not is_loopback(name) and name not in self._door.names:
            raise Problem(
                403, f"Host {host!r:.100}: expected a name of this server, such as localhost; name it with --allow-host",
                code="wrong_host",
            )  # fmt: skip
        if not allowed:
            raise Problem(
                403,
                f"Origin {origin!r:.100}: pages of this origin may not ask; allow it with --allow-origin",
                code="wrong_origin",
            )

    def _key(self, scope: Scope, headers: dict[str, str]) -> str:
        """Return a name for the key of a request: none of the key itself is in it.

        Raises:
            Problem: it has no key, or one that is not known.
        """
        if not self._door.keys or scope["path"] in OPEN or scope["path"].startswith(OPEN_FILES):
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        # all are compared, each in constant time
        known = [hmac.compare_digest(digest, key) for key in self._door.keys]
        if scheme.lower() != "bearer" or not any(known):
            raise Problem(
                401, "expected one of the server's keys, as Authorization: Bearer KEY", DENIED, code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return digest.hex()[:16]

    async def _body(self, scope: Scope, headers: dict[str, str], receive: Receive) -> bytes | None:
        """Return the body of a POST, or None for other methods and for paths that take none.

        Raises:
            Problem: it is not JSON, is too large, or does not come in time.
        """
        if scope["method"] != "POST" or scope["path"] not in self._posts:
            return None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(
                415, f"Content-Type: expected application/json, got {kind!r:.60}", code="unsupported_media_type"
            )
        most, parts, size = self._door.most_bytes, list[bytes](), 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(400, "the client left before its request was there")
                    size += len(message.get("body", b""))
                    if size > most or int(headers.get("content-length", 0)) > most:
                        raise Problem(413, f"expected at most {most} bytes of body", code="request_too_large")
                    parts.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Problem(408, f"the body was not there after {BODY_S:g} s", code="request_timeout") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, and then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"access-control-allow-headers", b"authorization, content-type, last-event-id, traceparent"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(problem: Problem, send: Send) -> None:
    body = problem.to_bytes()
    headers = [(name.encode(), value.encode("latin-1")) for name, value in problem.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if problem.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def names_of(host: str, also: Sequence[str]) -> frozenset[str]:
    """Return the names that `Host` may have at this address. On loopback only its own; elsewhere any, unless some are named."""
    return frozenset({host, *also}) if is_loopback(host) or also else frozenset()
