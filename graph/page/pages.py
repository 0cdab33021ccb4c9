"""Define the page's paths: its files, the feed, and what it asks about edges, actors and tokens."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ranvier.transport.files import read_bounded

from ..bridge.problems import DENIED, Problem, unknown
from ..sessions.printable import printable
from .faults import Fault, Faults
from .feed import Feed
from .sources import Served, Source
from .watching import Silent

FILES = Path(__file__).parent / "files"
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
OWN = (None, "same-origin", "none")
"""Browsers send these values of Sec-Fetch-Site for requests of the page itself and of its user. Other clients send none."""
LOG_BYTES = 16 << 10
"""The end of an actor's log that the page shows."""
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Pages:
    """Answer what the page asks. All methods belong to the server's thread.

    `faults` allows its buttons. `logs`: show what actors write to standard error.
    """

    def __init__(self, sources: Mapping[str, Source], *, faults: bool, logs: bool) -> None:
        self._feeds = {name: Feed(source) for name, source in sources.items()}
        self._faults = Faults() if faults else None
        self._logs = logs
        self._names = {file.name for file in FILES.iterdir() if file.suffix in TYPES}
        self._files: dict[str, tuple[bytes, str]] = {}

    def routes(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the paths of GET and of POST, each with its endpoint."""
        gets = {
            "/page/models": self.models, "/page/feed": self.feed, "/page/edge": self.edge, "/page/actor": self.actor,
            "/page/token": self.token, "/page/why": self.why,
        }  # fmt: skip
        files = {"/": self.file, "/page/files/{name}": self.file}
        return files | {path: _own(endpoint) for path, endpoint in gets.items()}, {"/page/faults": _own(self.fault)}

    async def file(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            if name not in self._names:
                raise unknown(f"no file {name!r:.60} belongs to the page")
            data = await asyncio.to_thread(read_bounded, FILES / name, 1 << 20)
            self._files[name] = data, f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        data, tag = self._files[name]
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers | {"content-type": TYPES[Path(name).suffix]})

    async def models(self, _request: Request) -> Response:
        return _json({
            "models": [
                {"name": name, "chats": isinstance(feed.source, Served) and feed.source.bridge.run.plan.graph.generates}
                for name, feed in self._feeds.items()
            ],
            "faults": self._faults is not None, "logs": self._logs,
        })  # fmt: skip

    async def feed(self, request: Request) -> Response:
        feed = self._feed(request)

        async def events() -> AsyncIterator[bytes]:
            async for each in feed.events():
                yield each

        return StreamingResponse(events(), media_type="text/event-stream", headers=STREAM_HEADERS)

    async def edge(self, request: Request) -> Response:
        return _json(await _asked(self._feed(request), "edge", edge=_number(request, "edge")))

    async def actor(self, request: Request) -> Response:
        """Return the last steps of an actor (`name.replica`), and the end of its log."""
        feed, actor = self._feed(request), request.query_params.get("actor", "")
        hosts = {host["label"]: host for host in (await feed.source.state())["hosts"]}
        if actor not in hosts:
            raise unknown(f"no actor {actor!r:.60} runs here")
        log = await asyncio.to_thread(_log_of, feed.source.run_dir, hosts[actor]["log"]) if self._logs else None
        try:
            steps = await feed.ask("steps", actor=actor)
        except Silent:  # the run has no trace; the rest of the page says so
            steps = []
        return _json({"steps": steps, "log": log})

    async def token(self, request: Request) -> Response:
        """Return the critical path of token number `token` of the answer to a request of this key."""
        feed, name = self._feed(request), request.query_params.get("request", "")
        found = feed.source.bridge.asked_by(name, request.state.key) if isinstance(feed.source, Served) else None
        if found is None:
            raise unknown(f"no request {name!r:.60} is known here")
        position = found.first + _number(request, "token")
        return _json(await _asked(feed, "token", sessions=tuple(found.sessions), position=position))

    async def why(self, request: Request) -> Response:
        return _json({"text": await self._feed(request).source.why()})

    async def fault(self, request: Request) -> Response:
        """Carry out a fault. Only the page itself, or a client that is no browser, may ask."""
        if self._faults is None:
            raise Problem(403, "faults are not allowed; start the server with --allow-faults", DENIED)
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Problem(
                403, f"Origin {origin!r:.100}: only the server's own page may ask", DENIED, code="wrong_origin"
            )
        try:
            asked = msgspec.json.decode(await request.body(), type=Fault)
        except ValueError as error:
            raise Problem(400, str(error), code="invalid_value") from None
        source = self._named(asked.model).source
        if not isinstance(source, Served):
            raise Problem(400, "faults are only for graphs that this process runs", code="invalid_value")
        return _json({"done": await self._faults.carry_out(asked, source)})

    def close(self) -> None:
        """End all feeds."""
        for feed in self._feeds.values():
            feed.close()

    def _feed(self, request: Request) -> Feed:
        return self._named(request.query_params.get("model"))

    def _named(self, name: str | None) -> Feed:
        feed = next(iter(self._feeds.values())) if name is None else self._feeds.get(name)
        if feed is None:
            raise unknown(f"The model {name!r:.200} does not exist; there are {', '.join(self._feeds)}")
        return feed


def _own(endpoint: Any) -> Any:
    """Return an endpoint that a page of another origin cannot even set in motion, as with the address of an image."""

    async def answer(request: Request) -> Any:
        site = request.headers.get("sec-fetch-site")
        if site not in OWN:
            raise Problem(
                403, f"Sec-Fetch-Site {site!r:.40}: only the server's own page may ask", DENIED, code="wrong_origin"
            )
        return await endpoint(request)

    return answer


async def _asked(feed: Feed, what: str, **arguments: Any) -> Any:
    try:
        return await feed.ask(what, **arguments)
    except Silent as error:
        raise unknown(str(error), code="not_written_yet" if error.later else "not_found") from None


def _number(request: Request, name: str) -> int:
    given = request.query_params.get(name, "")
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise Problem(400, f"{name}: expected a number, got {given!r:.60}", param=name, code="invalid_value")
    return int(given)


def _log_of(run_dir: Path, name: str) -> str:
    """Return the end of what a process has written to standard error."""
    try:
        with (run_dir / "logs" / f"{name}.err").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_BYTES))
            return "\n".join(map(printable, file.read().decode(errors="replace").splitlines()))
    except OSError:
        return ""


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers={"cache-control": "no-store"})
