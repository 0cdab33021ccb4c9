"""Keep out who may not come in: foreign pages, rebound names, wrong keys, endless bodies. Cases 81 to 83."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio

import ranvier
from ranvier.graph.serve.guard import read_keys
from ranvier.graph.serve.server import Options, serving

ASKED = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 3}


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 200, None),
        ({"Host": "evil.example"}, 403, "wrong_host"),
        ({"Host": "localhost.evil.example:8000"}, 403, "wrong_host"),
        ({"Host": "localhost:1234"}, 200, None),
        ({"Host": "[::1]:80"}, 200, None),
        ({"Origin": "https://evil.example"}, 403, "wrong_origin"),
        ({"Origin": "null"}, 403, "wrong_origin"),
        ({"Origin": "http://localhost:3000"}, 200, None),
        ({"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/json; charset=utf-8"}, 200, None),
    ],
)
def test_who_may_ask_case_82(server: Any, headers: dict[str, str], status: int, code: str | None) -> None:
    """Answer only requests to a name of this server, from its own pages, as JSON."""
    own = {"Content-Type": "application/json", **headers}
    found, answer, _ = server.ask("POST", "/v1/chat/completions", json.dumps(ASKED).encode(), own)
    assert found == status
    if code is not None:
        assert answer["error"]["code"] == code


@pytest.mark.parametrize(("path", "status"), [("/v1/models", 405), ("/v1/nothing", 404)])
def test_a_post_to_a_path_that_takes_none(server: Any, path: str, status: int) -> None:
    """Say that a path takes no POST, or is not there, whatever the body is."""
    assert server.ask("POST", path, b"x", {"Content-Type": "text/plain"})[0] == status


def test_pages_of_loopback_may_read(server: Any) -> None:
    """Allow pages of loopback, and no others, to read answers; answer their preflights."""
    local = {"Origin": "http://127.0.0.1:5173"}
    assert server.ask("GET", "/v1/models", headers=local)[2]["access-control-allow-origin"] == local["Origin"]
    status, _, headers = server.ask(
        "OPTIONS", "/v1/chat/completions", headers={**local, "Access-Control-Request-Method": "POST"}
    )
    assert status == 204 and "POST" in headers["access-control-allow-methods"]
    status, _, headers = server.ask("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://evil.example"})
    assert status == 403 and "access-control-allow-origin" not in headers


def test_keys_case_83(start: Any, tmp_path: Path) -> None:
    """Answer only those who have a key, and give nobody another key's stream."""
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key\n\n second-key \n")
    server = start(Options(port=0, keys=read_keys(file)))
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic first-key"},
        {"Authorization": "Bearer "},
    ):
        status, answer, _ = server.post("/v1/chat/completions", ASKED, **headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert server.ask("GET", "/v1/models", headers=headers)[0] == 401
    assert server.ask("GET", "/health")[0] == 200
    status, _, headers = server.post(
        "/v1/chat/completions", {**ASKED, "stream": True}, Authorization="Bearer first-key"
    )
    assert status == 200
    path = f"/v1/streams/{headers['x-request-id']}"
    status, answer, _ = server.ask("GET", path, headers={"Authorization": "Bearer second-key"})
    unknown = server.ask("GET", "/v1/streams/none", headers={"Authorization": "Bearer second-key"})
    assert status == 404 and answer["error"]["code"] == unknown[1]["error"]["code"], "nothing is told of it"
    assert server.ask("GET", path, headers={"Authorization": "Bearer first-key"})[0] == 200


def test_bodies_are_bounded_case_81(start: Any) -> None:
    """Refuse a body that is too large, before it is read, and one that grows beyond the limit."""
    server = start(Options(port=0, most_bytes=10_000))
    status, answer, _ = server.post("/v1/chat/completions", {**ASKED, "user": "x" * 20_000})
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    host, port = urlsplit(server.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as endless:
        endless.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(10):
            endless.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert endless.recv(4096).startswith(b"HTTP/1.1 413")
    assert server.post("/v1/chat/completions", ASKED)[0] == 200


def test_half_open_and_malformed_requests_case_81(server: Any) -> None:
    """Go on beside connections that send nothing, half a request, or something else."""
    host, port = urlsplit(server.url).netloc.split(":")
    openers = [b"", b"POST /v1/chat/completions HT", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\x00" * 100,
               b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"]  # fmt: skip
    held = []
    for index in range(60):
        made = socket.create_connection((host, int(port)))
        made.sendall(openers[index % len(openers)])
        held.append(made)
    assert server.post("/v1/chat/completions", ASKED)[0] == 200
    for made in held:
        made.close()
    assert server.post("/v1/chat/completions", ASKED)[0] == 200


def test_connections_without_a_request_are_closed_case_81(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close a connection whose request does not come, from its start and after an answer, and keep one that works."""
    monkeypatch.setattr("ranvier.graph.serve.connections.HEADERS_S", 0.2)
    host, port = urlsplit(server.url).netloc.split(":")
    for opener in (
        b"",
        b"GET /health HTTP/1.1\r\nHost: loc",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
    ):
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(opener)
            data = b"".join(iter(lambda: slow.recv(4096), b""))
            assert data.startswith(b"HTTP/1.1 200") == opener.endswith(b"GET /hea")


def test_headers_are_bounded_case_81(server: Any) -> None:
    """Close a connection whose headers do not end."""
    host, port = urlsplit(server.url).netloc.split(":")
    lines = b"".join(b"X-%d: %b\r\n" % (index, b"y" * 1000) for index in range(10_000))
    with socket.create_connection((host, int(port)), timeout=20) as endless, pytest.raises(ConnectionError):
        endless.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + lines)
    assert server.ask("GET", "/health")[0] == 200


def test_an_address_that_others_reach_needs_keys_and_a_taken_port_is_named(runs: Path) -> None:
    """Refuse, before anything is served, another address than loopback without keys, and a port that is taken."""

    async def begin(options: Options) -> None:
        async with serving({}, options):
            pass

    with pytest.raises(ranvier.RequestError, match="--api-key-file"):
        trio.run(begin, Options(host="0.0.0.0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ranvier.RequestError, match=rf"{port}: Address already in use; give another --port"):
            trio.run(begin, Options(port=port))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_bad_requests_case_81(start: Any) -> None:
    """Stream on, with flat memory and descriptors, through 100,000 malformed, oversized, slow and half-open requests."""
    server = start(Options(port=0, most_bytes=10_000))
    host, port = urlsplit(server.url).netloc.split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    requests = [
        b"", b"\x00\xff" * 50, b"GET / HTTP/1.1\r\n", head, head + b"Content-Length: 999999999\r\n\r\n{", head + b"Content-Length: x\r\n\r\n",
        head + b"Content-Length: 2\r\n\r\n{]", head + b"Content-Length: 60\r\n\r\n" + b"[" * 60, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        head + b"X: " + b"y" * 70_000 + b"\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ]  # fmt: skip
    asked = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Count."}],
        "temperature": 0,
        "max_tokens": 24,
    }
    expected = server.post("/v1/chat/completions", asked)[1]["choices"][0]["message"]["content"]

    def attack(count: int, seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(count):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=20) as made:
                made.sendall(chosen.choice(requests))
                if chosen.random() < 0.5:
                    made.settimeout(0.05)
                    made.recv(100)

    def held() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(list(Path("/proc/self/fd").iterdir())), pages * 4096

    attack(2000, 0)  # what is made once is made
    before = held()
    threads = [threading.Thread(target=attack, args=(25_000, seed)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert server.post("/v1/chat/completions", asked)[1]["choices"][0]["message"]["content"] == expected
    descriptors, memory = held()
    assert descriptors <= before[0] + 20
    assert memory <= before[1] + (64 << 20)
