"""Define a custom tap that measures how many directions a hidden state has. It is slow on purpose."""

from __future__ import annotations

import torch

seen: list[float] = []


def spectrum(tensor: torch.Tensor, rows: object) -> None:
    """Record the effective number of directions of a tensor [tokens, hidden].

    Rows are (session, epoch, position, tokens). The tap returns None, so the tensor is sent unchanged.
    """
    values = torch.linalg.svdvals(tensor.float().T @ tensor.float())
    seen.append(float(values.sum() / values.max().clamp(min=1e-9)))
