"""Provide pages in a real Chromium, over a server whose connections can be cut."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page
from waiting import wait_until

AXE = Path(__file__).parents[3] / ".venv" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
SERIOUS = ("serious", "critical")
MOST_SHIFT = 0.001
"""Most that one entry may shift, a hundredth of what web.dev calls good: one in twenty pages reports 0.00001 of its heading."""
# each entry that was not the user's doing
SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts.push([entry.value, entry.sources.map(
        (source) => source.node?.outerHTML?.slice(0, 200))]);
}).observe({type: "layout-shift", buffered: true});
"""


class Relay:
    """Pass connections on to a server. `cut` ends them all at once."""

    def __init__(self, address: str) -> None:
        self._target = urlsplit(address)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            far = socket.create_connection((self._target.hostname, self._target.port))
            with self._lock:
                self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # cut, or closed by the other side
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with self._lock:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
                self._open.discard(end)

    def cut(self) -> None:
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()


class Seen:
    """Hold one page, and what went wrong in it."""

    def __init__(self, browser: Browser, url: str, pictures: Path | None, **options: Any) -> None:
        self._pictures = pictures
        self.relay = Relay(url)
        self.context = browser.new_context(viewport={"width": 1440, "height": 900}, **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.expected: tuple[str, ...] = ()
        """Words of console errors that the test causes on purpose."""
        self._errors: list[str] = []
        self._foreign: list[str] = []
        self.page.on(
            "console", lambda said: self._errors.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self._errors.append(str(error)))
        self.page.on("request", self._request)
        self.page.add_init_script(SHIFTS)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.relay.url, "data:")):
            self._foreign.append(request.url)

    def open(self) -> Page:
        self.page.goto(self.relay.url)
        self.page.wait_for_selector("#link[data-state=live]")
        return self.page

    def say(self, text: str, *, wait: bool = True) -> None:
        """Send a message, and wait until its answer is complete."""
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        if wait:
            self.answered()

    def answered(self) -> None:
        self.page.wait_for_selector("#send:has-text('Send')", timeout=90_000)
        self.page.wait_for_selector(".message:last-child .under")

    def begun(self, letters: int = 20) -> None:
        """Wait until the answer has so many letters."""
        long = f"document.querySelector('.message:last-child .body').textContent.length > {letters}"
        assert wait_until(lambda: self.page.evaluate(long), 30)

    @property
    def answer(self) -> str:
        return self.page.inner_text(".message[data-role=assistant]:last-child .body")

    def set(self, **values: Any) -> None:
        """Set fields of the settings."""
        if self.page.get_attribute("#settings-button", "aria-expanded") != "true":
            self.page.click("#settings-button")
        for name, value in values.items():
            self.page.fill(f"#s-{name}", str(value))

    def picture(self, name: str) -> None:
        """Write a picture for the docs, if they are wanted."""
        if self._pictures is not None:
            self.page.screenshot(path=self._pictures / f"{name}.png")

    def check_accessibility(self) -> None:
        """Fail if axe-core finds anything serious."""
        self.page.evaluate(AXE.read_text())  # by the debugger: the page's own policy allows no foreign script
        found = self.page.evaluate("axe.run({resultTypes: ['violations']})")
        serious = [each for each in found["violations"] if each["impact"] in SERIOUS]
        assert not serious, [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious]

    def close(self) -> None:
        shifts = self.page.evaluate("window.shifts")
        self.context.close()
        self.relay.close()
        assert self._foreign == []
        assert [error for error in self._errors if not any(words in error for words in self.expected)] == []
        assert [shift for shift in shifts if shift[0] > MOST_SHIFT] == []


See = Callable[..., Seen]


@pytest.fixture
def see(browser: Browser, pytestconfig: pytest.Config) -> Iterator[See]:
    """Provide `see(url, **options)`, a page of a server. Errors, foreign requests and layout shifts fail the test."""
    opened: list[Seen] = []

    def begin(url: str, **options: Any) -> Seen:
        opened.append(Seen(browser, url, pytestconfig.getoption("pictures"), **options))
        return opened[-1]

    yield begin
    for each in opened:
        each.close()
