"""Send answers as they grow: over lost actors, lost connections and clients that leave."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest
from waiting import wait_until

from ranvier.graph.serve.server import Options

ASKED = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about the sea."}], "temperature": 0}


def begun(server: Any, body: dict[str, Any]) -> http.client.HTTPResponse:
    """Return the answer to a request for a stream. Only its status and headers are read."""
    connection = server.connection()
    headers = {
        "Content-Type": "application/json",
        "Connection": "close",
    }  # then the answer owns the socket, and closes it
    connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), headers)
    answer: http.client.HTTPResponse = connection.getresponse()
    return answer


def rest(server: Any, path: str, **headers: str) -> http.client.HTTPResponse:
    """Return the answer to a request for the rest of a stream."""
    connection = server.connection()
    connection.request("GET", path, headers={"Connection": "close", **headers})
    answer: http.client.HTTPResponse = connection.getresponse()
    return answer


def events(answer: http.client.HTTPResponse, most: int = 1 << 30) -> tuple[int, str, bool]:
    """Read up to `most` events. Return the number of the last one, the text of all, and whether the stream is complete."""
    last, text = -1, ""
    for line in answer:
        word, _, rest = line.decode().strip().partition(": ")
        if word == "id":
            last = int(rest)
        elif word == "data" and rest == "[DONE]":
            return last, text, True
        elif word == "data":
            chunk = json.loads(rest)
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if last + 1 >= most:
                break
    return last, text, False


def sessions(server: Any) -> int:
    return int(server.look(lambda run: run.snapshot()["sessions"]))


def test_a_client_that_leaves_frees_its_caches(server: Any) -> None:
    """End the session of a client that leaves, streaming, in prefill and without a stream."""
    long = {**ASKED, "messages": [{"role": "user", "content": "word " * 6000}]}
    for body in (ASKED, long):
        answer = begun(server, {**body, "max_tokens": 1500})
        assert answer.status == 200
        if body is ASKED:
            events(answer, 3)
        assert wait_until(lambda: sessions(server) == 1)
        answer.close()
        assert wait_until(lambda: sessions(server) == 0)
    connection = server.connection()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({**ASKED, "max_tokens": 1500}), {"Content-Type": "application/json"}
    )
    assert wait_until(lambda: sessions(server) == 1)
    connection.close()
    assert wait_until(lambda: sessions(server) == 0)


def test_a_client_that_comes_back_gets_the_rest(server: Any) -> None:
    """Give a client that lost its connection the events after the last one that it has, once and in order."""
    body = {**ASKED, "max_tokens": 48}
    whole = events(begun(server, body))
    answer = begun(server, body)
    name = answer.headers["x-request-id"]
    last, text, _ = events(answer, 10)
    answer.close()
    assert wait_until(lambda: sessions(server) == 0)
    for _ in range(2):  # it comes back, is lost again, and comes back
        again = rest(server, f"/v1/streams/{name}", **{"Last-Event-ID": str(last)})
        new_last, more, complete = events(again, last + 10)
        again.close()
        last, text = new_last, text + more
    assert not complete
    _, more, complete = events(rest(server, f"/v1/streams/{name}?after={last}"))
    assert complete and text + more == whole[1]
    assert events(rest(server, f"/v1/streams/{name}?after=-7"))[1:] == (whole[1], True), "from the beginning"
    status, answer, _ = server.ask("GET", "/v1/streams/0123456789abcdef")
    assert status == 404 and answer["error"]["type"] == "not_found_error"


def test_an_actor_is_killed_and_the_text_is_the_same(start: Any) -> None:
    """Give the same text although two actors are killed while it is streamed, and be healthy again."""
    server = start()
    body = {**ASKED, "max_tokens": 64}
    whole = events(begun(server, body))[1]
    answer = begun(server, body)
    _, text, _ = events(answer, 8)
    for name in ("lower", "head"):
        pid = next(pid for label, pid in server.look(lambda run: dict(run.pids)).items() if label.startswith(name))
        os.kill(pid, signal.SIGKILL)
    _, more, complete = events(answer)
    assert complete and text + more == whole
    assert len(server.look(lambda run: list(run.recoveries))) == 2
    assert server.ask("GET", "/health")[0] == 200


def test_a_silent_stream_says_that_it_lives(start: Any) -> None:
    """Send a comment within a second while nothing else comes, as while a lost actor is being replaced."""
    server = start()
    answer = begun(server, {**ASKED, "max_tokens": 400})
    events(answer, 5)
    pids = server.look(lambda run: dict(run.pids))
    stopped = next(pid for label, pid in pids.items() if label.startswith("upper"))
    os.kill(stopped, signal.SIGSTOP)
    try:
        heard = next(line for line in answer if line.startswith(b":"))
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert heard == b": working\n"
    answer.close()


@pytest.mark.slow
def test_requests_wait_for_their_turn_and_too_many_are_refused(start: Any) -> None:
    """Let requests wait while the caches are full, and refuse those beyond the queue with a time to come back."""
    server = start(Options(port=0, queue=1), actors__lower__cache_tokens="600", actors__upper__cache_tokens="600")
    first = begun(server, {**ASKED, "max_tokens": 500})
    events(first, 2)
    waiting = begun(server, {**ASKED, "max_tokens": 500})
    assert waiting.status == 200, "it is accepted, and waits"
    status, answer, headers = server.post("/v1/chat/completions", {**ASKED, "max_tokens": 500})
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert answer["error"]["code"] == "rate_limit_exceeded"
    first.close()
    assert events(waiting)[2], "its turn has come"


def test_a_slow_reader_keeps_nobody_waiting(server: Any) -> None:
    """Serve others while a client reads nothing of its stream."""
    host, port = urlsplit(server.url).netloc.split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        data = json.dumps({**ASKED, "max_tokens": 1000, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(data), data)
        )
        for _ in range(3):
            assert events(begun(server, {**ASKED, "max_tokens": 8}))[2]
    assert wait_until(lambda: sessions(server) == 0)


def test_an_error_ends_a_response_in_its_own_form(start: Any) -> None:
    """Tell a client of /v1/responses of an error with the events that OpenAI's types have for it."""
    server = start(Options(port=0, deadline_s=1.0))
    made = server.client().responses.create(
        model="smollm2",
        input="Tell me about the sea.",
        max_output_tokens=4000,
        stream=True,
        temperature=0,
    )
    events = list(made)
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    error, failed = events[-2:]
    assert error.code == "deadline_exceeded" and error.sequence_number == len(events) - 2
    assert failed.response.status == "failed" and failed.response.error.code == "deadline_exceeded"
