"""Define one iteration of a loop that improves a guess at a square root until it is good enough."""

import torch
from torch import nn


class Newton(nn.Module):
    """Take a step of Newton's method for x² = n on pairs (n, x).

    `done` is true when all x² are within a millionth of n.
    """

    def forward(self, state: torch.Tensor) -> dict[str, torch.Tensor]:
        number, guess = state.unbind(1)
        better = (guess + number / guess) / 2
        close = (better * better - number).abs() <= 1e-6 * number
        return {"state": torch.stack((number, better), 1), "done": close.all().reshape(1)}
