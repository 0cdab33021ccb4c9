"""Build the docs as a site, and look at it in a real browser: no warning, no broken link, no foreign host."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MERMAID = REPOSITORY / ".venv" / "site" / "node_modules" / "mermaid" / "dist" / "mermaid.min.js"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Serve the site on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site of a copy of the docs, and return its folder."""
    place = tmp_path_factory.mktemp("site")
    for name in ("docs", "src", "graph", "actors", "transport"):
        if name == "docs":
            shutil.copytree(REPOSITORY / name, place / name)
        else:
            (place / name).symlink_to(REPOSITORY / name)
    shutil.copy(REPOSITORY / "zensical.toml", place)
    (place / "docs" / "assets").mkdir(exist_ok=True)
    shutil.copy(MERMAID, place / "docs" / "assets")
    done = subprocess.run(
        [Path(sys.executable).with_name("zensical"), "build", "--strict"], cwd=place, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stderr and "Warning" not in done.stdout + done.stderr
    return place / "site"


def test_the_reference_is_what_the_code_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find nothing to change in docs/reference (`make docs` writes it)."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import reference

    for name, lines in reference.PAGES.items():
        assert (reference.FOLDER / name).read_text() == "\n".join(lines()) + "\n", name
    named = [name for names in reference.GROUPS.values() for name in names]
    import ranvier

    assert sorted(named) == sorted(ranvier.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "talk", "narrow"])
def test_a_recording_is_drawn_the_same(name: str, tmp_path: Path) -> None:
    """Draw each recording twice: both pictures, and the one in the docs, have the same bytes."""
    pictures = REPOSITORY / "docs" / "pictures"
    for again in ("one", "two"):
        drawn = tmp_path / f"{again}.svg"
        subprocess.run(
            ["bash", REPOSITORY / "tools" / "draw.sh", REPOSITORY / ".venv" / "site", pictures / f"{name}.cast", drawn],
            check=True, timeout=60,
        )  # fmt: skip
        assert drawn.read_bytes() == (pictures / f"{name}.svg").read_bytes()


def test_each_page_is_in_the_site(site: Path) -> None:
    """Make a page of every file, and put docstrings into the page about Python."""
    for page in (REPOSITORY / "docs").rglob("*.md"):
        made = site / page.relative_to(REPOSITORY / "docs").with_suffix(".html")
        assert made.is_file(), made
    python = (site / "reference" / "python.html").read_text()
    assert "Check a graph that is written in Python." in python and ":::" not in python


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    """Load no script, style, font or picture from another host."""
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            address = re.search(r"(?:src|href)=\"?(https?:)?//", tag)
            assert address is None or 'rel="canonical"' in tag, (page, tag)


def test_links_lead_somewhere(site: Path) -> None:
    """Find the file of each link within the site."""
    for page in site.rglob("*.html"):
        for link in re.findall(r'href="([^"#?:]+)(?:[#?][^"]*)?"', page.read_text()):
            if page.name != "404.html":
                assert (page.parent / link).exists(), (page, link)


@pytest.mark.slow
def test_in_a_browser(address: str, browser: Any, pytestconfig: pytest.Config) -> None:
    """Show the first page and a diagram without an error, and without asking another host."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((address, "blob:")) else None)
    page.goto(f"{address}/index.html")
    assert page.locator("h1").first.inner_text().startswith("Ranvier")
    assert page.locator("img[src$='demo.svg']").evaluate("picture => picture.complete && picture.naturalWidth > 0")
    if pictures := pytestconfig.getoption("pictures"):
        page.screenshot(path=pictures / "site.png")
    page.get_by_role("button", name="Search").first.click()
    page.keyboard.type("quorum of inputs")
    page.get_by_text("Branches that join").last.wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("link", name="1. Run a model").first.click()
    assert "ranvier run smollm2" in page.locator("article").inner_text()
    page.goto(f"{address}/graphs.html")
    page.locator(".mermaid").first.wait_for()
    page.wait_for_function(
        "document.querySelectorAll('pre.mermaid').length == 0"
    )  # the theme replaces each by its drawing
    assert page.locator("div.mermaid").count() >= 5
    assert wrong == []
    page.close()
