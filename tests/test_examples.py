"""Everything in examples/ runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TESTED = {"smollm2.yaml", "smollm2-one.yaml", "smollm2-tcp.yaml", "three_sessions.py"}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == TESTED


@pytest.mark.parametrize("name", ["smollm2-one.yaml", "smollm2-tcp.yaml"])
def test_a_graph_answers(name: str, runs: Path) -> None:
    """(smollm2.yaml itself is run by the tests of the command.)"""
    done = subprocess.run(
        [sys.executable, "-m", "ranvier.graph.cli", "run", str(EXAMPLES / name), "--json", "--runs", str(runs),
         "--prompt", "What is the capital of France?"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["text"] == "The capital of France is Paris."
    edges = {edge["edge"] for edge in told["trace"]["edges"]}
    assert ("lower.hidden -> upper.hidden" in edges) == (name == "smollm2-tcp.yaml")


def test_three_sessions_at_once(runs: Path) -> None:
    """Run from another folder, as a user may; the run folder lands there."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "three_sessions.py")], cwd=runs, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for prompt in ("Name three colours.", "What is two plus two?", "Say hello in French."):
        assert prompt in done.stdout
    assert "Bonjour" in done.stdout
    assert len(list((runs / "ranvier-runs").iterdir())) == 1
