"""Kill the server itself: with a journal, clients get the rest of their streams from the one that is started after it."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from ranvier.graph.serve import stream_log
from ranvier.graph.serve.stream_log import Complete, Grew, Opened, Origin, Piece, begun
from ranvier.graph.sessions.journal import Began

SMOLLM2 = Path(__file__).parents[3] / "examples" / "smollm2.yaml"
RANVIER = Path(sys.executable).with_name("ranvier")
SETTINGS = ["--set", "model.weights=stored", "--set", "model.products=repeatable", "--set", "journal=true"]
SEA = [{"role": "user", "content": "Tell me about the sea."}]
TEXT = {"model": "smollm2-in-four", "max_tokens": 60, "stream": True}
CHAT = {**TEXT, "messages": SEA}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
KEY, OTHER = "a-key-of-a-client", "another-key-of-a-client"


class Served:
    """Be a server in a process of its own, at a fixed port, that is killed and started again."""

    def __init__(self, runs: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._command = [RANVIER, "serve", SMOLLM2, "--port", str(self.port), "--runs", runs, *SETTINGS, *options]
        self._process: subprocess.Popen[bytes] | None = None
        self.begin()

    def begin(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None and self._process.stdout.readline()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def end(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.communicate()

    def ask(self, method: str, path: str, body: Any = None, key: str = KEY, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        own = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "Connection": "close", **headers}
        connection.request(method, f"/v1{path}", None if body is None else json.dumps(body), own)
        answer: http.client.HTTPResponse = connection.getresponse()
        return answer


def events(answer: http.client.HTTPResponse, most: int = 1 << 30) -> tuple[int, list[Any], bool]:
    """Read up to `most` events. Return the number of the last, the events themselves, and whether the stream is complete."""
    number, last, found = -1, -1, []
    with contextlib.suppress(http.client.HTTPException, OSError):
        for line in answer:
            word, _, rest = line.decode().strip().partition(": ")
            if word == "id":
                number = int(rest)
            elif word == "data" and rest == "[DONE]":
                return last, found, True
            elif word == "data":
                found.append(json.loads(rest))
                last = number
                if len(found) >= most:
                    break
    return last, found, bool(found) and found[-1].get("type") in ("response.completed", "response.incomplete")


def shape(value: Any) -> Any:
    """Return events without the times and ids, which a second request does not share."""
    if isinstance(value, list):
        return [shape(each) for each in value]
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items() if name not in ("id", "created")}
    return value


@pytest.fixture
def served(runs: Path, tmp_path: Path) -> Iterator[Served]:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n{OTHER}\n")
    made = Served(runs, "--api-key-file", str(keys))
    yield made
    made.end()


def test_every_kind_of_stream_goes_on_after_its_server_was_killed(served: Served) -> None:
    """Send the events that a killed server had not sent, with its ids and numbers, as if nothing had happened. Twice."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "greedy": ("/chat/completions", {**CHAT, "temperature": 0}),
        "drawn, two answers": ("/chat/completions", {**CHAT, "n": 2, "temperature": 1.0, "logprobs": True, "seed": 5}),
        "drawn, no seed": ("/chat/completions", {**CHAT, "temperature": 1.0}),
        "completion": ("/completions", {**TEXT, "prompt": "The sea", "echo": True, "logprobs": 2, "temperature": 0}),
        "response": ("/responses", {"model": CHAT["model"], "input": SEA, "max_output_tokens": 60, "stream": True}),
        "call": ("/chat/completions", {**CHAT, "tools": [WEATHER], "tool_choice": "required", "temperature": 0}),
    }  # fmt: skip
    read = {}
    for name, (path, body) in kinds.items():
        answer = served.ask("POST", path, body)
        assert answer.status == 200, answer.read()
        read[name] = (answer, answer.headers["x-request-id"], *events(answer, 6)[:2])
    served.kill()
    early = {name: (number, found) for name, (_, _, number, found) in read.items()}
    for name, (answer, _, number, found) in read.items():
        more = events(answer)  # what was on its way
        early[name] = (max(number, more[0]), found + more[1])
    served.begin()
    for name, (_, request_id, _, _) in read.items():
        number, found = early[name]
        assert served.ask("GET", f"/streams/{request_id}", key=OTHER).status == 404, "it is another key's"
        again = served.ask("GET", f"/streams/{request_id}", **{"Last-Event-ID": str(number)})
        assert again.status == 200, (name, again.read())
        new_number, more, complete = events(again, 8)
        assert complete or new_number == number + 8, name
        early[name] = (new_number, found + more)
    served.kill()
    served.begin()
    for name, (path, body) in kinds.items():
        request_id, (number, found) = read[name][1], early[name]
        _, more, _ = events(served.ask("GET", f"/streams/{request_id}?after={number}"))
        whole = events(served.ask("GET", f"/streams/{request_id}?after=-1"))
        assert whole[2] and whole[1] == found + more, f"{name}: the same events, from the first on"
        if body.get("temperature") == 0:
            undisturbed = events(served.ask("POST", path, body))
            assert shape(undisturbed[1]) == shape(whole[1]), name


def test_the_client_goes_on_though_the_server_is_killed(runs: Path) -> None:
    """Print the whole answer with `ranvier chat`, once, though its server is killed and started again meanwhile."""
    served = Served(runs)
    command = [RANVIER, "chat", "--url", f"http://127.0.0.1:{served.port}/v1", "-p", "Tell me about the sea.",
               "--temperature", "0", "-n", "300"]  # fmt: skip
    with contextlib.closing(contextlib.ExitStack()) as closing:
        closing.callback(served.end)
        talk = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        closing.callback(talk.kill)
        assert talk.stdout is not None
        said = talk.stdout.read(60)
        served.kill()
        assert talk.poll() is None
        served.begin()
        rest, err = talk.communicate(timeout=60)
        assert talk.returncode == 0, err
        again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert said + rest == again.stdout and "asking for the rest" in err


def test_a_server_that_ended_by_itself_leaves_nothing_to_take_up(runs: Path) -> None:
    """Forget streams after SIGTERM: their clients know how they ended. Leave no run that waits to be resumed."""
    served = Served(runs)
    answer = served.ask("POST", "/chat/completions", CHAT)
    request_id = answer.headers["x-request-id"]
    assert events(answer)[2]
    served.end()
    served.begin()
    assert served.ask("GET", f"/streams/{request_id}").status == 404
    served.kill()
    served.begin()
    served.end()
    listed = json.loads(
        subprocess.run([RANVIER, "runs", "--runs", runs, "--json"], capture_output=True, text=True, check=True).stdout
    )
    assert len(listed) == 3 and not any(run["resumable"] for run in listed)


# -- the log of streams alone ------------------------------------------------------------------------------------------

HASHES = Began("g", "m")


def opened(name: str, owner: str = "") -> Opened:
    return Opened(Origin(request_id=name, owner=owner, seed=1, created=2, prompt=[3, 4]), "chat", '{"n": 1}')


def test_a_damaged_or_foreign_log_is_left_alone(tmp_path: Path) -> None:
    """Take up the newest log of the same graph, model and port; never one that is active, moved, closed or damaged."""

    def left(name: str, port: int = 8000, hashes: Began = HASHES) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        log, _ = begun(folder, hashes, port, False)
        assert log.add(opened(name)) and log.add(Grew(name, [Piece(0, 7, "x", "", -0.5, {7: -0.5})]))
        log._file.close()  # as if its process had died
        time.sleep(0.01)
        return folder

    left("same")
    left("other-model", hashes=Began("g", "n"))
    left("other-port", port=8001)
    with (left("cut") / stream_log.FILE).open("ab") as file:
        file.write(b'{"kind":"grew","id":"cut","pie')
    (left("damaged") / stream_log.FILE).write_bytes(b"\xff\n")
    (tmp_path / "mine").mkdir()
    log, records = begun(tmp_path / "mine", HASHES, 8000, False)
    assert list(records) == ["cut"], "the last line, which is cut off, does not count"
    assert [(piece.token, piece.text, dict(piece.top_logprobs)) for piece in records["cut"].pieces] == [
        (7, "x", {7: -0.5})
    ]
    (tmp_path / "next").mkdir()
    assert list(begun(tmp_path / "next", HASHES, 8000, False)[1]) == ["same"], "mine is active, cut has moved to it"
    assert log.add(Complete("cut"))
    log.close()
    shutil.rmtree(tmp_path / "next")
    (tmp_path / "last").mkdir()
    assert begun(tmp_path / "last", HASHES, 8000, False)[1] == {}, "mine was closed"


def test_a_log_is_rewritten_with_the_streams_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound the file: when it is too large, only streams that may still be asked for stay in it."""
    (tmp_path / "a").mkdir()
    log, _ = begun(tmp_path / "a", HASHES, 8000, False)
    log.keeps = {"new"}.__contains__
    log._file.rewrite_at = 2000
    for name in ("old", "new"):
        assert log.add(opened(name))
    for at in range(100):
        assert log.add(Grew("old", [Piece(0, at, "word ")])) and log.add(Grew("new", [Piece(0, at, "word ")]))
    text = (tmp_path / "a" / stream_log.FILE).read_text()
    assert '"id":"new"' in text and text.count('"id":"old"') < 5
    log._file.close()
    (tmp_path / "b").mkdir()
    records = begun(tmp_path / "b", HASHES, 8000, False)[1]
    assert [piece.token for piece in records["new"].pieces] == list(range(100))


def test_a_full_disk_leaves_no_gap_in_a_stream(served: Served, runs: Path) -> None:
    """Serve on while nothing can be written; what is taken up later is a beginning of the stream."""
    import resource

    answer = served.ask("POST", "/chat/completions", {**CHAT, "temperature": 0})
    request_id = answer.headers["x-request-id"]
    first = events(answer, 6)
    process = served._process
    assert process is not None
    own, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, most))
    whole = events(answer)
    assert whole[2], "the stream goes on"
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (own, most))
    served.kill()
    served.begin()
    again = events(served.ask("GET", f"/streams/{request_id}?after={first[0]}"))
    assert again[2] and again[1] == whole[1]
    assert wait_until(lambda: served.ask("GET", "/health").status == 200)
