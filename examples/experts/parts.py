"""Define a custom mixture of experts: a router, four experts, and an actor that combines their answers."""

from __future__ import annotations

import torch
from torch import nn

from ranvier import Actor, Batch, Context, TensorSpec, balancing_loss, gather, scatter

EXPERTS = 4
CHOICES = 2
PORTS = [f"expert{number}" for number in range(EXPERTS)]
PIXELS = TensorSpec("float32", ("tokens", 64))


def choose(gate: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the router's scores of all experts for each picture, and the weights and indices of the two best."""
    scores = gate(pixels).softmax(-1)
    weight, index = scores.topk(CHOICES)
    return scores, weight / weight.sum(-1, keepdim=True), index


class Router(Actor):
    """Send each picture to two of the experts; the other experts never see it."""

    inputs = {"pixels": PIXELS}
    outputs = {
        "index": TensorSpec("int64", ("tokens", CHOICES)),
        "weight": TensorSpec("float32", ("tokens", CHOICES)),
        "balance": TensorSpec("float32", ()),
        **dict.fromkeys(PORTS, PIXELS),
    }

    def load(self, context: Context) -> None:
        self.gate = nn.Linear(64, EXPERTS)  # `weights:` in the graph file fills it, as in a module

    def step(self, batch: Batch) -> dict[str, torch.Tensor | Batch]:
        scores, weight, index = choose(self.gate, batch["pixels"])
        routed = scatter(batch.rows, batch["pixels"], index, PORTS)
        return {"weight": weight, "index": index, "balance": balancing_loss(scores, index), **routed}


class Expert(nn.Module):
    """Compute one expert: a plain module that knows nothing of the other experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(pixels)}


class Together(Actor):
    """Combine the experts' answers for each picture, each with its weight."""

    inputs = {
        "index": TensorSpec("int64", ("tokens", CHOICES)),
        "weight": TensorSpec("float32", ("tokens", CHOICES)),
        **dict.fromkeys(PORTS, TensorSpec("float32", ("tokens", 10))),
    }
    outputs = {"logits": TensorSpec("float32", ("tokens", 10))}

    def step(self, batch: Batch) -> dict[str, torch.Tensor | Batch]:
        return {"logits": gather(batch["index"], batch["weight"], batch.tensors, PORTS)}
