"""Follow the tutorial and the other pages literally: every command, script and file of them, with real processes."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pages import blocks, compare, run

from ranvier.graph.file.json_schema import json_schema
from ranvier.graph.run import chaos

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
TUTORIAL = sorted((DOCS / "tutorial").glob("*.md"))
QUICK = "4567"
"""The pages of the tutorial that take some ten seconds; the others take half a minute each."""
OTHERS = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES = [page for page in OTHERS if any(block.language in ("console", "python") for block in blocks(page))]
LEFT_OUT = shutil.ignore_patterns("ranvier-runs", "trained", "__pycache__", "*.safetensors", "corpus.txt")


@pytest.fixture
def place() -> Iterator[Path]:
    """Provide a folder with the examples, as a reader of the repository has them."""
    folder = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))
    shutil.copytree(REPOSITORY / "examples", folder / "examples", ignore=LEFT_OUT)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem[0] not in QUICK)) for page in TUTORIAL],
    ids=lambda page: page.stem,
)
def test_a_page_of_the_tutorial(page: Path, place: Path) -> None:
    """Do what the page says, in a folder of its own, and see what it says that one sees."""
    assert run(page, place) >= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_another_page(page: Path, place: Path) -> None:
    """Do the same for README and for pages beside the tutorial."""
    run(page, place)


def optional(schema: Any) -> Any:
    """Return a schema without keys that must be there: a page may show a part of a section."""
    if isinstance(schema, list):
        return [optional(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: optional(value) for key, value in schema.items() if key != "required" or not isinstance(value, list)}


def parts() -> list[Any]:
    found = []
    for page in [*TUTORIAL, *OTHERS]:
        for block in blocks(page):
            if block.language in ("yaml", "json"):
                found.append(pytest.param(block.body, id=f"{page.stem}:{block.line}"))
    return found


@pytest.mark.parametrize("text", parts())
def test_a_part_of_a_graph_file(text: str, tmp_path: Path) -> None:
    """Hold only keys that the schema of graph files knows, with values that it accepts."""
    schema = optional(json_schema())
    content = yaml.safe_load(text)
    assert isinstance(content, dict) and content
    if content.keys() == {"links"}:  # faults for `ranvier run --chaos`
        (tmp_path / "chaos.yaml").write_text(text)
        assert chaos.read(tmp_path / "chaos.yaml")
        return
    for key, value in content.items():
        assert key in schema["properties"], key
        jsonschema.validate(value, {"$defs": schema["$defs"], **schema["properties"][key]})


def test_the_tutorial_goes_from_page_to_page() -> None:
    """Link each page to the next one, and call it by its name."""
    assert len(TUTORIAL) == 9
    for page, following in itertools.pairwise(TUTORIAL):
        assert re.search(rf"^Next: \[.+\]\({following.name}\)\.$", page.read_text(), re.M), page.name


def test_blocks_that_no_test_would_run() -> None:
    """Let no page have blocks of a language that is not run, nor one that is not closed."""
    for page in [*TUTORIAL, *OTHERS]:
        text = page.read_text()
        assert text.count("\n```") % 2 == 0, page
        known = {"console", "python", "yaml", "json", "toml", "text", "mermaid", "sql"}
        assert {block.language for block in blocks(page)} <= known, page


def test_comparing() -> None:
    """Let numbers differ, and nothing else, except where the page says `…`."""
    compare("", ["a 1.5 b", "…", "end"], "a 27  b\nx\ny\nend\n")
    compare("", ["run-20260101-000000-aaaa is …"], "run-20270202-111111-bbbb is there\n")
    for expected, said in (
        (["a"], "b\n"),
        (["a"], "a\nb\n"),
        (["…", "c"], "a\nb\n"),
        (["a", "b"], "a\n"),
        (["a … c"], "a b\n"),
    ):
        with pytest.raises(AssertionError):
            compare("", expected, said)


def test_a_page_that_lies(tmp_path: Path) -> None:
    """Find a command that fails, output that differs, and a script that raises."""
    for text, words in (
        ("```console\n$ false\n```\n", "ended with 1"),
        ("```console\n$ echo 1 two\n1 three\n```\n", "expected '1 three'"),
        ("```python\nprint(1 / 0)\n```\n", "ZeroDivisionError"),
        ("```python\nprint('a')\n```\n\n```text\nb\n```\n", "expected 'b'"),
        ("<!-- exit: 3 -->\n```console\n$ exit 3\n```\n", "the shell ended"),
        ("<!-- not run: why -->\n```console\n$ x\n```\n", "say why"),
    ):
        (tmp_path / "page.md").write_text(text)
        with pytest.raises(AssertionError, match=words):
            run(tmp_path / "page.md", tmp_path)
    (tmp_path / "page.md").write_text(
        '```json title="a/b.json"\n{"x": 1}\n```\n<!-- exit: 3 -->\n```console\n$ cat a/b.json \\\n    a/b.json\n{"x": 1}\n'
        '{"x": 2}\n$ (exit 3)\n```\n'
    )
    assert run(tmp_path / "page.md", tmp_path) == 2
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1}
