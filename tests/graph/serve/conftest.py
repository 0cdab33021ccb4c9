"""Provide servers over real runs of SmolLM2 in four processes, and clients that speak to them."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import trio

import ranvier
from ranvier.graph.serve.server import Options, serving

FAST = {"model.weights": "stored", "model.products": "repeatable"}
SMOLLM2 = Path(__file__).parents[3] / "examples" / "smollm2.yaml"


class Server:
    """Run a graph and its server in a thread of their own."""

    def __init__(self, runs: Path, options: Options, changes: Mapping[str, str], file: Path = SMOLLM2) -> None:
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._client: openai.OpenAI | None = None
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
                ranvier.launch(graph, runs=runs) as self.run,
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

    def client(self, key: str = "none") -> openai.OpenAI:
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


Start = Callable[..., Server]


@pytest.fixture
def start(runs: Path) -> Iterator[Start]:
    """Provide `start(options, **changes)`, which starts a server; `changes` are those of the graph, as for `--set`."""
    started: list[Server] = []

    def begin(options: Options | None = None, **changes: str) -> Server:
        own = {name.replace("__", "."): value for name, value in changes.items()}
        started.append(Server(runs, options or Options(port=0), {**FAST, **own}))
        return started[-1]

    yield begin
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Provide a server that the tests of a file share: of its `GRAPH`, or SmolLM2, with its `CHANGES`."""
    folder = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))
    module = request.module
    changes, file = getattr(module, "CHANGES", FAST), getattr(module, "GRAPH", SMOLLM2)
    made = Server(folder, Options(port=0), changes, file)
    yield made
    made.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def continued(oracle: Any, smollm2: Path) -> Callable[[str | list[dict[str, str]], int], tuple[list[int], str]]:
    """Provide `continued(prompt, count)`: what transformers generates greedily after a text or a chat, as ids and as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)

    def generate(prompt: str | list[dict[str, str]], count: int) -> tuple[list[int], str]:
        import torch

        if isinstance(prompt, str):
            ids = torch.tensor([tokenizer(prompt).input_ids])
        else:
            ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
        with torch.inference_mode():
            made = oracle.generate(ids, max_new_tokens=count, do_sample=False, repetition_penalty=1.0)
        new = made[0, ids.shape[1] :].tolist()
        return new, tokenizer.decode(new, skip_special_tokens=True)

    return generate
