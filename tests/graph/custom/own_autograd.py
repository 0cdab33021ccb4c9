"""Torch modules that need values or gradients where others need only shapes."""

import torch
from torch import nn


class Scaled(nn.Module):
    """Read a value in the constructor and in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.linspace(0, 3, 5).mean().item()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (self.scale if float(x.abs().sum()) >= 0 else 0)


class Force(nn.Module):
    """Return the negative gradient of a potential, as models of molecules do."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.requires_grad_()
        energy = self.potential(x).tanh().sum()
        return {"force": -torch.autograd.grad(energy, x)[0]}


class Chosen(nn.Module):
    """Return as many rows as the values of the input say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x[:, 0] > 0]


class Distinct(nn.Module):
    """Use an operator that torch's meta device does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.unique(x[:, 0]).numel() * 0


class Misshapen(nn.Module):
    """Take other sizes than it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Lazy(nn.Module):
    """Need a value of its input that zeros do not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum().item() == 0:
            raise ArithmeticError("all zeros")
        return x
