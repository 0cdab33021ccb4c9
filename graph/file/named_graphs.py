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
    return FOLDER / f"{text}.yaml" if str(text) in names() and not path.is_file() else path


def folder_of(path: Path) -> Path:
    """Return where the relative paths of a graph file begin: its folder; the working directory for one of Ranvier's own."""
    return Path() if path.parent == FOLDER else path.parent
