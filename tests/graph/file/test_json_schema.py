"""Offer editors a schema that accepts what the command accepts, and says what each key means."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ranvier.graph.file.json_schema import json_schema

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = sorted((REPOSITORY / "examples").rglob("*.yaml"))
CHECK = jsonschema.Draft202012Validator(json_schema())


def wrong(content: Any) -> list[str]:
    return [error.message for error in CHECK.iter_errors(content)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example(path: Path) -> None:
    """Accept every example."""
    assert wrong(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize("what", ["actor", "graph"])
def test_what_new_writes(what: str, tmp_path: Path) -> None:
    """Accept what `ranvier new` writes: a graph whose first line names the schema that lies beside it."""
    command = [sys.executable, "-m", "ranvier", "new", what, "mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "mine.yaml").read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=ranvier.schema.json"
    schema = json.loads((tmp_path / "ranvier.schema.json").read_text())
    assert schema == json_schema()
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(yaml.safe_load(text))) == []


def test_the_command_prints_it() -> None:
    """Print the schema, which is valid itself and names its dialect."""
    done = subprocess.run([sys.executable, "-m", "ranvier", "schema"], capture_output=True, text=True, timeout=60)
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"].startswith("https://json-schema.org/")


def test_every_key_says_what_it_means() -> None:
    """Describe every key of every section, and the kinds by name."""
    schema = json_schema()
    assert [place for place, key in keys(schema, "") if "description" not in key] == []
    kinds = schema["$defs"]["ActorSection"]["properties"]["kind"]["anyOf"][0]["enum"]
    assert {"embedding", "blocks", "head", "experts"} <= set(kinds)


def keys(schema: dict[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """Yield every key of a schema and of its sections."""
    for name, key in schema.get("properties", {}).items():
        yield f"{place}.{name}", key
    for name, section in schema.get("$defs", {}).items():
        yield from keys(section, name)


SMALL = {"ranvier": 1, "name": "small", "actors": {"a": {"kind": "embedding"}}}


@pytest.mark.parametrize(
    "change",
    [
        {"edges": ["a.x > b.y"]}, {"edges": ["a -> b"]}, {"edges": [{"from": "a.x"}]}, {"actors": {"A": {"kind": "head"}}},
        {"actors": {"a": {"kind": "heads"}}}, {"actors": {"a": {"kind": "../x.py:A"}}}, {"ranvier": 2}, {"actor": {}},
        {"actors": {"a": {"kind": "blocks", "layer": 3}}}, {"trace": {"sample": 2}},
    ],
)  # fmt: skip
def test_what_is_wrong(change: dict[str, Any]) -> None:
    """Refuse what the command refuses, too."""
    assert wrong(SMALL) == [] and wrong({**SMALL, **change})
