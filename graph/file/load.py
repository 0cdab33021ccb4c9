"""Convert the bytes of a graph file to plain data, with a position for every key and value.

The YAML is composed into nodes, so line and column are known. Size and depth are bounded. Tags, aliases and duplicate
keys make YAML dangerous or surprising, so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ranvier.transport.files import regular

from .errors import GraphError, Position, Problem

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 20
TOO_DEEP = f"is nested over {MAX_DEPTH} levels deep; a graph file needs 5"
Path_ = tuple[str | int, ...]
START = Position(1, 1)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SCALARS = {
    "tag:yaml.org,2002:int": "construct_yaml_int",
    "tag:yaml.org,2002:float": "construct_yaml_float",
    "tag:yaml.org,2002:bool": "construct_yaml_bool",
    "tag:yaml.org,2002:null": "construct_yaml_null",
}


@dataclass(slots=True)
class Document:
    """Hold plain data (dicts, lists, scalars) and the position of each part.

    `keys` holds the positions of a mapping's keys, and `values` those of the values, both by path from the root.
    `overridden` holds the paths that were set on the command line.
    """

    file: str
    data: Any = None
    keys: dict[Path_, Position] = field(default_factory=dict)
    values: dict[Path_, Position] = field(default_factory=dict)
    overridden: set[Path_] = field(default_factory=set)

    def at(self, *path: str | int) -> Position:
        """Return the position of the value at `path`, or of the nearest value around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.values:
                return self.values[path[:length]]
        return START

    def at_key(self, *path: str | int) -> Position:
        """Return the position of the key at `path`. If there is no such key, return that of its value."""
        return self.keys.get(path) or self.at(*path)


def read(path: Path, overrides: Mapping[str, str] | None = None) -> Document:
    """Read a graph file.

    Args:
        overrides: values by dotted key (`model.dtype`), as YAML text. They replace the file's values.

    Raises:
        GraphError: the file cannot be read, is not YAML, or uses a YAML feature that is refused.
    """
    document = Document(str(path))
    try:
        with regular(path).open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _fail(document, START, f"cannot be read: {error.strerror}; check the path") from None
    if len(text) > MAX_FILE_BYTES:
        raise _fail(document, START, f"is over {MAX_FILE_BYTES} bytes; a graph file is small, weights belong elsewhere")
    document.data = _parse(document, text)
    for key, value in (overrides or {}).items():
        _override(document, key, value)
    if not isinstance(document.data, dict):
        what = "is empty" if document.data is None else f"holds {_kind(document.data)}"
        raise _fail(document, document.at(), f"{what}; expected keys such as ranvier, name, actors, edges")
    return document


def _parse(document: Document, text: bytes) -> Any:
    try:
        _scan(document, text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = _place(mark) if mark else START
        if "nesting depth" in str(error.problem):  # PyYAML from 6.0.4 on reads ahead, and has its own limit
            raise _fail(document, at, TOO_DEEP) from None
        raise _fail(document, at, f"is not YAML: {error.problem or error.context}; fix the syntax here") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _fail(document, START, f"is not YAML: {str(error).splitlines()[0]}; expected UTF-8 text") from None
    return None if node is None else _convert(document, node, ())


def _scan(document: Document, text: bytes) -> None:
    """Refuse dangerous YAML before it is composed. Events come one by one, so depth needs no recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        at = _place(event.start_mark)
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            raise _fail(document, at, f"alias *{anchor} is refused; write the value out")
        if anchor:
            raise _fail(document, at, f"anchor &{anchor} is refused; write the value out where it is needed")
        if tag:
            raise _fail(document, at, f"tag {tag} is refused; write plain YAML")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _fail(document, at, TOO_DEEP)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _convert(document: Document, node: yaml.Node, path: Path_) -> Any:
    document.values[path] = _position(node)
    if isinstance(node, yaml.MappingNode):
        return _mapping(document, node, path)
    if isinstance(node, yaml.SequenceNode):
        return [_convert(document, item, (*path, index)) for index, item in enumerate(node.value)]
    return _scalar(document, node)


def _mapping(document: Document, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key_node, value_node in node.value:
        at = _position(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise _fail(document, at, "a key is a list or a mapping; expected a word")
        key = key_node.value
        if key in made:
            first = document.keys[*path, key]
            raise _fail(document, at, f"key {key!r} is listed twice (first in line {first.line}); remove one")
        document.keys[*path, key] = at
        made[key] = _convert(document, value_node, (*path, key))
    return made


def _scalar(document: Document, node: yaml.Node) -> Any:
    construct = _SCALARS.get(node.tag)
    if construct is None:
        return node.value
    try:
        return getattr(_CONSTRUCTOR, construct)(node)
    except ValueError as error:
        raise _fail(document, _position(node), f"{node.value!r}: {error}; put it in quotes if it is text") from None


_CONSTRUCTOR = yaml.constructor.SafeConstructor()


def _override(document: Document, key: str, value: str) -> None:
    path = tuple(key.split("."))
    at = Position(0, 0)
    target = document.data
    for part in path[:-1]:
        if not isinstance(target, dict) or not isinstance(target.setdefault(part, {}), dict):
            raise _fail(document, at, f"--set {key}={value}: {part!r} holds no keys; give a dotted key of the file")
        target = target[part]
    if not isinstance(target, dict):
        raise _fail(document, at, f"--set {key}={value}: the file holds no keys")
    part_document = Document(document.file)
    target[path[-1]] = _parse(part_document, value.encode())
    document.values[path] = document.keys[path] = at
    document.overridden.add(path)


def _position(node: yaml.Node) -> Position:
    return _place(node.start_mark)


def _place(mark: Any) -> Position:
    """Convert a PyYAML mark, which counts from 0, to a position, which counts from 1."""
    return Position(mark.line + 1, mark.column + 1)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _fail(document: Document, at: Position, what: str) -> GraphError:
    return GraphError(document.file, [Problem(what, at)])
