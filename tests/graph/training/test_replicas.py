"""Share micro-batches among replicas, which sum gradients round a ring, or learn apart and average their weights."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import ranvier
from ranvier.graph.training.planner import training_plan
from ranvier.graph.training.trainer import Step, Trained

spec = importlib.util.spec_from_file_location("training_parts", Path(__file__).with_name("parts.py"))
assert spec is not None and spec.loader is not None
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)
Make = Callable[..., ranvier.Graph]
Train = Callable[..., Trained]
STEPS, BATCH, MICRO = 8, 24, 6
EDGES = ["gateway.x -> one.x", "one.output -> two.x", "two.output -> three.x", "three.output -> gateway.made"]


def row(tmp_path: Path, replicas: Mapping[str, int]) -> tuple[dict[str, Any], nn.Sequential]:
    """Cut three layers into actors with these replicas.

    Return the actors and the whole model."""
    torch.manual_seed(3)
    whole = nn.Sequential(parts.Layer(8, 16), parts.Layer(16, 12), parts.Layer(12, 4, last=True))
    sizes = {"one": (8, 16), "two": (16, 12), "three": (12, 4)}
    actors: dict[str, Any] = {}
    for (name, (width, to)), layer in zip(sizes.items(), whole, strict=True):
        save_file(layer.state_dict(), tmp_path / f"{name}.safetensors")
        actors[name] = {
            "kind": "./parts.py:Layer", "args": {"width": width, "to": to, "last": name == "three"},
            "weights": f"./{name}.safetensors", "replicas": replicas.get(name, 1),
        }  # fmt: skip
    actors["one"]["inputs"] = {"x": "float32[pictures, 8]"}
    return actors, whole


def section(**more: Any) -> dict[str, Any]:
    """Return a training section with these changes."""
    return {
        "data": {"source": "./parts.py:Numbers", "args": {"batch": BATCH}}, "batch": BATCH, "micro_batches": MICRO,
        "steps": STEPS, "loss": [{"of": "three.output", "target": "label"}],
        "optimizer": {"kind": "adamw", "lr": 0.01, "clip": 0.1}, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("replicas", "schedule"),
    [
        ({"one": 2, "two": 3}, "1f1b"),
        pytest.param({"one": 2, "two": 2, "three": 2}, "gpipe", marks=pytest.mark.slow),
        pytest.param({"three": 3}, "zero-bubble", marks=pytest.mark.slow),
        pytest.param({"two": 6}, "1f1b", marks=pytest.mark.slow),
    ],
)
def test_summed_gradients_are_those_of_one(
    replicas: Mapping[str, int], schedule: str, graph: Make, trained: Train, tmp_path: Path
) -> None:
    """Learn as plain torch does over whole batches, however many replicas each actor has.

    Gradients are clipped over all actors."""
    actors, whole = row(tmp_path, replicas)
    made = trained(graph(actors, EDGES, section(schedule=schedule, validate={"every": 4, "batches": 6})))
    optimizer = torch.optim.AdamW(whole.parameters(), 0.01, weight_decay=0.0)
    expected = []
    for step in range(STEPS):
        given = parts.Numbers(BATCH)(step, False)
        loss = F.cross_entropy(whole(given["x"]), given["label"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        optimizer.step()
        expected.append(float(loss.detach()))
    assert [told["loss"] for told in made.history if "validation" not in told] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        held = [parts.Numbers(BATCH)(index, True) for index in range(6)]
        validation = [float(F.cross_entropy(whole(given["x"]), given["label"])) for given in held]
    assert made.history[-1]["loss"] == pytest.approx(sum(validation) / 6, rel=1e-5)
    assert made.folder is not None
    for name, layer in zip(("one", "two", "three"), whole, strict=True):
        for key, tensor in load_file(made.folder / f"{name}.safetensors").items():
            assert float((tensor - layer.state_dict()[key]).abs().max()) <= 1e-5, (name, key)


@pytest.mark.slow
def test_averaged_weights(graph: Make, trained: Train, tmp_path: Path) -> None:
    """Average the weights of two replicas of each actor after every second update.

    The oracle has two whole models, which learn from their halves of the micro-batches. One replica is killed during
    the training, which changes no loss."""
    names = ("one", "two", "three")
    actors, whole = row(tmp_path, dict.fromkeys(names, 2))
    settings = section(average_every=2, save={"every": 2}, optimizer={"kind": "sgd", "lr": 0.3, "momentum": 0.5})
    pids: dict[str, int] = {}
    killed: list[int] = []

    def kill(step: Step) -> None:
        if step.step == 5 and not killed:
            killed.append(pids["two.1.1"])
            os.kill(pids["two.1.1"], signal.SIGKILL)

    made = trained(
        graph(actors, EDGES, settings, restart={"max": 3, "window_s": 60, "backoff_s": 0}),
        on_step=kill,
        on_started=pids.update,
    )
    assert killed
    assert len(made.losses) == 1
    copies = [whole, copy.deepcopy(whole)]
    optimizers = [torch.optim.SGD(each.parameters(), 0.3, 0.5) for each in copies]
    expected = []
    for step in range(STEPS):
        given = parts.Numbers(BATCH)(step, False)
        pictures, labels, told = given["x"].chunk(MICRO), given["label"].chunk(MICRO), []
        for replica, (each, optimizer) in enumerate(zip(copies, optimizers, strict=True)):
            optimizer.zero_grad()
            for number in range(replica, MICRO, 2):
                loss = F.cross_entropy(each(pictures[number]), labels[number])
                (loss / (MICRO // 2)).backward()
                told.append(float(loss.detach()))
            optimizer.step()
        if (step + 1) % 2 == 0:
            with torch.no_grad():
                for one, other in zip(copies[0].parameters(), copies[1].parameters(), strict=True):
                    one.copy_((one + other) / 2)
                    other.copy_(one)
        expected.append(sum(told) / MICRO)
    assert [told["loss"] for told in made.history] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"micro_batches": 3}, "2 replicas cannot share 3 micro-batches"),
        ({"schedule": "async"}, "2 replicas: async allows only one"),
        ({"validate": {"every": 2, "batches": 3}}, "2 replicas cannot share 3 batches"),
        ({"average_every": 3}, "average_every: 3 does not divide 8 steps"),
    ],
)
def test_what_replicas_cannot(change: dict[str, Any], expected: str, graph: Make, tmp_path: Path) -> None:
    """Refuse in the plan what replicas cannot share."""
    actors, _ = row(tmp_path, {"two": 2})
    with pytest.raises(ranvier.GraphError, match=expected):
        training_plan(graph(actors, EDGES, section(**change)))
