"""A mixture of experts of your own: a router, four experts, and what puts their answers together."""

from __future__ import annotations

import torch
from torch import nn

from ranvier import Actor, Batch, Context, TensorSpec, balancing_loss, gather, scatter

EXPERTS = 4
CHOICES = 2
PORTS = [f"expert{number}" for number in range(EXPERTS)]
PIXELS = TensorSpec("float32", ("tokens", 64))


def choose(gate: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each picture thinks of each expert, and the weights and numbers of the two that it chooses."""
    scores = gate(pixels).softmax(-1)
    weight, index = scores.topk(CHOICES)
    return scores, weight / weight.sum(-1, keepdim=True), index


class Router(Actor):
    """Sends each picture to two of the experts; the others never see it."""

    inputs = {"pixels": PIXELS}
    outputs = {
        "index": TensorSpec("int64", ("tokens", CHOICES)),
        "weight": TensorSpec("float32", ("tokens", CHOICES)),
        "balance": TensorSpec("float32", ()),
        **dict.fromkeys(PORTS, PIXELS),
    }

    def load(self, context: Context) -> None:
        self.gate = nn.Linear(64, EXPERTS)  # `weights:` fills it, as it fills a module

    def step(self, batch: Batch) -> dict[str, torch.Tensor | Batch]:
        scores, weight, index = choose(self.gate, batch["pixels"])
        routed = scatter(batch.rows, batch["pixels"], index, PORTS)
        return {"weight": weight, "index": index, "balance": balancing_loss(scores, index), **routed}


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
