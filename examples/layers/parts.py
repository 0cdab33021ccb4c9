"""Define one dense layer of a network. Every layer except the last has a nonlinearity."""

from __future__ import annotations

import torch
from torch import nn


class Layer(nn.Module):
    """Map x [pictures, width] to [pictures, to]."""

    def __init__(self, width: int, to: int, last: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, to)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.linear(x)
        return made if self.last else torch.relu(made)
