"""Measure what the page costs a run: tokens per second at 16 streams over HTTP, with the page open against closed.

`a page elsewhere` reads the feed and draws nothing, as if the browser were another machine's. `Chromium here` shows the page
on the same two cores, so its drawing counts, too. Each figure is a ratio from one process, in the order closed, open, open,
closed; the interval of its median comes from the ranks of the rounds (95 %). `script` is how long the page's script takes for a
frame of 40 actors and 80 edges in which every label changes: while it is hidden, and while the same two cores draw it.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
from functools import partial
from pathlib import Path

import report
from contestants import NEW, PROMPT, TWO, Contestant, graph_of
from report import Answer, Goal
from served import ASKING, CLIENT, asking

FRAMES = Path(__file__).with_name("page_frames.js")
LEAST_ROUNDS = 20
MOST_SCRIPT_MS = 4.0
_OPEN = """
import socket, sys, urllib.parse
place = urllib.parse.urlsplit(sys.argv[1])
feed = socket.create_connection((place.hostname, place.port))
feed.sendall(f"GET /page/feed HTTP/1.1\\r\\nHost: {place.netloc}\\r\\n\\r\\n".encode())
data = feed.recv(1 << 16)
assert data.startswith(b"HTTP/1.1 200"), data
print("open", flush=True)
while feed.recv(1 << 16): pass
"""
_CHROMIUM = """
import sys, shutil
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=sys.argv[2], args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(sys.argv[1])
    page.wait_for_selector("#link[data-state=live]")
    print("ready", flush=True)
    sys.stdin.readline()
    browser.close()
"""
_OURS = (
    ASKING
    + """
import pathlib, time, trio, ranvier
from ranvier.graph.serve.server import Options, serving
file = pathlib.Path(__file__).with_name("graph.yaml")
file.write_text(sys.argv[4])
def opened(url):
    command = [sys.executable, "-c", sys.argv[5], url, sys.argv[6]]
    page = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert page.stdout.readline()
    time.sleep(2)
    return page
def ratio(url, process):
    found = []
    for shown in (False, True):
        page = opened(url) if shown else None
        found += [asked(process)["tokens_s"] for _ in range(1 + shown)]
        if page:
            page.kill() if sys.argv[5].startswith("\\nimport socket") else page.communicate(b"\\n")
            page.wait()
            time.sleep(1)
    return (found[1] + found[2]) / (found[0] + asked(process)["tokens_s"])
async def main():
    async with ranvier.launch(ranvier.load(file), runs=file.parent) as run, serving({"bench": run}, Options(port=0)) as url:
        process = client(url.removeprefix("http://"))
        while await trio.to_thread.run_sync(sys.stdin.readline):
            print(await trio.to_thread.run_sync(ratio, url, process), flush=True)
        process.kill()
trio.run(main)
"""
)
_SCRIPT = """
import http.server, pathlib, sys, threading
from playwright.sync_api import sync_playwright
from ranvier.graph.page.pages import FILES
class Files(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path): return str(FILES / pathlib.PurePosixPath(path).name)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
threading.Thread(target=server.serve_forever, daemon=True).start()
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=sys.argv[1], args=["--no-sandbox"])
    for _ in sys.stdin:
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.route("**/main.js", lambda route: route.fulfill(body="", content_type="text/javascript"))
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        print(page.evaluate(pathlib.Path(sys.argv[2]).read_text(), sys.argv[3] == "hidden"), flush=True)
        page.close()
"""


def chromium() -> str:
    """Return the command of a Chromium.

    Raises:
        report.Ended: there is none.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    raise report.Ended("there is no Chromium; tests/graph/page/browser.sh installs it")


def page(how: str) -> Contestant:
    """Return a contestant whose figure is the ratio of open to closed."""
    asked = asking(16, "/v1/completions", {"prompt": PROMPT, "max_tokens": 2 * NEW})
    return Contestant(sys.executable, _OURS, CLIENT, asked, "tokens_s", graph_of(TWO, "stored"), how, chromium())


def script(how: str) -> Contestant:
    """Return a contestant whose figure is the time of the page's script for a frame, while it is `hidden` or `drawn`."""
    return Contestant(sys.executable, _SCRIPT, chromium(), str(FRAMES), how)


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median, from ranks: binomial, by its normal approximation."""
    ordered, off = sorted(ratios), 0.98 * math.sqrt(len(ratios))
    return ordered[max(0, math.floor(len(ratios) / 2 - off))], ordered[
        min(len(ratios) - 1, math.ceil(len(ratios) / 2 + off) - 1)
    ]


def ask(rounds: int) -> Answer:
    figures = report.Figures()
    notes = []
    for name, make in (
        ("a page elsewhere", partial(page, _OPEN)),
        ("Chromium here", partial(page, _CHROMIUM)),
        *((f"script, ms a frame, {how}", partial(script, how)) for how in ("hidden", "drawn")),
    ):
        try:
            contestant = make()
        except report.Ended as why:
            figures.end(name, why)
            continue
        try:
            report.in_turn(
                {name: contestant.measure}, rounds if "script" in name else max(rounds, LEAST_ROUNDS), figures
            )
        finally:
            contestant.close()
    for name, bound in (("a page elsewhere", 0.99), ("Chromium here", None)):
        if name in figures:
            low, high = interval(figures[name])
            median = statistics.median(figures[name])
            said = "" if bound is None else f", at least {bound}: {'holds' if median >= bound else 'MISSED'}"
            notes.append(f"open / closed, {name}: {median:.3f} ({low:.3f} to {high:.3f}){said}")
    if spent := figures.get("script, ms a frame, hidden"):
        median = statistics.median(spent)
        holds = "holds" if median <= MOST_SCRIPT_MS else "MISSED"
        notes.append(f"script: {median:.2f} ms a frame at the 95th percentile, at most {MOST_SCRIPT_MS:g}: {holds}")
    return Answer("open / closed, or milliseconds", figures, list[Goal](), notes)
