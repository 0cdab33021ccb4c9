"""A mixture of experts of your own: a router, four experts, and what puts their answers together."""

from __future__ import annotations

import torch
from torch import nn

from ranvier import Actor, Batch, Context, TensorSpec, gather, scatter

EXPERTS = 4
CHOICES = 2
PORTS = [f"expert{number}" for number in range(EXPERTS)]
PIXELS = TensorSpec("float32", ("tokens", 64))


def choose(gate: nn.Linear, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two experts of each picture, and their weights."""
    weight, index = gate(pixels).softmax(-1).topk(CHOICES)
    return weight / weight.sum(-1, keepdim=True), index


class Router(Actor):
    """Sends each picture to two of the experts; the others never see it."""

    inputs = {"pixels": PIXELS}
    outputs = {
        "index": TensorSpec("int64", ("tokens", CHOICES)),
        "weight": TensorSpec("float32", ("tokens", CHOICES)),
        **dict.fromkeys(PORTS, PIXELS),
    }

    def load(self, context: Context) -> None:
        from safetensors.torch import load_file

        self.gate = nn.Linear(64, EXPERTS)
        self.gate.load_state_dict(
            {name.removeprefix("gate."): tensor for name, tensor in load_file(context.args["weights"]).items()
             if name.startswith("gate.")}
        )  # fmt: skip

    def step(self, batch: Batch) -> dict[str, torch.Tensor | Batch]:
        weight, index = choose(self.gate, batch["pixels"])
        return {"weight": weight, "index": index, **scatter(batch.rows, batch["pixels"], index, PORTS)}


class Expert(nn.Module):
    """One expert: a plain module that knows nothing of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(pixels)}


class Together(Actor):
    """Puts the experts' answers back in order, each with its weight."""

    inputs = {
        "index": TensorSpec("int64", ("tokens", CHOICES)),
        "weight": TensorSpec("float32", ("tokens", CHOICES)),
        **dict.fromkeys(PORTS, TensorSpec("float32", ("tokens", 10))),
    }
    outputs = {"logits": TensorSpec("float32", ("tokens", 10))}

    def step(self, batch: Batch) -> dict[str, torch.Tensor | Batch]:
        return {"logits": gather(batch["index"], batch["weight"], batch.tensors, PORTS)}
