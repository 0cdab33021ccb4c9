"""Every bad graph file in cases/ gives the words that stand beside it, with their place, and starts nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranvier

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_case(case: Path) -> None:
    """Each line of the expected words is in the message, in order; every line names file, line and column."""
    with pytest.raises(ranvier.GraphError) as caught:
        ranvier.load(case, allow_code=case.stem.startswith(("kind_", "actor_")))
    message = str(caught.value)
    lines = message.splitlines()
    for line in lines:
        assert line.startswith(f"{case}:")
    expected = case.with_suffix(".txt").read_text().splitlines()
    assert expected, "a case must say what it expects"
    for words in expected:
        assert any(words in line for line in lines), f"expected {words!r} in\n{message}"


def test_there_are_cases() -> None:
    assert len(CASES) > 50


def test_a_file_too_large(tmp_path: Path) -> None:
    """10 MB are not even parsed."""
    big = tmp_path / "big.yaml"
    big.write_bytes(b"# " + b"x" * 10_000_000)
    with pytest.raises(ranvier.GraphError, match="is over 1048576 bytes"):
        ranvier.load(big)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ranvier.GraphError, match="cannot be read: No such file"):
        ranvier.load(tmp_path / "nothing.yaml")


def test_code_needs_leave() -> None:
    """Code of the graph's own folder is not imported unless the user says so."""
    with pytest.raises(ranvier.GraphError, match="pass --allow-code if you trust it"):
        ranvier.load(Path(__file__).parent / "cases" / "actor_nobody_reaches.yaml")


def test_tags_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 27's canary is not touched."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ranvier.GraphError):
        ranvier.load(Path(__file__).parent / "cases" / "27_python_object.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.dtyp", "float32", "unknown key 'dtyp'; did you mean 'dtype'?"),
        ("model.dtype", "float31", "0:0: model.dtype"),
        ("name.x", "1", "'name' holds no keys"),
        ("model.source", "../nowhere", "no such file or folder"),
    ],
)
def test_settings_of_the_command_line_are_checked_too(key: str, value: str, words: str) -> None:
    good = Path(__file__).parent.parent.parent / "examples" / "smollm2.yaml"
    with pytest.raises(ranvier.GraphError, match="(?s)" + words.replace("?", r"\?")):
        ranvier.load(good, overrides={key: value})
