"""Use the page in a real Chromium: chat, see the graph work, ask why, kill an actor, cut the connection."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from ranvier.graph.serve.server import Options

QUESTION = "Why do nerve fibres have gaps in their sheath?"
OPTIONS = Options(port=0, faults=True)
CHANGES = {"model.dtype": "float32", "transport": "tcp://127.0.0.1", "restart.backoff_s": "0"}
SEA = "Tell me about the sea."


def trace(run_dir: Path, *options: str) -> Any:
    """Return what `ranvier trace --json` says of a run."""
    command = [sys.executable, "-m", "ranvier", "trace", str(run_dir), "--json", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_message_its_edges_and_its_tokens(see: Any, server: Any, continued: Any) -> None:
    """Stream an answer, light its way up, and show the same histogram and the same path as `ranvier trace`."""
    seen = see(server.url)
    page = seen.open()
    seen.set(temperature=0, max_tokens=48)
    page.evaluate("""() => {
        window.lit = new Set();
        new MutationObserver((changes) => changes.forEach(({target}) => target.matches(".lit") && window.lit.add(target.dataset.edge ?? target.dataset.actor)))
            .observe(document.querySelector("#graph"), {subtree: true, attributeFilter: ["class"]});
        window.lengths = new Set();
        new MutationObserver(() => window.lengths.add(document.querySelector(".message:last-child .body").textContent.length))
            .observe(document.querySelector("#messages"), {subtree: true, childList: true, characterData: true});
    }""")
    page.click("#settings-button")
    seen.say(QUESTION, wait=False)
    seen.begun(120)
    page.click('.edge[data-edge="lower.hidden -> upper.hidden"] .hit', force=True)
    page.wait_for_selector('#panel tr[data-part="compute"]:not([data-messages="0"])')
    seen.picture("page")
    seen.answered()
    _, text = continued([{"role": "user", "content": QUESTION}], 48)
    assert "".join(seen.answer.split()) == "".join(re.sub("[*#]", "", text).split())
    assert len(page.evaluate("[...window.lengths]")) > 5  # it came in pieces
    assert {"embed", "lower", "upper", "head", "lower.hidden -> upper.hidden"} <= set(page.evaluate("[...window.lit]"))
    assert re.search(
        r"[\d.]+ tokens/s.*first token after [\d.]+ m?s.*48 tokens",
        page.inner_text(".message:last-child .under").replace("\n", " "),
    )

    run_dir = server.look(lambda run: run.dir)
    edges = {edge["edge"]: edge for edge in trace(run_dir)["edges"]}
    figures = edges["lower.hidden -> upper.hidden"]
    for part in ("serialise", "credit", "wire", "queue", "compute"):
        row = page.locator(f'#panel tr[data-part="{part}"]')
        assert wait_until(lambda row=row: int(row.get_attribute("data-messages")) == figures["messages"])
        shown = microseconds(row.locator("td.number").first.inner_text())
        assert shown == pytest.approx(figures["microseconds"][part]["p50"], rel=0.06, abs=1)

    page.focus(".strip")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#panel .share")
    session, position = re.search(r"--why (\d+) --position (\d+)", page.inner_text("#panel .note code")).groups()
    wanted = trace(run_dir, "--why", session, "--position", position)
    rows = page.eval_on_selector_all("#panel tr[data-cause]", "all => all.map((row) => ({...row.dataset}))")
    assert [(row["cause"], row["where"]) for row in rows] == [
        (each["cause"], each["where"]) for each in wanted["causes"]
    ]
    assert [float(row["ms"]) for row in rows] == pytest.approx([each["ms"] for each in wanted["causes"]])
    page.click(".under button:has-text('Tokens')")
    seen.picture("page-token")
    assert "".join(page.locator(".tokens button").all_inner_texts()).split() == text.split()
    seen.check_accessibility()


def microseconds(words: str) -> float:
    number, unit = words.split()
    return float(number) * {"µs": 1, "ms": 1e3, "s": 1e6}[unit]


def test_an_actor_is_killed_by_its_button(see: Any, server: Any, continued: Any) -> None:
    """Kill an actor in the middle of an answer: see it lost and back, and the text as without the kill."""
    seen = see(server.url)
    page = seen.open()
    seen.set(temperature=0, max_tokens=64)
    page.click('.node[data-actor="upper"]')
    page.wait_for_selector("#panel button:has-text('Kill')")
    seen.say(SEA, wait=False)
    seen.begun(40)
    page.click("#panel button:has-text('Kill')")
    page.wait_for_selector("#panel :text('was killed')")
    page.wait_for_selector('.node[data-actor="upper"]:not([data-state="running"])')
    page.wait_for_selector('.node[data-actor="upper"][data-state="running"]')
    seen.answered()
    _, text = continued([{"role": "user", "content": SEA}], 64)
    assert "".join(seen.answer.split()) == "".join(re.sub("[*#]", "", text).split())
    page.wait_for_selector("#events-title:has-text('replaced')")
    assert "restarts 1" in page.text_content('.node[data-actor="upper"]')
    assert page.inner_text("#f-recoveries") == "1"


@pytest.mark.slow
def test_a_connection_is_cut(see: Any, server: Any, continued: Any) -> None:
    """Cut all connections in the middle of an answer. It goes on where it stopped, and so does the feed."""
    seen = see(server.url)
    seen.expected = ("net::ERR_",)
    page = seen.open()
    seen.set(temperature=0, max_tokens=64)
    seen.say(SEA, wait=False)
    seen.begun(40)
    seen.relay.cut()
    page.wait_for_selector("#progress:has-text('lost, resuming')")
    seen.answered()
    _, text = continued([{"role": "user", "content": SEA}], 64)
    assert "".join(seen.answer.split()) == "".join(re.sub("[*#]", "", text).split())
    page.wait_for_selector("#link[data-state=live]")


@pytest.mark.slow
def test_an_edge_is_cut_and_an_actor_slowed(see: Any, server: Any) -> None:
    """Cut an edge that crosses the network and slow an actor, by their buttons. Answers still come."""
    seen = see(server.url)
    page = seen.open()
    seen.set(temperature=0, max_tokens=60)
    seen.say(SEA, wait=False)
    seen.begun(20)
    page.click('.edge[data-edge="embed.hidden -> lower.hidden"] .hit', force=True)
    page.click("#panel button:has-text('Cut')")
    page.wait_for_selector("#panel :text('cut for 3 s')")
    page.click('.node[data-actor="lower"]')
    page.click("#panel button:has-text('Slow')")
    page.wait_for_selector("#panel :text('half its speed')")
    page.click("#why")
    page.wait_for_selector("#panel pre")
    seen.answered()
    assert server.look(lambda run: run.counters["chaos"]["cut"]) >= 1
    assert page.locator(".message:last-child .error").count() == 0


@pytest.mark.slow
def test_conversations_branches_and_a_reload(see: Any, server: Any) -> None:
    """Keep conversations over a reload, with their branches: an edited message, and another answer."""
    seen = see(server.url)
    page = seen.open()
    seen.set(max_tokens=8, system="Be brief.", seed=3, temperature=0.5)
    seen.say("One.")
    first = seen.answer
    page.click(".message:last-child button:has-text('Regenerate')")
    page.wait_for_selector(".message:last-child header :text('2/2')")
    seen.answered()
    page.click(".message:last-child button[aria-label='Branch before']")
    assert seen.answer == first
    page.click(".message[data-role=user] button:has-text('Edit')")
    page.fill(".message textarea", "Two.\n<img src=x onerror=alert(1)>")
    page.click("button:has-text('Send as a new branch')")
    seen.answered()
    assert page.locator(".message img").count() == 0
    assert page.inner_text(".message[data-role=user] header").split()[1:4] == ["‹", "2/2", "›"]
    page.click("#new-talk")
    seen.say("Three.")
    page.reload()
    page.wait_for_selector("#link[data-state=live]")
    assert page.locator("#talks option").all_inner_texts()[:2] == ["Three.", "One."]
    page.select_option("#talks", label="One.")
    assert "Two." in page.inner_text(".message[data-role=user]")
    assert page.input_value("#s-system") == "Be brief."
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#drop-talk")
    assert page.locator("#talks option").all_inner_texts() == ["Three."]


def test_stop(see: Any, server: Any) -> None:
    """End an answer with the button: its caches are free at once, and what came stays."""
    seen = see(server.url)
    page = seen.open()
    seen.set(max_tokens=1000, temperature=0)
    seen.say("Count to a thousand.", wait=False)
    seen.begun(20)
    page.click("#send")
    seen.answered()
    assert wait_until(lambda: server.look(lambda run: run.snapshot()["sessions"]) == 0)
    assert len(seen.answer) > 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_keyboard_and_schemes(see: Any, server: Any, scheme: str) -> None:
    """Work on a narrow screen and by keyboard, in light and in dark, without anything that axe-core calls serious."""
    seen = see(server.url, color_scheme=scheme, reduced_motion="reduce")
    page = seen.open()
    page.focus('.node[data-actor="lower"]')
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel :text('lower.0: running')")
    seen.check_accessibility()
    page.set_viewport_size({"width": 400, "height": 800})
    page.evaluate("window.shifts.length = 0")  # a new size is the user's doing
    assert page.is_visible("#text") and not page.is_visible("#graph")
    page.click("button[data-show=graph]")
    assert page.is_visible("#graph") and not page.is_visible("#text")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    seen.check_accessibility()


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](  JaVaScRiPt:alert(1) )",
    "[a](data:text/html,<script>alert(1)</script>)",
    "![a](https://foreign.example/x.png)",
    '<https://foreign.example/"onmouseover=alert(1)>',
    "**[x](java\nscript:alert(1))**",
    "| a | <b onclick=alert(1)> |\n|---|---|\n| <iframe src=//foreign.example> | c |",
    "```html\n<script>alert(1)</script>",
    "`<svg/onload=alert(1)>`",
    "[" * 4000,
    "*" * 4000,
    "> " * 2000 + "x",
    "- " * 500 + "x",
    "\n".join("  " * depth + "- x" for depth in range(400)),
    "> " * 20_000 + "x",
    "# a\n" * 5000,
    "![a](data:image/png;base64," + "A" * 20_000,
    "[a](" * 5000,
]


def test_markdown(see: Any, server: Any) -> None:
    """Show Markdown, and never an element that could act, whatever a model writes."""
    seen = see(server.url)
    page = seen.open()
    shown = """async (text) => {
        const {show} = await import("/page/files/markdown.js");
        const box = document.createElement("div");
        for (let at = 1; at <= text.length; at += Math.max(1, text.length >> 5)) show(box, text.slice(0, at));
        show(box, text);
        const whole = document.createElement("div");
        show(whole, text);
        const all = [...box.querySelectorAll("*")];
        return {
            html: box.innerHTML, whole: whole.innerHTML, names: [...new Set(all.map((each) => each.localName))],
            acts: all.flatMap((each) => each.getAttributeNames()).filter((name) => name.startsWith("on") || name === "src" || name === "style"),
            links: all.filter((each) => each.href).map((each) => each.href),
        };
    }"""
    allowed = {"p", "a", "strong", "em", "s", "code", "pre", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "br", "hr",
               "blockquote", "div", "h3", "h4", "h5", "h6"}  # fmt: skip
    for text in HOSTILE:
        found = page.evaluate(shown, text)
        assert found["html"] == found["whole"]
        assert set(found["names"]) <= allowed and found["acts"] == [], text[:80]
        assert all(link.startswith(("https://", "http://")) for link in found["links"])
    text = "# Title\n\nSome **bold**, *thin*, `a*b*` and snake_case_words.\n1. one\n2. two\n   - in\n\n> said\n\n| a | b |\n|--|--|\n| 1 | 2 |\n\n```py\nx = 1\n```"
    assert page.evaluate(shown, text)["html"] == (
        "<h3>Title</h3><div><p>Some <strong>bold</strong>, <em>thin</em>, <code>a*b*</code> and snake_case_words.</p>"
        "<ol><li>one</li><li>two<ul><li>in</li></ul></li></ol></div><blockquote><p>said</p></blockquote>"
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"
        '<pre data-language="py" tabindex="0"><code>x = 1</code></pre>'
    )
