"""Refuse every bad graph file in cases/ with the message beside it and its position, and start nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ranvier
from ranvier.transport.wires.endpoint import MAX_PATH_BYTES

CASES = sorted((Path(__file__).parents[1] / "cases").glob("*.yaml"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_case(case: Path) -> None:
    """Report every expected message, and begin every line with the file and a position."""
    with pytest.raises(ranvier.GraphError) as caught:
        ranvier.load(case, allow_code=case.stem.startswith(("kind_", "actor_")))
    message = str(caught.value)
    lines = message.splitlines()
    for line in lines:
        assert line.startswith(f"{case}:")
    expected = case.with_suffix(".txt").read_text().splitlines()
    assert expected, "a case must say what it expects"
    for words in expected:
        words = words.replace("at most 107 are", f"at most {MAX_PATH_BYTES} are")
        assert any(words in line for line in lines), f"expected {words!r} in\n{message}"


def test_there_are_cases() -> None:
    """Find more than 50 bad graph files."""
    assert len(CASES) > 50


def test_a_file_too_large(tmp_path: Path) -> None:
    """Refuse a file of 10 MB without parsing it."""
    big = tmp_path / "big.yaml"
    big.write_bytes(b"# " + b"x" * 10_000_000)
    with pytest.raises(ranvier.GraphError, match="is over 1048576 bytes"):
        ranvier.load(big)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Report a file that does not exist."""
    with pytest.raises(ranvier.GraphError, match="cannot be read: No such file"):
        ranvier.load(tmp_path / "nothing.yaml")


def test_code_needs_leave() -> None:
    """Import no code from the graph's folder unless the user allows it."""
    with pytest.raises(ranvier.GraphError, match="pass --allow-code if you trust it"):
        ranvier.load(Path(__file__).parents[1] / "cases" / "actor_nobody_reaches.yaml")


def test_tags_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run nothing for a YAML tag (case 27)."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ranvier.GraphError):
        ranvier.load(Path(__file__).parents[1] / "cases" / "27_python_object.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.dtyp", "float32", "unknown key 'dtyp'; did you mean 'dtype'?"),
        ("model.dtype", "float31", "setting model.dtype=float31: model.dtype: Input should be"),
        ("name.x", "1", "'name' holds no keys"),
        ("model.source", "../nowhere", "no such file or folder"),
    ],
)
def test_settings_of_the_command_line_are_checked_too(key: str, value: str, words: str) -> None:
    """Check settings of the command line like those of the file."""
    good = Path(__file__).resolve().parents[3] / "examples" / "smollm2.yaml"
    with pytest.raises(ranvier.GraphError, match="(?s)" + words.replace("?", r"\?")):
        ranvier.load(good, overrides={key: value})


def test_a_model_of_the_hub_from_its_cache(
    tiny: Any, graph_file: Callable[..., Path], tmp_path: Path, split: Any
) -> None:
    """Find an `hf://` model offline in the hub's cache, and report a model that the cache lacks."""
    folder, _ = tiny("plain")
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--tiny-llama" / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    refs = cache / "models--someone--tiny-llama" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abcd")
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    for source, code, words in (
        ("hf://someone/tiny-llama", 0, "good: 4 processes"),
        ("hf://someone/other", 2, "source 'hf://someone/other': not in the cache, and cannot be fetched"),
        ("hf://someone", 2, "expected hf://ORG/NAME"),
        ("hf://../../etc", 2, "expected hf://ORG/NAME"),
    ):
        path = graph_file(model={"source": source}, **split(4, 6))
        done = subprocess.run(
            [sys.executable, "-m", "ranvier", "check", str(path)],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
