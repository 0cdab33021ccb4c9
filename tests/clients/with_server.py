"""Serve graphs while a command runs: `with_server.py RANVIER GRAPH... [OPTIONS] -- COMMAND...`.

The command finds the server in OPENAI_BASE_URL (also TEST_API_BASE_URL, as openai's own tests call it), a key in OPENAI_API_KEY
(the one that is there, else any), and the names of the models in RANVIER_MODELS, separated by commas. The server's log goes to
server.log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path


def main() -> int:
    at = sys.argv.index("--")
    (ranvier, *graphs), command = sys.argv[1:at], sys.argv[at + 1 :]
    with tempfile.TemporaryDirectory() as runs, Path("server.log").open("w") as log:
        server = subprocess.Popen(
            [ranvier, "serve", *graphs, "--port", "0", "--runs", runs, "--log", "console"],
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            url = server.stdout.readline().strip()
            if not url.startswith("http"):
                print("the server did not start; server.log has more", file=sys.stderr)
                return 1
            key = os.environ.get("OPENAI_API_KEY", "none")
            asked = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
            with urllib.request.urlopen(asked) as answer:
                names = [model["id"] for model in json.load(answer)["data"]]
            told = {
                "OPENAI_BASE_URL": url,
                "TEST_API_BASE_URL": url,
                "OPENAI_API_KEY": key,
                "RANVIER_MODELS": ",".join(names),
            }
            code = subprocess.run(command, env={**os.environ, **told}).returncode
            if server.poll() is not None:
                print(f"the server ended with {server.returncode}; server.log has more", file=sys.stderr)
                return 1
            return code
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    sys.exit(main())
