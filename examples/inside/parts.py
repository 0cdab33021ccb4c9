"""Define what is trained on activations: a linear probe, and a sparse autoencoder (SAE)."""

import torch
from torch import nn


class Probe(nn.Module):
    """Tell two kinds of things apart by a linear map of a hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(576, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"kind": self.layer(x / x.norm(dim=-1, keepdim=True))}


class Autoencoder(nn.Module):
    """Write a hidden state as a sum of few directions: `rebuilt`, and how much it takes of all of them, `taken`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(576, 1024), nn.Linear(1024, 576)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.encoder(x - self.decoder.bias).relu()
        return {"rebuilt": self.decoder(features), "taken": features.mean()[None]}
