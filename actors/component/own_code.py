"""Import the Python files of a graph's own folder.

A file is a module of a package that represents its folder, so `from .helper import x` works with or without an `__init__.py`.
Other files of the folder can also be imported by their plain names (`import helper`). Python searches the folder last, so no
file in it can replace an installed module or a module of Python itself. A file is imported once, even if it has several
actors, and again after it has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_known: dict[Path, tuple[tuple[int, int], ModuleType]] = {}
_on_path: list[str] = []


def module(path: Path) -> ModuleType:
    """Import the file at the absolute `path`, or return its module if the file has not changed.

    Raises:
        Exception: whatever the file raises.
    """
    status = path.stat()
    version = status.st_mtime_ns, status.st_size
    if path in _known and _known[path][0] == version:
        return _known[path][1]
    _look_in(path.parent)
    package = _package(path.parent)
    made = _executed(f"{package.__name__}.{path.stem}", path)
    _known[path] = version, made
    return made


def _look_in(folder: Path) -> None:
    """Make this folder's modules importable by their plain names, instead of those of another graph's folder."""
    if _on_path == [str(folder)]:
        return
    for other in _on_path:
        sys.path.remove(other)
        for name in [name for name, module in sys.modules.items() if _lies_in(module, Path(other))]:
            if not name.startswith(_PREFIX):
                del sys.modules[name]
    _on_path[:] = [str(folder)]
    sys.path.append(str(folder))


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).parent == folder


_PREFIX = "ranvier_graph_code_"


def _package(folder: Path) -> ModuleType:
    """Return the package that represents a folder: its `__init__.py`, or an empty package if there is none."""
    name = _PREFIX + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if name in sys.modules:
        return sys.modules[name]
    init = folder / "__init__.py"
    if init.is_file():
        return _executed(name, init, [str(folder)])
    made = ModuleType(name)
    made.__path__ = [str(folder)]
    sys.modules[name] = made
    return made


def _executed(name: str, path: Path, folders: list[str] | None = None) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = made
    try:
        spec.loader.exec_module(made)
    except BaseException:
        if before is not None:
            sys.modules[name] = before
        else:
            del sys.modules[name]
        raise
    return made
