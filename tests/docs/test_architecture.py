"""Check that the page about the architecture names what there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
ROW = re.compile(r"^\| `([\w/.]+)` \| [^|]+\| ([^|]*)\|$", re.MULTILINE)


def test_the_rooms_stand_in_the_order_that_lint_checks() -> None:
    """List every room of the `layers` contract, the lowest first."""
    rooms = [f"ranvier.{room.removesuffix('/').removesuffix('.py').replace('/', '.')}" for room, _ in ROW.findall(PAGE)]
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        [contract] = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    assert rooms[::-1] == contract["layers"]


def test_each_room_lists_its_files() -> None:
    """Name every Python file in the row of its room, and no file that does not exist."""
    for room, files in ROW.findall(PAGE):
        if room.endswith(".py"):
            continue
        named = set(re.findall(r"`(\w+)`", files))
        existing = {path.stem for path in (REPOSITORY / room).glob("*.py")} - {"__init__"}
        assert named == existing, room


def test_every_file_that_is_named_exists() -> None:
    """Find every path that the page names."""
    named = set(re.findall(r"`((?:transport|actors|graph|tests)/[\w/.]+)`", PAGE))
    assert len(named) > 60
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []
