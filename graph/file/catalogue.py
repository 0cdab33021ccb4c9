"""List the kinds that a graph file may name, for `ranvier actors`."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Mapping
from typing import Any

from ranvier.actors.checkpoint import ModelConfig
from ranvier.actors.component import kinds
from ranvier.transport.format.tensor_spec import TensorSpec

_NAMED = {7919: "hidden", 7907: "vocab", 2: "choices"}
"""The made-up sizes of `_ANY`, and the dimensions that they stand for. No other dimension has these sizes."""
_ANY = ModelConfig(
    "any", 7907, 7919, 1, 1, 1, 1, 1, 1, 1e-6, 10000.0, None, True, experts=2, experts_per_token=2
)  # fmt: skip


def entries() -> list[dict[str, Any]]:
    """Return every kind: its name, its ports with specs, its arguments, its graph-file keys and what it does.

    A kind that cannot be loaded has the reason under `error`.
    """
    listed = []
    for kind in kinds.BUILT_IN.values():
        assert kind.ports_of is not None
        inputs, outputs = (_ports(ports) for ports in kind.ports_of(_ANY, "float32", (0, 1)))
        inputs = {port: f"{spec} once per session" if port in kind.once else spec for port, spec in inputs.items()}
        keys = ["layers"] * kind.uses_layers + ["experts"] * kind.uses_experts + ["cache_tokens"] * kind.caches
        listed.append(_entry(kind.name, inputs, outputs, keys, {}, kinds.load_class(kind.implementation, None)))
    for entry in importlib.metadata.entry_points(group=kinds.ENTRY_POINTS):
        try:
            listed.append(_installed(entry.name, kinds.load_class(entry.value, None)))
        except Exception as error:  # another package's code may raise anything; the other kinds are still listed
            about = f"{type(error).__name__}: {error}"
            listed.append({
                "kind": entry.name, "inputs": {}, "outputs": {}, "args": {}, "keys": [], "about": "", "error": about
            })  # fmt: skip
    return listed


def _installed(name: str, made: type[Any]) -> dict[str, Any]:
    if not kinds.is_module(made):
        inputs = {
            port: f"{spec} once per session" if port in made.once else str(spec) for port, spec in made.inputs.items()
        }
        return _entry(name, inputs, _ports(made.outputs), ["args"], dict(made.args), made)
    from ranvier.actors.component import module

    found = dict.fromkeys(module.inputs_of(made), "as its edges say")
    made_with = list(inspect.signature(made).parameters.values())
    args = {p.name: "required" if p.default is p.empty else f"{p.default!r} if it is not given" for p in made_with}
    return _entry(name, found, {"...": "what its forward returns"}, ["args", "inputs", "weights"], args, made)


def _ports(ports: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return specs by port name. Ports that are numbered by expert become one entry, `expertN`."""
    texts = {}
    for name, spec in ports.items():
        shape = tuple(_NAMED.get(dim, dim) if isinstance(dim, int) else dim for dim in spec.shape)
        dtype = "dtype" if shape == ("tokens", "hidden") else spec.dtype  # the model's dtype
        if re.fullmatch(r"expert[1-9]\d*", name) is None:
            texts["expertN" if name == "expert0" else name] = f"{dtype}[{', '.join(map(str, shape))}]"
    return texts


def _entry(
    name: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    keys: list[str],
    args: Mapping[str, str],
    made: Any,
) -> dict[str, Any]:
    about = (inspect.getdoc(made) or "").split("\n\n")[0]
    return {
        "kind": name, "inputs": inputs, "outputs": outputs, "args": args, "keys": keys, "about": " ".join(about.split()),
    }  # fmt: skip


def text(listed: list[dict[str, Any]]) -> str:
    """Return the list as text for people."""
    lines = []
    for entry in listed:
        lines.append(f"{entry['kind']}: {', '.join(entry['inputs'])} -> {', '.join(entry['outputs'])}")
        if "error" in entry:
            lines.append(f"    cannot be loaded: {entry['error']}")
            continue
        lines.append(f"    {entry['about']}")
        lines += [f"    in   {port}: {spec}" for port, spec in entry["inputs"].items()]
        lines += [f"    out  {port}: {spec}" for port, spec in entry["outputs"].items()]
        lines += [f"    args {key}: {what}" for key, what in entry["args"].items()]
        if entry["keys"]:
            lines.append(f"    keys: {', '.join(entry['keys'])}")
    lines.append("./file.py:Class: a custom Actor or torch.nn.Module, with --allow-code; see `ranvier new actor NAME`")
    return "\n".join(lines)
