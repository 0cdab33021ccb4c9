"""Run a graph and its server in a thread, with clients that speak to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio

import ranvier
from ranvier.graph.serve.server import Options, serving

SMOLLM2 = Path(__file__).parents[2] / "examples" / "smollm2.yaml"


class Server:
    """Run a graph and its server in a thread of their own."""

    def __init__(self, runs: Path, options: Options, changes: Mapping[str, str], file: Path = SMOLLM2) -> None:
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._client: Any = None
        self._connections: list[http.client.HTTPConnection] = []
        self._thread = threading.Thread(target=self._main, args=(runs, options, changes, file), daemon=True)
        self._thread.start()
        assert self._ready.wait(90)
        if self._error is not None:
            raise self._error

    def _main(self, runs: Path, options: Options, changes: Mapping[str, str], file: Path) -> None:
        async def main() -> None:
            self._stop, self._token = trio.Event(), trio.lowlevel.current_trio_token()
            graph = ranvier.load(file, overrides=dict(changes), allow_code=True)
            async with (
                ranvier.launch(graph, runs=runs, cuttable=options.faults) as self.run,
                serving({file.stem: self.run}, options) as self.url,
            ):
                self._ready.set()
                await self._stop.wait()

        try:
            trio.run(main)
        except BaseException as error:
            self._error = error
        self._ready.set()

    def look(self, function: Callable[[ranvier.Run], Any]) -> Any:
        """Return what a function says of the run, called in the run's thread."""
        return trio.from_thread.run_sync(function, self.run, trio_token=self._token)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        if self._client is not None:
            self._client.close()
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    # -- clients ----------------------------------------------------------------------------------------------------

    def client(self, key: str = "none") -> Any:
        """Return a client of the `openai` package."""
        import openai

        if self._client is None:
            self._client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        return self._client

    def connection(self) -> http.client.HTTPConnection:
        """Return a connection. It is closed with the server, if a test does not close it before."""
        self._connections.append(http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60))
        return self._connections[-1]

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Mapping[str, str]]:
        """Return status, body and headers of the answer to a POST. `body` is bytes, or becomes JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        own = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
        return self.ask("POST", path, data, own)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        connection = self.connection()
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            data = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(data) if is_json else data.decode(), dict(answer.headers)
