"""Make the JSON Schema of the graph file, for editors: what pydantic knows of the keys, and the short forms that we add."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from ranvier.actors.component import kinds

from .schema import GraphFile

DIALECT = "https://json-schema.org/draft/2020-12/schema"
EDGE = r"^\s*[a-z][a-z0-9_]{0,30}\.[a-z][a-z0-9_]{0,60}\s*->\s*[a-z][a-z0-9_]{0,30}\.[a-z][a-z0-9_]{0,60}\s*$"
OWN_KIND = r"^\./.+\.py:[A-Za-z_]\w*$"


def json_schema() -> dict[str, Any]:
    """Return the schema. Every key has a description, and kinds are those that are built in or installed."""
    made: dict[str, Any] = {"$schema": DIALECT, **GraphFile.model_json_schema(by_alias=True)}
    edges = made["properties"]["edges"]
    edges["items"] = {
        "anyOf": [{"type": "string", "pattern": EDGE, "description": "actor.port -> actor.port"}, edges["items"]]
    }
    made["properties"]["actors"]["additionalProperties"] = False
    made["$defs"]["ActorSection"]["properties"]["kind"] = _kind(made["$defs"]["ActorSection"]["properties"]["kind"])
    return made


def _kind(by_pydantic: dict[str, Any]) -> dict[str, Any]:
    installed = [entry.name for entry in importlib.metadata.entry_points(group=kinds.ENTRY_POINTS)]
    return {
        "title": by_pydantic["title"], "description": by_pydantic["description"],
        "anyOf": [
            {"enum": [*kinds.BUILT_IN, *installed]},
            {"type": "string", "pattern": OWN_KIND, "description": "a class in a file of the graph's folder"},
        ],
    }  # fmt: skip
