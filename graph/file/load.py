"""Convert the bytes of a graph file, or data of Python, to plain data with a position for every key and value.

The YAML is composed into nodes, so line and column are known. Size and depth are bounded. Tags, aliases and duplicate
keys make YAML dangerous or surprising, so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from ranvier.transport.files import regular

from .errors import GraphError, Position, Problem

MAX_FILE_BYTES = 1 << 20
IN_PYTHON = "graph"
"""It stands for the file's name in errors of a graph that is written in Python."""
MAX_DEPTH, MAX_KEY = 20, 1000
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
    `trusted` holds the paths of values that the user of this process gave, on the command line or in Python. `text` is what was
    read.
    """

    file: str
    text: bytes = b""
    data: Any = None
    keys: dict[Path_, Position] = field(default_factory=dict)
    values: dict[Path_, Position] = field(default_factory=dict)
    trusted: set[Path_] = field(default_factory=set)

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
            document.text = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the path has a NUL
        what = error.strerror if isinstance(error, OSError) else error
        raise _fail(document, START, f"cannot be read: {what}; check the path") from None
    if len(document.text) > MAX_FILE_BYTES:
        raise _fail(document, START, f"is over {MAX_FILE_BYTES} bytes; a graph file is small, weights belong elsewhere")
    document.data = _parse(document, document.text)
    return _with(document, overrides or {})


def of_data(data: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Document:
    """Convert plain data of Python, as `read` converts a file. Positions say the key instead of line and column.

    Raises:
        GraphError: the data holds something that a graph file cannot hold.
    """
    document = Document(IN_PYTHON)
    document.text = _dumped(dict(data), Position(1, 1, "data")).encode()
    document.data = _parse(document, document.text)
    for positions in (document.keys, document.values):
        for path, at in positions.items():
            positions[path] = Position(at.line, at.column, ".".join(map(str, path)))
    document.trusted.update(document.values)
    return _with(document, overrides or {})


def as_setting(key: str, value: Any) -> str:
    """Return a value of `overrides` as YAML text; a text is YAML already.

    Raises:
        GraphError: the value cannot stand in a graph file.
    """
    at = Position(0, 0, f"setting {key:.200}")
    if not isinstance(value, str):
        return _dumped(value, at)
    _encoded(value, at)
    return value


def _dumped(value: Any, at: Position) -> str:
    """Return plain data as YAML text. A path becomes text, and a tuple a list.

    Raises:
        GraphError: the data holds something else, or itself.
    """
    try:
        text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    except yaml.representer.RepresenterError as error:
        what = f"holds {_kind(error.args[1])}; give text, numbers, lists and dicts"
        raise _fail(Document(IN_PYTHON), at, what) from None
    except RecursionError:
        raise _fail(Document(IN_PYTHON), at, TOO_DEEP) from None
    _encoded(text, at)
    return text.removesuffix("...\n").rstrip("\n")  # a scalar alone ends with dots


def _encoded(text: str, at: Position) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _fail(Document(IN_PYTHON), at, f"holds text that is not Unicode: {error.reason}") from None


class _Dumper(yaml.SafeDumper):
    """Write every value out where it stands."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))
for _refused in (bytes, set):  # they would become tags
    _Dumper.add_representer(_refused, yaml.SafeDumper.represent_undefined)


def _with(document: Document, overrides: Mapping[str, str]) -> Document:
    """Set the values of `overrides`."""
    for key, value in overrides.items():
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
    at = Position(0, 0, f"setting {key:.200}={value:.200}")
    path: Path_ = ()
    target: Any = document.data
    if not isinstance(target, dict):
        raise _fail(document, at, "the file holds no keys")
    *through, last = parts = _keys(key)
    if len(parts) > MAX_DEPTH or len(key) > MAX_KEY or not all(parts):
        raise _fail(document, at, "is no key of a graph file; give keys with dots between them, such as model.dtype")
    for part in through:
        step = _step(document, at, target, part, create=True)
        path, target = (*path, step), target[step]
        document.values.setdefault(path, at)
    if isinstance(target, str) and path[:-1] == ("edges",):
        target = document.data["edges"][path[-1]] = spelled_out(target)
    holds_keys = isinstance(target, dict | list)
    if not holds_keys:
        raise _fail(document, at, f"{through[-1]!r} holds no keys; give a dotted key of the file")
    last_step = _step(document, at, target, last, create=False)
    try:
        target[last_step] = _parse(Document(document.file), value.encode())
    except GraphError as error:
        raise GraphError(document.file, [Problem(problem.what, at) for problem in error.problems]) from None
    path = (*path, last_step)
    document.values[path] = document.keys[path] = at
    document.trusted.add(path)


def _keys(key: str) -> list[str]:
    """Split `edges[lower.hidden->upper.hidden].codec` at the dots outside the brackets."""
    parts, bracket = [""], False
    for letter in key[: MAX_KEY + 1]:
        if letter == "[" and not bracket:
            parts.append("")
        bracket = letter == "[" or (bracket and letter != "]")
        if letter == "." and not bracket:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _step(document: Document, at: Position, target: Any, part: str, *, create: bool) -> str | int:
    """Return the key or the index of a part of a dotted key. `create` makes what is missing on the way."""
    if isinstance(target, dict) and not part.startswith("["):
        if target is document.data and part == "edges" and create:
            target.setdefault(part, [])
        elif create and not isinstance(target.setdefault(part, {}), dict | list):
            raise _fail(document, at, f"{part!r} holds no keys; give a dotted key of the file")
        return part
    if not isinstance(target, list):
        raise _fail(document, at, f"{part!r} is no key here; give a dotted key of the file")
    if part.startswith("["):
        if "->" not in part:
            raise _fail(document, at, f"{part!r} is no edge; write edges[actor.port->actor.port]")
        return _edge(target, part)
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(target):
        what = f"{len(target)} entries, numbered from 0" if target else "no entries"
        raise _fail(document, at, f"{part!r} is no entry: the list has {what}")
    return int(part)


def _edge(edges: list[Any], name: str) -> int:
    """Return the index of the edge `[from->to]`. An edge that a `pipeline` makes is listed from then on."""
    wanted = spelled_out(name.strip("[]"))
    for index, edge in enumerate(edges):
        listed = spelled_out(edge) if isinstance(edge, str) else edge
        if isinstance(listed, dict) and all(listed.get(end) == wanted[end] for end in wanted):
            return index
    edges.append(wanted)
    return len(edges) - 1


def spelled_out(edge: str) -> dict[str, Any]:
    """Return the long form of an edge that is written as `from -> to`."""
    source, _, target = edge.partition("->")
    return {"from": source.strip(), "to": target.strip()}


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
