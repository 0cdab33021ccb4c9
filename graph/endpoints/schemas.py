"""Make grammars of JSON schemas, and of the calls of tools, in llguidance's notation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..bridge.problems import Problem
from .bodies import FunctionTool
from .tool_calls import Family

_COMBINED = (
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "$ref",
    "dependentSchemas",
    "patternProperties",
    "unevaluatedProperties",
)
"""Next to one of these, the properties that are listed are not all that there may be."""


def of_schema(schema: dict[str, Any] | None, param: str) -> dict[str, Any]:
    """Return a grammar of the JSON that a schema allows (see `closed`). `param` is the field that holds it.

    Raises:
        Problem: it is missing.
    """
    if schema is None:
        raise Problem(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    return {"json": closed(schema)}


def of_calls(functions: Sequence[FunctionTool], chosen: str | None, family: Family) -> dict[str, Any]:
    """Return a grammar of one call, of the chosen function or of any, as a family of templates writes it.

    Raises:
        Problem: there is no such function.
    """
    allowed = [each for each in functions if chosen in (None, each.name)]
    if not allowed:
        raise Problem(400, f"tool_choice: there is no tool {chosen!r:.80}", param="tool_choice", code="invalid_value")
    word = "parameters" if family.bare else "arguments"
    schemas = [
        {"type": "object", "properties": {"name": {"const": each.name}, word: _arguments(each)},
         "required": ["name", word], "additionalProperties": False}
        for each in allowed
    ]  # fmt: skip
    call = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    before, after = ("", "") if family.bare else (family.before, family.after)
    parts = [json.dumps(before)] if before else []
    parts += ["%json " + json.dumps({**call, "x-guidance": {"whitespace_pattern": r"[ \n\t]{0,16}"}})]
    parts += [json.dumps(after)] if after else []
    return {"lark": "start: " + " ".join(parts) + "\n"}


def _arguments(function: FunctionTool) -> dict[str, Any]:
    """Return the schema of a function's arguments. A function that lists none takes none."""
    given = closed(function.parameters or {"type": "object"})
    listed = {"properties", "additionalProperties", *_COMBINED}
    return given if listed & given.keys() else {**given, "properties": {}, "additionalProperties": False}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose objects have no other properties than those that it lists.

    JSON Schema allows any others, and a model then invents them without an end. An object stays open if it says so itself, or
    if the schema combines several into one (`allOf`).
    """
    return schema if _has_all_of(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(name), dict):
            made[name] = {key: _closed(value) for key, value in schema[name].items()}
    for name in ("items", "prefixItems", "anyOf", "oneOf", "additionalProperties"):
        if name in schema:
            made[name] = _closed(schema[name])
    if isinstance(schema.get("properties"), dict) and not any(name in schema for name in _COMBINED):
        made.setdefault("additionalProperties", False)
    return made


def _has_all_of(schema: Any) -> bool:
    if isinstance(schema, dict):
        return "allOf" in schema or any(map(_has_all_of, schema.values()))
    return isinstance(schema, list) and any(map(_has_all_of, schema))
