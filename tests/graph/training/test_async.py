"""Check asynchronous 1F1B with stashed weights.

Each stage's forwards and backwards use the version of the weights that the schedule gives."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.func import functional_call

import ranvier
from ranvier.actors.protocol.schedule import Stages, make
from ranvier.graph.training.trainer import Trained

spec = importlib.util.spec_from_file_location("training_parts", Path(__file__).with_name("parts.py"))
assert spec is not None and spec.loader is not None
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)
STEPS, BATCH, MICRO, WIDTHS = 4, 16, 4, (8, 16, 12, 4)
NAMES = ("one", "two", "three")
SGD = {"kind": "sgd", "lr": 0.2, "momentum": 0.9}
ADAMW = {"kind": "adamw", "lr": 0.003}


def optimizer(settings: dict[str, Any], weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Return torch's optimiser with these settings."""
    if settings["kind"] == "sgd":
        return torch.optim.SGD(weights, settings["lr"], settings["momentum"])
    return torch.optim.AdamW(weights, settings["lr"], weight_decay=0.0)


@pytest.mark.parametrize(
    ("settings", "accumulate"), [(SGD, 1), pytest.param(ADAMW, 2, marks=pytest.mark.slow)], ids=["sgd", "adamw"]
)
def test_gradients_are_those_of_the_stale_versions(
    settings: dict[str, Any],
    accumulate: int,
    graph: Callable[..., ranvier.Graph],
    trained: Callable[..., Trained],
    tmp_path: Path,
) -> None:
    """Compute gradients with the stale weights that the schedule gives.

    The oracle has all stages in one process, and keeps every version of their weights. For each micro-batch and stage
    it takes the version that exists when the stage's line of the schedule reaches that forward."""
    torch.manual_seed(3)
    layers = [parts.Layer(one, two, last=two == 4) for one, two in pairwise(WIDTHS)]
    actors: dict[str, Any] = {}
    for name, layer, (one, two) in zip(NAMES, layers, pairwise(WIDTHS), strict=True):
        save_file(layer.state_dict(), tmp_path / f"{name}.safetensors")
        actors[name] = {
            "kind": "./parts.py:Layer", "args": {"width": one, "to": two, "last": two == 4}, "weights": f"./{name}.safetensors",
        }  # fmt: skip
    actors["one"]["inputs"] = {"x": "float32[pictures, 8]"}
    edges = ["gateway.x -> one.x", "one.output -> two.x", "two.output -> three.x", "three.output -> gateway.made"]
    made = trained(
        graph(actors, edges, {
            "data": {"source": "./parts.py:Numbers", "args": {"batch": BATCH}}, "batch": BATCH, "micro_batches": MICRO,
            "steps": STEPS, "schedule": "async", "accumulate": accumulate, "optimizer": settings,
            "loss": [{"of": "three.output", "target": "label"}],
        })
    )  # fmt: skip

    stages = Stages(NAMES, (("one", "two"), ("two", "three")), {})
    schedule = make("async", stages, STEPS * MICRO, accumulate)
    held: list[list[dict[str, torch.Tensor]]] = []
    optimizers = []
    for layer in layers:
        held.append([{name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}])
        optimizers.append(optimizer(settings, list(layer.parameters())))
    losses, stalest = [], 0
    for number in range(STEPS * MICRO):
        data = parts.Numbers(BATCH)(number // MICRO, False)
        size = BATCH // MICRO
        part = slice(number % MICRO * size, (number % MICRO + 1) * size)
        value, versions = data["x"][part], []
        for index, name in enumerate(NAMES):
            line = schedule.stages[name]
            at = next(i for i, action in enumerate(line) if (action.kind, action.micro_batch) == ("F", number))
            version = sum(action.kind == "U" for action in line[:at])
            stalest = max(stalest, number // accumulate - version)
            versions.append(held[index][version])
            value = functional_call(layers[index], held[index][version], (value,))
        loss = F.cross_entropy(value, data["label"][part])
        gradients = torch.autograd.grad(
            loss / accumulate, [weight for version in versions for weight in version.values()]
        )
        losses.append(float(loss.detach()))
        found = iter(gradients)
        for index, layer in enumerate(layers):
            for weight in layer.parameters():
                own = next(found)
                weight.grad = own if weight.grad is None else weight.grad + own
            if (number + 1) % accumulate == 0:
                optimizers[index].step()
                optimizers[index].zero_grad()
                held[index].append(
                    {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
                )
    assert stalest >= 1, "nothing was stale"
    expected = [sum(losses[step * MICRO : (step + 1) * MICRO]) / MICRO for step in range(STEPS)]
    got = [told["loss"] for told in made.history]
    assert got == pytest.approx(expected, rel=1e-5)
    assert made.folder is not None
    for name, layer in zip(NAMES, layers, strict=True):
        for key, tensor in load_file(made.folder / f"{name}.safetensors").items():
            assert float((tensor - layer.state_dict()[key]).abs().max()) <= 1e-5, (name, key)
    assert made.counters["one.0"]["staleness"] == 2 // accumulate, "as many updates as stages follow"
    assert made.counters["three.0"]["staleness"] == 0


@pytest.mark.slow
def test_a_model_learns_asynchronously(
    graph: Callable[..., ranvier.Graph],
    trained: Callable[..., Trained],
    tiny: Callable[..., tuple[Path, Any]],
    split: Any,
) -> None:
    """Train a model asynchronously.

    In one actor nothing is stale, so the oracle updates transformers' model after every micro-batch. In four actors,
    the losses are within 20 % of the oracle's."""
    folder, model = tiny("llama")
    data = {"source": "./parts.py:Tokens", "args": {"batch": 8, "context": 12, "vocabulary": 320}, "context": 12}
    training = {
        "data": data,
        "batch": 8,
        "micro_batches": 4,
        "steps": 5,
        "schedule": "async",
        "optimizer": {"kind": "sgd", "lr": 0.05},
    }
    found = []
    for count in (1, 4):
        content = split(count, 6)
        names = content["pipeline"]
        edges: list[Any] = [f"{one}.hidden -> {other}.hidden" for one, other in pairwise(names)]
        edges.append({"from": f"{names[-1]}.token", "to": f"{names[0]}.token", "feedback": True})
        settings = {"source": str(folder), "dtype": "float32"}
        if count == 4:  # tied embeddings would be one weight in two versions
            folder, _ = tiny("untied", tie_word_embeddings=False)
            settings["source"] = str(folder)
        made = trained(graph(content["actors"], edges, training, model=settings), out=str(count))
        found.append([told["loss"] for told in made.history])
    learner = copy.deepcopy(model).train()
    descent = torch.optim.SGD(learner.parameters(), 0.05)
    expected = []
    for step in range(5):
        given, losses = parts.Tokens(8, 12, 320)(step, False), []
        for ids, target in zip(given["token"].view(4, 2, 12), given["target"].chunk(4), strict=True):
            loss = F.cross_entropy(learner(ids, use_cache=False).logits.flatten(0, 1), target)
            descent.zero_grad()
            loss.backward()
            descent.step()
            losses.append(float(loss.detach()))
        expected.append(sum(losses) / 4)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] == pytest.approx(expected, rel=0.2)
    assert made.counters["embed.0"]["staleness"] == 3


@pytest.mark.slow
def test_digits_are_learned_as_soon(
    graph: Callable[..., ranvier.Graph], trained: Callable[..., Trained], tmp_path: Path
) -> None:
    """Reach 97 % on held-out digits within 1.2 times the epochs of synchronous training, over three actors."""
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    save_file({"x": pixels, "label": torch.tensor(digits.target)[order]}, tmp_path / "digits.safetensors")
    widths, actors = (64, 96, 48, 10), {}
    for name, (one, two) in zip(NAMES, pairwise(widths), strict=True):
        torch.manual_seed(len(actors))
        layer = parts.Layer(one, two, last=two == 10)
        save_file(layer.state_dict(), tmp_path / f"{name}.safetensors")
        args = {"width": one, "to": two, "last": two == 10}
        actors[name] = {"kind": "./parts.py:Layer", "args": args, "weights": f"./{name}.safetensors"}
    actors["one"]["inputs"] = {"x": "float32[pictures, 64]"}
    edges = ["gateway.x -> one.x", "one.output -> two.x", "two.output -> three.x", "three.output -> gateway.made"]
    epoch, epochs = 14, 40
    needed = []
    for schedule in ("1f1b", "async"):
        training = {
            "data": {"tensors": "./digits.safetensors", "held_out": 0.2}, "batch": 96, "micro_batches": 4,
            "steps": epoch * epochs, "schedule": schedule, "loss": [{"of": "three.output", "target": "label"}],
            "optimizer": {"kind": "sgd", "lr": 0.1 if schedule == "1f1b" else 0.05, "momentum": 0.9},
            "validate": {"every": epoch, "batches": 14},
        }  # fmt: skip
        made = trained(graph(actors, edges, training), out=schedule)
        right = [told["accuracy"] for told in made.history if "validation" in told]
        needed.append(next(index for index, share in enumerate(right, 1) if share >= 0.97))
    assert needed[1] <= 1.2 * needed[0], needed
