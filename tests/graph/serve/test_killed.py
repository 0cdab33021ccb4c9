"""Kill the server itself: with a journal, clients get the rest of their streams from the one that is started after it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from linux import FAST
from waiting import wait_until

from ranvier.graph.bridge import stream_log
from ranvier.graph.bridge.stream_log import Address, Complete, Grew, Opened, Origin, Piece, Started, begun, piece_of
from ranvier.graph.sessions.generation import Token
from ranvier.graph.sessions.journal import Began

SMOLLM2 = Path(__file__).parents[3] / "examples" / "smollm2.yaml"
RANVIER = Path(sys.executable).with_name("ranvier")
SETTINGS = [word for key, value in {**FAST, "journal": "true"}.items() for word in ("--set", f"{key}={value}")]
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
    own = (
        ("id", "created") if FAST else ("id", "created", "logprobs")
    )  # torch's last bits depend on what runs beside it
    if isinstance(value, list):
        return [shape(each) for each in value]
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items() if name not in own}
    return value


@pytest.fixture
def served(runs: Path, tmp_path: Path) -> Iterator[Served]:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n{OTHER}\n")
    made = Served(runs, "--api-key-file", str(keys))
    yield made
    made.end()


@pytest.mark.slow
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
        early[name] = (max(number, new_number), found + more)  # none came if all was on its way before
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


@pytest.mark.slow
@pytest.mark.parametrize("end", [Served.kill, Served.end], ids=["killed", "stopped"])
def test_the_client_goes_on_though_the_server_is_gone(end: Callable[[Served], None], runs: Path) -> None:
    """Print the whole answer with `ranvier chat`, once, though its server is killed or stopped, and started again."""
    served = Served(runs, "--stop-after", "0.2")
    command = [RANVIER, "chat", "--url", f"http://127.0.0.1:{served.port}/v1", "-p", "Tell me about the sea.",
               "--temperature", "0", "-n", "300"]  # fmt: skip
    with contextlib.ExitStack() as closing:
        closing.callback(served.end)
        talk = closing.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        closing.callback(talk.kill)
        assert talk.stdout is not None
        said = talk.stdout.read(60)
        end(served)
        assert talk.poll() is None
        served.begin()
        said += talk.stdout.read()
        assert talk.wait(60) == 0
        again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert said == again.stdout
        assert talk.stderr is not None and "asking for the rest" in talk.stderr.read()


@pytest.mark.slow
def test_what_is_over_leaves_nothing_behind(runs: Path) -> None:
    """Forget a stream after the window, also over a restart, and leave no file and no run that waits to be resumed."""
    served = Served(runs, "--resume-window", "3")
    answer = served.ask("POST", "/chat/completions", CHAT)
    request_id = answer.headers["x-request-id"]
    assert events(answer)[2]
    served.end()
    served.begin()
    assert events(served.ask("GET", f"/streams/{request_id}"))[2], "a complete one can be read again for a while"
    left_s = time.monotonic()
    assert wait_until(lambda: time.monotonic() > left_s + 3.2)
    assert served.ask("GET", f"/streams/{request_id}").status == 404
    served.end()
    assert not list(runs.glob(f"*/{stream_log.FILE}"))
    done = subprocess.run([RANVIER, "runs", "--runs", runs, "--json"], capture_output=True, text=True, check=True)
    listed = json.loads(done.stdout)
    assert len(listed) == 2 and not any(run["resumable"] for run in listed)


@pytest.mark.slow
def test_a_client_that_comes_back_waits_for_room_like_others(runs: Path) -> None:
    """Refuse a stream that comes back while there is no room, with a time to try again, and send the rest later."""
    room = [setting for actor in ("lower", "upper") for setting in ("--set", f"actors.{actor}.cache_tokens=400")]
    served = Served(runs, "--queue", "0", *room)
    body = {**CHAT, "max_tokens": 250, "temperature": 0}
    first = served.ask("POST", "/chat/completions", body)
    number, found, _ = events(first, 5)
    served.kill()
    served.begin()
    other = served.ask("POST", "/chat/completions", body)
    assert len(events(other, 3)[1]) == 3
    refused = served.ask("GET", f"/streams/{first.headers['x-request-id']}?after={number}")
    assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
    whole = events(other)
    again = served.ask("GET", f"/streams/{first.headers['x-request-id']}?after={number}")
    assert again.headers["x-request-id"] == first.headers["x-request-id"]
    assert shape(events(again)[1]) == shape(whole[1][len(found) - 3 :])
    served.end()


# -- the log of streams alone ------------------------------------------------------------------------------------------

HASHES, HERE = Began("g", "m"), Address("127.0.0.1", 8000)


def opened(name: str, owner: str = "") -> Opened:
    return Opened(Origin(request_id=name, owner=owner, seed=1, created=2, prompt=[3, 4]), "chat", '{"n": 1}')


def begin(folder: Path, hashes: Began = HASHES, address: Address = HERE) -> Started:
    folder.mkdir()
    return begun(folder, hashes, address)


def test_a_damaged_or_foreign_log_is_left_alone(tmp_path: Path) -> None:
    """Take up the newest log of the same graph, model, address and version; never one that is active or damaged."""

    ages = itertools.count(1)

    def left(name: str, hashes: Began = HASHES, address: Address = HERE) -> Path:
        log = begin(tmp_path / name, hashes, address).log
        assert log.add(opened(name)) and log.add(Grew(name, [Piece(0, 7, "x", "", -0.5, {7: -0.5})]))
        log._file.close()  # as if its process had died
        path = tmp_path / name / stream_log.FILE
        os.utime(path, (next(ages), next(ages)))
        return path

    left("damaged").write_bytes(b"\xff\n")
    left("other-model", Began("g", "n"))
    left("other-port", address=Address("127.0.0.1", 8001))
    left("other-version", address=Address("127.0.0.1", 8000, "0.0.1"))
    assert begin(tmp_path / "any", address=Address("127.0.0.1", 0)).left == {}, "nobody comes back to a port of chance"
    left("same")
    with left("cut").open("ab") as file:
        file.write(b'{"kind":"grew","id":"cut","pie')
    mine = begin(tmp_path / "mine")
    assert set(mine.left) == {"same", "cut"}, "cut had taken up same"
    [piece] = mine.left["cut"].pieces()
    assert (piece.token, piece.text, piece.top_logprobs) == (7, "x", {7: -0.5}), (
        "the line that is cut off does not count"
    )
    assert any("damaged" in each for each in mine.said)
    assert begin(tmp_path / "next").left == {}, "mine is active, and has the others' streams"
    assert mine.log.add(Complete("cut", {"error": {"message": "m"}}))
    mine.log._file.close()
    again = begin(tmp_path / "again").left["cut"]
    assert again.complete is not None and again.complete.error == {"error": {"message": "m"}}
    assert again.pieces() == [piece]


def test_what_json_cannot_hold_is_written_all_the_same(tmp_path: Path) -> None:
    """Write log-probabilities that are no numbers as OpenAI's least one, so that the line can be read."""
    log = begin(tmp_path / "a").log
    token = Token(5, 9, "w", logprob=float("nan"), top_logprobs={5: float("-inf"), 6: -1.0})
    assert log.add(opened("one")) and log.add(Grew("one", [piece_of(0, token)]))
    log._file.close()
    [piece] = begin(tmp_path / "b").left["one"].pieces()
    assert (piece.logprob, piece.top_logprobs) == (-9999.0, {5: -9999.0, 6: -1.0})


def test_a_log_is_rewritten_with_the_streams_that_are_kept(tmp_path: Path) -> None:
    """Bound the file: when it is too large, only streams that may still be asked for stay in it."""
    log = begin(tmp_path / "a").log
    for name in ("old", "new"):
        assert log.add(opened(name))
    for at in range(100):
        assert log.add(Grew("old", [Piece(0, at, "word ")])) and log.add(Grew("new", [Piece(0, at, "word ")]))
    log.forget("old")
    log._file.rewrite_at = 2000
    assert log.add(Grew("new", [Piece(0, 100, "word ")]))
    text = (tmp_path / "a" / stream_log.FILE).read_text()
    assert '"id":"new"' in text and "old" not in text
    log._file.close()
    left = begin(tmp_path / "b").left
    assert list(left) == ["new"] and [piece.token for piece in left["new"].pieces()] == list(range(101))


@pytest.mark.slow
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
