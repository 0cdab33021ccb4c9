"""The kinds that a graph file may name, as `ranvier actors` lists them."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

from ranvier.actors import kinds
from ranvier.actors.checkpoint import ModelConfig

_ANY = ModelConfig("any", 1, 1, 1, 1, 1, 1, 1, 1, 0.0, 0.0, None, True, experts=1, experts_per_token=1)


def entries() -> list[dict[str, Any]]:
    """Name, ports by side, keys of the graph file, and what it does, of every kind."""
    listed = []
    for kind in kinds.BUILT_IN.values():
        assert kind.ports_of is not None
        inputs, outputs = kind.ports_of(_ANY, "float32", (0, 0))
        keys = ["layers"] * kind.uses_layers + ["experts"] * kind.uses_experts + ["cache_tokens"] * kind.caches
        listed.append(_entry(kind.name, kind.implementation, inputs, outputs, keys))
    for entry in importlib.metadata.entry_points(group=kinds.ENTRY_POINTS):
        made = entry.load()
        listed.append(
            _entry(entry.name, entry.value, getattr(made, "inputs", {}), getattr(made, "outputs", {}), ["args"])
        )
    return listed


def _entry(name: str, implementation: str, inputs: Any, outputs: Any, keys: list[str]) -> dict[str, Any]:
    about = inspect.getdoc(kinds.load_class(implementation, None)) or ""
    return {
        "kind": name, "inputs": list(inputs), "outputs": list(outputs), "keys": keys,
        "about": " ".join(about.split("\n\n")[0].split()),
    }  # fmt: skip


def text(listed: list[dict[str, Any]]) -> str:
    """For people."""
    lines = []
    for entry in listed:
        lines.append(f"{entry['kind']}: {', '.join(entry['inputs'])} -> {', '.join(entry['outputs'])}")
        lines.append(f"    {entry['about']}")
        if entry["keys"]:
            lines.append(f"    keys: {', '.join(entry['keys'])}")
    lines.append(
        "./file.py:Class: an Actor or a torch.nn.Module of your own, with --allow-code; `ranvier new actor NAME`"
    )
    return "\n".join(lines)
