"""Run plain torch modules that read values or take gradients, and compare them with the modules alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ranvier

CODE = Path(__file__).parents[1] / "custom" / "own_autograd.py"
X = {"inputs": {"x": "float32[tokens, 4]"}}


def own() -> Any:
    spec = importlib.util.spec_from_file_location("own_autograd", CODE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("host", [None, "both"])
def test_modules_that_read_values_and_take_gradients(host: str | None, runs: Path, tmp_path: Path) -> None:
    """Give the numbers of the modules alone, in processes of their own and in one that they share."""
    code = own()
    torch.manual_seed(3)
    scaled, force = code.Scaled(), code.Force()
    for name, module in (("scaled", scaled), ("force", force)):
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    (tmp_path / CODE.name).write_text(CODE.read_text())
    shared = {"host": host} if host else {}
    graph = ranvier.Graph(
        actors={
            "scaled": {"kind": f"./{CODE.name}:Scaled", "weights": "./scaled.safetensors", **X, **shared},
            "force": {"kind": f"./{CODE.name}:Force", "weights": "./force.safetensors", **shared},
        },
        edges=["gateway.x -> scaled.x", "scaled.output -> force.x", "force.force -> gateway.force"],
        folder=tmp_path, allow_code=True,
    )  # fmt: skip
    assert [actor.own_autograd for actor in graph.actors.values()] == [False, True]
    assert graph.actors["scaled"].module_bytes == 80
    x = torch.randn(3, 4)
    with ranvier.start(graph, runs=runs) as run:
        found = [run.call(x=x)["force"] for _ in range(2)]
    wanted = force(scaled(x).detach())["force"]
    for each in found:
        torch.testing.assert_close(each, wanted)


@pytest.mark.parametrize(("kind", "shape"), [("Chosen", ("output_0", 4)), ("Distinct", ("tokens", 4))])
def test_sizes_that_depend_on_values(kind: str, shape: tuple[str | int, ...], runs: Path) -> None:
    """Leave such a size open, and try what the meta device does not have with real values."""
    graph = ranvier.Graph(
        actors={"a": {"kind": f"./{CODE.name}:{kind}", **X}}, edges=["gateway.x -> a.x", "a.output -> gateway.y"],
        folder=CODE.parent, allow_code=True,
    )  # fmt: skip
    assert graph.actors["a"].outputs["output"].shape == shape
    x = torch.tensor([[1.0, 2, 3, 4], [-1, 2, 3, 4], [5, 6, 7, 8]])
    with ranvier.start(graph, runs=runs) as run:
        torch.testing.assert_close(run.call(x=x)["y"], getattr(own(), kind)()(x))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "Misshapen",
            r"forward fails for x: float32\[tokens, 4\]: RuntimeError: .*; fix the class or its inputs, or write it as",
        ),
        (
            "Lazy",
            "forward fails for .*: ArithmeticError: all zeros; fix the class or its inputs, or write it as an Actor",
        ),
    ],
)
def test_modules_that_cannot_be_tried(kind: str, words: str) -> None:
    """Say what the module raised, and the way out."""
    with pytest.raises(ranvier.GraphError, match=words):
        ranvier.Graph(actors={"a": {"kind": f"./{CODE.name}:{kind}", **X}}, folder=CODE.parent, allow_code=True)
