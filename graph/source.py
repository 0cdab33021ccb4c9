"""Where `model: source:` points: a path inside the graph's folder, or a file of an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ranvier.transport.errors import RanvierError


class SourceError(RanvierError):
    """A source that does not exist or may not be used."""


def resolve(source: str, folder: Path, trusted: bool = False) -> Path:
    """The path of a source.

    Args:
        source: as in the graph file.
        folder: the graph file's own folder; nothing outside it is opened.
        trusted: the user gave it on the command line, so any path will do.

    Raises:
        SourceError: it may not be used, or is not there.
    """
    scheme, separator, place = source.partition("://")
    if separator and scheme == "package":
        return _package(source, place)
    if separator:
        raise SourceError(
            f"source {source!r}: unknown scheme {scheme!r}; use package://NAME/FILE or a path such as ./folder"
        )
    path = (folder / source).resolve()
    if not trusted:
        if Path(source).is_absolute() or ".." in Path(source).parts:
            raise SourceError(
                f"source {source!r} leaves the graph's folder; give it by --set model.source=PATH if you mean it"
            )
        if not path.is_relative_to(folder.resolve()):
            raise SourceError(
                f"source {source!r} is a link out of the graph's folder; give it by --set model.source=PATH if you mean it"
            )
    if not path.exists():
        raise SourceError(f"source {source!r}: no such file or folder; looked in the graph's folder")
    return path


def _package(source: str, place: str) -> Path:
    name, _, file = place.partition("/")
    if not name.isidentifier() or not file:
        raise SourceError(f"source {source!r}: expected package://NAME/FILE")
    spec = importlib.util.find_spec(name)  # finds, does not import
    if spec is None or spec.origin is None:
        raise SourceError(f"source {source!r}: no package {name!r} is installed; pip install it")
    root = Path(spec.origin).parent.resolve()
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise SourceError(f"source {source!r} leaves the package's folder")
    if not path.exists():
        raise SourceError(f"source {source!r}: the package {name!r} has no such file")
    return path
