"""Define plain torch modules: two encoders that each see half of a picture, and a head that needs both."""

import torch
from torch import nn


class Half(nn.Module):
    """Encode one half of an 8 x 8 picture: its first or last 32 pixels."""

    def __init__(self, lower: bool) -> None:
        super().__init__()
        self.lower = lower
        self.layers = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU())

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        half = pixels[:, 32:] if self.lower else pixels[:, :32]
        return {"features": self.layers(half)}


class Joint(nn.Module):
    """Classify the digit from the features of both encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, top: torch.Tensor, bottom: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(torch.cat((top, bottom), dim=1))}
