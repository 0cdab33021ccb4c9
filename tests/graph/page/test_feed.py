"""Ask the page's paths without a browser: files, the feed, and what may not be asked."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from waiting import wait_until

from ranvier.graph.page.pages import FILES
from ranvier.graph.serve.guard import read_keys
from ranvier.graph.serve.server import Options
from ranvier.transport.system import LINUX

ASKED = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 0,
    "max_tokens": 12,
    "ignore_eos": True,
}
MOST_BYTES = 150_000


def frames(server: Any, **headers: str) -> Iterator[tuple[str, Any]]:
    """Yield the events of the feed."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/page/feed", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200
        name = ""
        for line in answer:
            word, _, rest = line.decode().strip().partition(": ")
            if word == "event":
                name = rest
            elif word == "data":
                yield name, json.loads(rest)


def watchers() -> list[int]:
    """Return the processes that read traces for this one."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "page.watcher"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_the_files_are_ours(server: Any) -> None:
    """Serve the page whole: small, with a policy without exceptions, and nothing outside its folder."""
    status, page, headers = server.ask("GET", "/")
    assert status == 200 and "<title>Ranvier</title>" in page
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert " style=" not in page and "onclick" not in page
    assert sum(file.stat().st_size for file in FILES.iterdir()) < MOST_BYTES
    for file in FILES.iterdir():
        status, _, headers = server.ask("GET", f"/page/files/{file.name}")
        assert status == 200 and headers["x-content-type-options"] == "nosniff"
        assert server.ask("GET", f"/page/files/{file.name}", headers={"If-None-Match": headers["etag"]})[0] == 304
    for name in ("../pages.py", "..%2fpages.py", "%2e%2e%2fpages.py", "nothing.js", ".", "..", "a" * 3000):
        assert server.ask("GET", f"/page/files/{name}")[0] == 404


def test_the_feed(server: Any) -> None:
    """Send the graph, then its state and the trace's figures, until the client leaves. Then the watcher ends."""
    feed = frames(server)
    name, graph = next(feed)
    assert name == "graph" and graph["layers"] == [["gateway"], ["embed"], ["lower"], ["upper"], ["head"]]
    assert {edge["wire"] for edge in graph["edges"]} == {"ipc"}
    assert server.post("/v1/chat/completions", ASKED)[0] == 200
    for _ in range(40):
        name, frame = next(feed)
        if frame["trace"] and frame["trace"]["token"]:
            break
    assert {host["label"]: host["state"] for host in frame["hosts"]}["head.0"] == "running"
    assert frame["answered"] >= 1 and frame["trace"]["token"]["path"]
    resident = frame["trace"]["resident_bytes"]
    assert {str(host["pid"]) for host in frame["hosts"]} == resident.keys()
    assert all(each > 1 << 20 if LINUX else each is None for each in resident.values())
    assert len(watchers()) == 1
    feed.close()
    assert wait_until(lambda: not watchers(), 20)


def test_a_watcher_is_lost(server: Any) -> None:
    """Go on without the process that reads the trace, and start another."""
    with contextlib.closing(frames(server)) as feed:
        assert next(feed)[0] == "graph"
        assert any(frame["trace"] for _, frame in islice(feed, 40))
        (lost,) = watchers()
        os.kill(lost, signal.SIGKILL)
        seen = [frame for _, frame in islice(feed, 40)]
    assert all(frame["hosts"] for frame in seen)
    assert seen[-1]["trace"] is not None and lost not in watchers()


def test_a_token_of_a_request(server: Any) -> None:
    """Explain each token of an answer, and say so where there is none."""
    _, _, headers = server.post("/v1/chat/completions", ASKED)
    asked = f"/page/token?request={headers['x-request-id']}&token="
    for token in range(12):  # each actor writes its records when it is idle, so any of them may be late
        assert wait_until(lambda asks=f"{asked}{token}": server.ask("GET", asks)[0] == 200)
        _, path, _ = server.ask("GET", f"{asked}{token}")
        assert path["ms"] == pytest.approx(sum(part["ms"] for part in path["path"]))
        assert {"compute"} <= {cause["cause"] for cause in path["causes"]}
    assert server.ask("GET", f"{asked}12")[0] == 404
    for wrong in ("-1", "x", "", "9" * 30, "١"):
        assert server.ask("GET", asked + quote(wrong))[0] == 400
    assert server.ask("GET", "/page/token?request=none&token=0")[0] == 404
    assert server.ask("GET", "/page/actor?actor=../../etc/passwd")[0] == 404
    assert server.ask("GET", "/page/actor?actor=head.0")[1]["steps"]
    assert "text" in server.ask("GET", "/page/why")[1]
    assert server.ask("GET", "/page/feed?model=none")[0] == 404


def test_faults_need_leave(server: Any) -> None:
    """Refuse every fault without --allow-faults."""
    status, answer, _ = server.post("/page/faults", {"what": "kill", "actor": "head.0"})
    assert status == 403 and "--allow-faults" in answer["error"]["message"]


def test_nobody_outside_presses_a_button_case_82(start: Any) -> None:
    """Carry out faults only for the page itself, and only such as there are."""
    server = start(Options(port=0, faults=True))
    own, fault = server.url, {"what": "continue", "actor": "head.0"}
    assert server.post("/page/faults", fault)[0] == 200
    assert server.post("/page/faults", fault, Origin=own)[0] == 200
    for origin in ("https://evil.example", "http://localhost:3000", "null"):
        assert server.post("/page/faults", fault, Origin=origin)[0] == 403
    assert server.post("/page/faults", fault, Content_Type="text/plain")[0] == 415
    assert server.ask("GET", "/page/faults")[0] == 405
    for wrong in ({"what": "kill", "actor": "none.0"}, {"what": "kill", "actor": "gateway.0"}):
        assert server.post("/page/faults", wrong)[0] == 404
    for wrong in (
        {"what": "erase", "actor": "head.0"},
        {"what": "cut", "source": "lower", "target": "upper"},  # it is no tcp edge
        {"what": "cut", "source": "lower", "target": "upper", "seconds": 1e9},
        {"actor": "head.0"},
        [],
    ):
        assert server.post("/page/faults", wrong)[0] == 400


def test_keys_case_83(start: Any, tmp_path: Path) -> None:
    """Show the run only to keys, a token's path only to the key that asked, and no logs."""
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n")
    server = start(Options(port=0, keys=read_keys(file)))
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
    assert server.ask("GET", "/")[0] == server.ask("GET", "/page/files/main.js")[0] == 200
    for path in (
        "/page/models",
        "/page/feed",
        "/page/edge?edge=0",
        "/page/actor?actor=head.0",
        "/page/why",
        "/page/files",
    ):
        assert server.ask("GET", path)[0] == 401
    _, _, headers = server.post("/v1/chat/completions", ASKED, **first)
    asked = f"/page/token?request={headers['x-request-id']}&token=3"
    assert wait_until(lambda: server.ask("GET", asked, headers=first)[0] == 200)
    assert server.ask("GET", asked, headers=second)[0] == 404
    assert server.ask("GET", "/page/actor?actor=head.0", headers=first)[1]["log"] is None
    assert next(frames(server, **second))[0] == "graph"


def test_a_run_without_a_trace(start: Any) -> None:
    """Show the actors, and say that there is no trace."""
    server = start(trace="false")
    feed = frames(server)
    assert next(feed)[0] == "graph"
    server.post("/v1/chat/completions", ASKED)
    _, frame = next(feed)
    assert len(frame["hosts"]) == 4
    assert server.ask("GET", "/page/edge?edge=0")[0] in (200, 404)
    feed.close()


def test_the_command_allows_faults_on_loopback_only(tmp_path: Path) -> None:
    """Refuse --allow-faults where others can reach the server."""
    (tmp_path / "keys").write_text("key\n")
    command = [sys.executable, "-m", "ranvier", "serve", "examples/smollm2.yaml", "--host", "0.0.0.0", "--allow-faults"]
    done = subprocess.run([*command, "--api-key-file", str(tmp_path / "keys")], capture_output=True, text=True)
    assert done.returncode == 2 and "only for loopback" in done.stderr
