"""Define `ranvier chat`: talk to a server. A stream whose connection is lost is taken up where it stopped."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from ranvier.transport.files import read_bounded
from ranvier.transport.format.errors import LinkBroken

from ..file.errors import RequestError
from .command_line import interrupts, say, show_text

PAUSE_S = 0.5
"""Time between two tries to reach the server again."""
BUSY = (429, 503)
GONE = (OSError, http.client.HTTPException)


def chat_command(
    url: Annotated[
        str, typer.Option(help="The server's address, as `ranvier serve` prints it.")
    ] = "http://127.0.0.1:8000/v1",
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Ask this and end. Without it, each line of input is a message."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name. Default: the server's first.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, help="At most this many tokens per answer.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token. Default: the model's own.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="Send the key in the first line of this file.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a server that is not there, before an answer is given up.")
    ] = 60.0,
) -> None:
    """Talk to a server. An answer whose connection is lost continues where it stopped."""
    key = read_bounded(api_key_file, 4096).decode().split("\n")[0].strip() if api_key_file is not None else ""
    server = Server(url, key, patience)
    asked: dict[str, Any] = {"model": model or server.first_model(), "stream": True}
    asked |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    asked |= {"temperature": temperature} if temperature is not None else {}
    messages = [{"role": "system", "content": system}] if system else []
    with interrupts():
        for line in [prompt] if prompt is not None else _lines():
            messages.append({"role": "user", "content": line})
            said = ""
            for piece in server.answer({**asked, "messages": messages}):
                said += piece
                show_text(piece)
            print(flush=True)
            messages.append({"role": "assistant", "content": said})


def _lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


class Server:
    """Ask a server of OpenAI's interface, and take up streams whose connection was lost."""

    def __init__(self, url: str, key: str, patience_s: float) -> None:
        self._at, self._patience_s = urlsplit(url), patience_s
        if self._at.scheme not in ("http", "https") or not self._at.netloc:
            raise RequestError(f"--url {url}: expected an address such as http://127.0.0.1:8000/v1")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def first_model(self) -> str:
        """Return the name of the server's first model.

        Raises:
            LinkBroken: the server is not there.
            RequestError: it refuses to tell.
        """
        try:
            answer = self._ask("GET", "/models")
            models = json.loads(_checked(answer).read())["data"]
        except GONE as error:
            raise LinkBroken(f"{self._at.geturl()}: {error}; start it with `ranvier serve`") from None
        return str(models[0]["id"])

    def answer(self, body: dict[str, Any]) -> Iterator[str]:
        """Yield the pieces of an answer.

        Raises:
            LinkBroken: the server is lost, and did not come back in time.
            RequestError: the server refuses the request, or has forgotten the stream.
        """
        data = json.dumps(body).encode()
        try:
            answer = _checked(self._ask("POST", "/chat/completions", data))
        except GONE as error:
            raise LinkBroken(f"{self._at.geturl()}: {error}; start it with `ranvier serve`") from None
        name, last = answer.headers.get("x-request-id", ""), -1
        until_s = 0.0
        while True:
            try:
                for number, chunk in _events(answer):
                    if chunk is None:
                        return
                    if "error" in chunk and chunk["error"]["code"] == "stopping":
                        break
                    if "error" in chunk:
                        raise RequestError(chunk["error"]["message"])
                    last, until_s = number, 0.0
                    yield "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                lost = "the connection ended"
            except GONE as error:
                lost = str(error)
            until_s = until_s or time.monotonic() + self._patience_s
            answer = self._again(name, last, until_s, lost)

    def _again(self, name: str, last: int, until_s: float, lost: str) -> http.client.HTTPResponse:
        """Ask for the rest of a stream until the server is there again."""
        say(f"{lost}; asking for the rest", error=True)
        while True:
            try:
                answer = self._ask("GET", f"/streams/{name}?after={last}")
                if answer.status not in BUSY:
                    return _checked(answer)
                why: object = f"it answers {answer.status}"
                answer.read()
            except GONE as error:
                why = error
            if time.monotonic() > until_s:
                raise LinkBroken(f"{self._at.geturl()}: {why}; it was not there for {self._patience_s:g} s")
            time.sleep(PAUSE_S)

    def _ask(self, method: str, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._at.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._at.netloc, timeout=30)
        headers = {**self._headers, **({"Content-Type": "application/json"} if body is not None else {})}
        connection.request(method, self._at.path.rstrip("/") + path, body, headers)
        return connection.getresponse()


def _checked(answer: http.client.HTTPResponse) -> http.client.HTTPResponse:
    """Return an answer that is not an error.

    Raises:
        RequestError: it is one.
    """
    if answer.status == 200:
        return answer
    data = answer.read()
    try:
        message = json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = data[:300].decode(errors="replace")
    raise RequestError(f"the server answers {answer.status}: {message}")


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield the events of a stream with their numbers; None at its end."""
    number = -1
    for line in answer:
        word, _, rest = line.decode(errors="replace").rstrip("\r\n").partition(": ")
        if word == "id":
            number = int(rest)
        elif word == "data":
            yield number, None if rest == "[DONE]" else json.loads(rest)
