"""Run the actors of one GPU in one process: a second device that the processor stands in for, in a real host process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_in
import trio
from safetensors.torch import load_file

import ranvier
from ranvier.graph.check.devices import DeviceCheck

STAND_IN = (
    stand_in.SOURCE
    + '''
import torch
from second_device import OnGpu

from ranvier import Actor, TensorSpec
from ranvier.actors.host import outputs, shared_wire


def refused(tensor):
    raise AssertionError("a tensor left its device")


class Same(Actor):
    """Pass on what came, from a buffer that is filled again at each step."""

    places = PLACES

    inputs = {"hidden": TensorSpec("float32", ("tokens", 48))}
    outputs = {"hidden": TensorSpec("float32", ("tokens", 48))}
    args = {"strict": "refuse tensors that leave the device"}

    def load(self, context):
        self.held = torch.zeros(600, 48, device=context.device)
        if context.args["strict"]:
            shared_wire.here = outputs.here = refused

    def step(self, batch):
        assert isinstance(self.held, OnGpu) and isinstance(batch["hidden"], OnGpu)
        self.held[: batch["hidden"].shape[0]] = batch["hidden"]
        return {"hidden": self.held[: batch["hidden"].shape[0]]}
'''
)
PROMPTS = ([1, 17, 40, 9, 300, 12, 77], [5, 6, 7], [100, 200, 30, 40])
TOKENS = 8


@pytest.mark.parametrize(
    ("elsewhere", "more"),
    [
        pytest.param((), {}, id="all stay"),
        pytest.param((), {"trace": False}, id="run ahead"),
        pytest.param((), {"places": True}, id="a buffer of an actor that places its tensors"),
        pytest.param(("embed", "upper"), {}, id="some on the processor"),
        pytest.param(("upper",), {"record": {"edges": "all"}}, id="recorded"),
    ],
)
def test_tensors_stay_on_the_device(
    elsewhere: tuple[str, ...], more: dict[str, Any], tmp_path: Path, tiny: Any, graph_file: Callable[..., Path],
    runs: Path, monkeypatch: pytest.MonkeyPatch, exact: Callable[[Any, int], list[int]],
) -> None:  # fmt: skip
    """Answer several streams with transformers' tokens. Actors elsewhere get copies in this machine's memory."""
    folder, _ = tiny("llama")
    monkeypatch.setattr(DeviceCheck, "devices", lambda *_: [])
    own = {key: value for key, value in more.items() if key != "places"}
    (tmp_path / "stand_in_actor.py").write_text(STAND_IN.replace("PLACES", str("places" in more)))
    strict = not elsewhere and "record" not in more
    actors: dict[str, dict[str, Any]] = {
        "same": {"kind": "./stand_in_actor.py:Same", "args": {"strict": strict}},  # first: it is loaded first
        "embed": {"kind": "embedding"}, "lower": {"kind": "blocks", "layers": "0-2"},
        "upper": {"kind": "blocks", "layers": "3-5"}, "head": {"kind": "head"},
    }  # fmt: skip
    for name, actor in actors.items():
        if name not in elsewhere:
            actor |= {"device": "cuda:0", "host": "gpu"}
    path = graph_file(
        model={"source": "unset", "dtype": "float32"}, actors=actors,
        pipeline=["embed", "lower", "same", "upper", "head"],
        **own,
    )  # fmt: skip
    graph = ranvier.load(path, overrides={"model.source": str(folder)}, allow_code=True)

    async def main() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        with trio.fail_after(60):
            async with ranvier.launch(graph, runs=runs) as run, trio.open_nursery() as nursery:

                async def one(index: int) -> None:
                    stream = run.generate(PROMPTS[index], max_tokens=TOKENS, stop_tokens=())
                    found[index] = [token.id async for token in stream]

                for index in range(len(PROMPTS)):
                    nursery.start_soon(one, index)
        return found

    found = trio.run(main)
    assert [found[index] for index in range(len(PROMPTS))] == [exact(prompt, TOKENS) for prompt in PROMPTS]
    if "record" in more:
        kept = [name for file in runs.rglob("record/same*/*.safetensors") for name in load_file(file)]
        assert any(name.endswith("in.hidden") for name in kept) and any(name.endswith("out.hidden") for name in kept)
