"""Define the kinds of losses that training minimises, each the mean over a micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Function = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def _needed(target: torch.Tensor | None) -> torch.Tensor:
    assert target is not None, "the check gives every loss that needs one its target"
    return target


KINDS: dict[str, Function] = {
    "cross_entropy": lambda made, target: F.cross_entropy(made.float(), _needed(target)),
    "mse": lambda made, target: F.mse_loss(made.float(), _needed(target).float()),
    "l1": lambda made, target: F.l1_loss(made.float(), _needed(target).float()),
    "mean": lambda made, _: made.float().mean(),
}
"""Losses by name; `mean` takes no target, because the output is a loss already."""


def correct(kind: str, made: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """Return the share of correct answers, 0-dimensional float32; NaN if the loss has no correct answers."""
    if kind != "cross_entropy":
        return torch.tensor(float("nan"), device=made.device)
    return (made.argmax(-1) == _needed(target)).float().mean()
