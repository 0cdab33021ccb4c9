"""A tap of one's own: it looks at how many directions a hidden state has, and takes its time for that."""

from __future__ import annotations

import torch

seen: list[float] = []


def spectrum(tensor: torch.Tensor, rows: object) -> None:
    """[tokens, hidden]; rows are (session, epoch, position, tokens). Nothing given back: nothing is changed."""
    values = torch.linalg.svdvals(tensor.float().T @ tensor.float())
    seen.append(float(values.sum() / values.max().clamp(min=1e-9)))
