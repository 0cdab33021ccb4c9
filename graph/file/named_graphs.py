"""Find the graphs that come with Ranvier, and are named instead of a file: `ranvier run smollm2`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "graphs"


def names() -> list[str]:
    """Return the names of the graphs that come with Ranvier."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def file_of(text: str | Path) -> Path:
    """Return the graph file that a user names: a path, or the name of a graph that comes with Ranvier.

    A file of that name in the working directory goes first.
    """
    path = Path(text)
    return FOLDER / f"{text}.yaml" if str(text) in names() and not path.exists() else path
