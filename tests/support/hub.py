"""Serve one model as the Hugging Face hub does, on loopback: its files at one commit, and what the client asks before."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Hold a hub with the model `name`, whose files are those of a folder. Use it in a `with`; `url` is its address."""

    def __init__(self, name: str, folder: Path) -> None:
        self.asked: list[str] = []
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                hub.asked.append(self.path)
                path, file = self.path.partition("?")[0], self.path.rpartition("/")[2].partition("?")[0]
                headers = {"X-Repo-Commit": COMMIT}
                if path.startswith(f"/api/models/{name}"):
                    siblings = [{"rfilename": each} for each in files]
                    data = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
                    if "/tree/" in path:
                        data = json.dumps([
                            {"type": "file", "path": each, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                            for each, content in files.items()
                        ]).encode()  # fmt: skip
                elif path.startswith(f"/{name}/resolve/") and file in files:
                    data = files[file]
                    headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                for key, value in {
                    **headers,
                    "Content-Length": str(len(data)),
                    "Content-Type": "application/json",
                }.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
