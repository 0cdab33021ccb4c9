"""Define modules that the tests train, and data for them."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ranvier import Actor, Batch, Context, TensorSpec


class Layer(nn.Module):
    """Map x [pictures, width] to [pictures, to], with tanh unless it is the last layer."""

    def __init__(self, width: int, to: int, last: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, to)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.linear(x)
        return made if self.last else torch.tanh(made)


class Join(nn.Module):
    """Combine the outputs of two branches for the same pictures."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, to), nn.Linear(width, to)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.left(a) * self.right(b), "size": (a * b).pow(2)}


class Rounding(nn.Module):
    """Round x, which cannot be differentiated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().round()


class Exploding(nn.Module):
    """Return NaN and infinity from the hundredth picture on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x) if self.training else 0
        return x * self.scale / (0.0 if self.seen >= 100 else 1.0) - (x * 0 if self.seen < 100 else torch.inf)


class Sleeping(nn.Module):
    """Never return from the third call of `forward`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += x.device.type != "meta"
        if self.calls == 3:
            time.sleep(3600)
        return x * self.scale


class Dropping(nn.Module):
    """Map x [pictures, width] to [pictures, to], with dropout in training."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, to)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.dropout(x, 0.3, self.training))


class Numbers:
    """Make pictures of eight numbers, each with the index of its largest number as label, modulo 4."""

    def __init__(self, batch: int, width: int = 8) -> None:
        self.batch, self.width = batch, width

    def __call__(self, step: int, validation: bool) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step + (1_000_000 if validation else 0))
        x = torch.randn(self.batch, self.width, generator=generator)
        return {"x": x, "label": x.argmax(1) % 4, "wished": x.flip(1)}


class Tokens:
    """Make sequences of token ids of a small vocabulary, and the tokens that follow."""

    def __init__(self, batch: int, context: int, vocabulary: int) -> None:
        self.batch, self.context, self.vocabulary = batch, context, vocabulary

    def __call__(self, step: int, validation: bool) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step + (1_000_000 if validation else 0))
        ids = torch.randint(3, self.vocabulary, (self.batch, self.context + 1), generator=generator)
        return {"token": ids[:, :-1].flatten(), "target": ids[:, 1:].flatten()}


class Several(nn.Module):
    """Apply some layers in a row."""

    def __init__(self, widths: list[int], ends: bool) -> None:
        super().__init__()
        last = len(widths) - 2
        self.layers = nn.ModuleList(
            Layer(one, two, ends and index == last) for index, (one, two) in enumerate(pairwise(widths))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Own(Actor):
    """Represent a custom actor that holds two modules, and whose step does more than call one."""

    inputs = {"x": TensorSpec("float32", ("pictures", 8))}
    outputs = {"y": TensorSpec("float32", ("pictures", 4))}

    def load(self, context: Context) -> None:
        torch.manual_seed(11)
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 4)
        self.loaded_as = context.name

    def step(self, batch: Batch):  # type: ignore[no-untyped-def]
        return {"y": self.outer(torch.tanh(self.inner(batch["x"]))) + batch["x"][:, :4]}


class InPlace(nn.Module):
    """Change the input in place first of all, as `nn.ReLU(inplace=True)` does."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.act, self.linear = nn.ReLU(inplace=True), nn.Linear(width, to)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.act(x))


class Everything(nn.Module):
    """Hold all kinds of state.

    These are tied weights, integers, flags, views of one memory, and a buffer that is not in `state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(8, momentum=None)
        shared = torch.arange(24.0).view(3, 8)
        self.register_buffer("p", shared[:2])
        self.register_buffer("q", shared[1:])
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("flag", torch.tensor([False, True]))
        self.register_buffer("none", torch.empty(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.turned = nn.Parameter(torch.randn(2, 8, 3).transpose(0, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.device.type != "meta":
            self.calls += 1
            self.hidden += 1
            self.q += 1
            self.flag.logical_not_()
        made: torch.Tensor = self.norm(self.two(torch.tanh(self.one(x)))) * self.scale + self.turned.sum() + self.p[0]
        return made
