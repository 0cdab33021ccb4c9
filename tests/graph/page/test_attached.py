"""Show the page of a run of another process by its folder: `ranvier page RUN`."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from waiting import wait_until

PARTS = Path(__file__).parents[1] / "training" / "parts.py"
LAYER = "./parts.py:Layer"
LEARNS = {
    "ranvier": 1, "name": "learns", "edges": ["gateway.x -> one.x", "one.output -> two.x", "two.output -> gateway.made"],
    "actors": {
        "one": {"kind": LAYER, "args": {"width": 8, "to": 12}, "inputs": {"x": "float32[pictures, 8]"}},
        "two": {"kind": LAYER, "args": {"width": 12, "to": 4, "last": True}},
    },
    "training": {
        "data": {"source": "./parts.py:Numbers", "args": {"batch": 24}}, "batch": 24, "micro_batches": 4, "steps": 100_000,
        "loss": [{"of": "two.output", "target": "label"}], "optimizer": {"kind": "adamw", "lr": 0.01},
        "validate": {"every": 3, "batches": 2}, "save": {"every": 100_000},
    },
}  # fmt: skip


def losses(history: Path) -> dict[int, float]:
    """Return the loss of each step that is written down."""
    entries = map(json.loads, history.read_text().splitlines())
    return {each["step"]: each["loss"] for each in entries if "validation" not in each}


def ranvier(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ranvier", *map(str, arguments)]


@contextlib.contextmanager
def attached(run_dir: Path) -> Iterator[str]:
    """Yield the address of the page of a run. It ends without a word when it is interrupted."""
    command = ranvier("page", run_dir, "--port", 0)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip().rstrip("/")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode in (0, 130) and "Traceback" not in said


def test_a_run_of_another_process(server: Any, see: Any) -> None:
    """Show the graph, an edge and an actor of a run that this page's process does not run. No fault can be asked."""
    with attached(server.look(lambda run: run.dir)) as url:
        seen = see(url)
        page = seen.open()
        assert not page.is_visible("#text")
        server.post(
            "/v1/chat/completions",
            {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9},
        )
        page.wait_for_selector('.edge[data-edge="lower.hidden -> upper.hidden"]:not([data-idle])')
        page.click('.node[data-actor="lower"]')
        page.wait_for_selector("#panel :text('lower.0: running')")
        assert page.locator("#panel button:has-text('Kill')").count() == 0
        page.click("#why")
        page.wait_for_selector("#panel pre")
        seen.expected = ("net::ERR_", "Failed to fetch")
    page.wait_for_selector("#link:not([data-state=live])")


@pytest.mark.slow
def test_a_training(see: Any, runs: Path, tmp_path: Path) -> None:
    """Show losses and schedule of a training while it goes on, and say when it is over."""
    shutil.copy(PARTS, tmp_path / "parts.py")
    (tmp_path / "graph.yaml").write_text(yaml.safe_dump(LEARNS))
    command = ranvier("train", tmp_path / "graph.yaml", "--allow-code", "--runs", runs, "--out", tmp_path / "out")
    training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    history = tmp_path / "out" / "history.jsonl"
    assert wait_until(lambda: history.exists() and len(history.read_text().splitlines()) > 8, 60)
    [run_dir] = runs.iterdir()
    with attached(run_dir) as url:
        seen = see(url)
        page = seen.open()
        page.wait_for_selector("#training :text('of 100000: loss')")
        page.wait_for_selector("#training .schedule rect.backward")
        assert page.locator("#training .schedule .label").all_text_contents()[:2] == ["one", "two"]
        points = page.get_attribute("#training polyline.steps", "points").split()
        assert len(points) >= 6 and page.get_attribute("#training polyline.held", "points")
        step, loss = re.findall(r"Step (\d+) of 100000: loss ([\d.]+)", page.inner_text("#training p"))[0]
        assert wait_until(lambda: int(step) in losses(history))
        assert f"{losses(history)[int(step)]:.4f}" == loss
        seen.check_accessibility()
        seen.expected = ("net::ERR_", "Failed to")
        training.send_signal(signal.SIGINT)
        training.communicate(timeout=60)
        page.wait_for_selector("#link[data-state=over]")


@pytest.mark.parametrize("what", ["none", "file", "empty"])
def test_no_run(tmp_path: Path, what: str) -> None:
    """Refuse what is no run's folder."""
    place = tmp_path / what
    if what == "file":
        place.write_text("")
    elif what == "empty":
        place.mkdir()
    done = subprocess.run(ranvier("page", place), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "plan.json" in done.stderr and "Traceback" not in done.stderr
