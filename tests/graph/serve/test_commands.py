"""Run the commands as a user does: a server that is asked, stopped and refused; a client whose connections are cut."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from linux import STORED

SMOLLM2 = Path(__file__).parents[3] / "examples" / "smollm2.yaml"
RANVIER = Path(sys.executable).with_name("ranvier")
ASKED = {
    "model": "smollm2-in-four",
    "messages": [{"role": "user", "content": "Tell me about the sea."}],
    "temperature": 0,
}


@contextlib.contextmanager
def running(runs: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `ranvier serve` while in the context. Yield its process and address."""
    process = subprocess.Popen(
        [RANVIER, "serve", SMOLLM2, "--port", "0", "--runs", runs, *STORED, *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def ask(url: str, **changes: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps({**ASKED, **changes}).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=60)


def test_a_server_that_is_stopped_lets_answers_end(runs: Path) -> None:
    """Print the address, answer, and on SIGTERM refuse what is new, let running answers end, and leave nothing behind."""
    with running(runs) as (process, url):
        assert url.startswith("http://127.0.0.1:") and url.endswith("/v1")
        with ask(url, max_tokens=100, stream=True) as stream:
            stream.readline()
            process.send_signal(signal.SIGTERM)
            text = stream.read().decode()
        assert text.rstrip().endswith("data: [DONE]") and '"finish_reason":"length"' in text
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "curl http://127.0.0.1" in err and "stopping: running answers have 20 s" in err


def test_an_answer_that_does_not_end_in_time_ends_with_an_error(runs: Path) -> None:
    """End an answer with a typed error when the time after SIGTERM is over."""
    with running(runs, "--stop-after", "0.2") as (process, url), ask(url, max_tokens=5000, stream=True) as stream:
        stream.readline()
        process.send_signal(signal.SIGTERM)
        lines = stream.read().decode().splitlines()
        assert process.wait(60) == 0
    [error] = [json.loads(line[6:])["error"] for line in lines if line.startswith('data: {"error"')]
    assert error["code"] == "stopping"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere"),
        ([str(SMOLLM2)], "2 graphs are called smollm2-in-four"),
        (["--port", "99999"], "65535"),
    ],
)
def test_what_cannot_be_served_is_said(runs: Path, options: list[str], words: str) -> None:
    """Refuse, with exit code 2, what would be open to others, or cannot be told apart."""
    done = subprocess.run(
        [RANVIER, "serve", SMOLLM2, "--runs", runs, *options], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and words in done.stderr


class Cutting:
    """Pass connections on to a server, and cut each stream after some bytes, as a bad network does."""

    def __init__(self, url: str, most: int) -> None:
        at = urlsplit(url)
        self._to, self._most = (at.hostname, at.port), most
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        self._sockets: list[socket.socket] = []
        self.cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                theirs, _ = self._listening.accept()
                ours = socket.create_connection(self._to)
                self._sockets += [theirs, ours]
                threading.Thread(target=self._pass, args=(theirs, ours, 1 << 40), daemon=True).start()
                threading.Thread(target=self._pass, args=(ours, theirs, self._most), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, left: int) -> None:
        with contextlib.suppress(OSError):
            while left > 0 and (data := source.recv(min(left, 1000))):
                target.sendall(data)
                left -= len(data)
            self.cut += left <= 0
            for each in (source, target):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in (self._listening, *self._sockets):
            each.close()


def test_the_client_takes_up_a_stream_whose_connection_is_lost(server: Any) -> None:
    """Print the whole answer, once and in order, though the connection is cut again and again."""
    prompt = ["--prompt", "Tell me about the sea.", "--temperature", "0", "--max-tokens", "60"]

    def told(url: str) -> str:
        done = subprocess.run(
            [RANVIER, "chat", "--url", url, *prompt], capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    cutting = Cutting(server.url, 4000)
    with contextlib.closing(cutting):
        assert told(cutting.url) == told(f"{server.url}/v1")
    assert cutting.cut >= 2


def test_the_client_says_what_is_wrong() -> None:
    """Name a server that is not there, and an address that is none."""
    for url, words in (
        ("http://127.0.0.1:9/v1", "start it with `ranvier serve`"),
        ("nonsense", "--url nonsense: expected an address"),
    ):
        done = subprocess.run(
            [RANVIER, "chat", "--url", url, "-p", "x"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode and words in done.stderr


def test_the_snippet_of_the_page_runs(server: Any) -> None:
    """Run the Python block of docs/serving.md as it stands, but for the server's address and the model's name."""
    [block] = re.findall(r"```python\n(.*?)```", (SMOLLM2.parents[1] / "docs" / "serving.md").read_text(), re.S)
    block = block.replace("http://127.0.0.1:8000", server.url).replace("smollm2-in-four", "smollm2")
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 3
