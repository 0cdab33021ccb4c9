"""One dense layer; all of a network that is not the last bends what it gives."""

from __future__ import annotations

import torch
from torch import nn


class Layer(nn.Module):
    """x [pictures, width] -> [pictures, to]."""

    def __init__(self, width: int, to: int, last: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, to)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.linear(x)
        return made if self.last else torch.relu(made)
