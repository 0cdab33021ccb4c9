"""From slots to tensors: what an actor of a model holds, read from its checkpoint. Norms, which all parts have.

Shape suffixes: T tokens, H width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig
from .slots import Slot


def read_slot(slot: Slot, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of a slot, its parts one below the other."""
    tensor = torch.empty(slot.shape, dtype=dtype)
    start = 0
    for name, rows in slot.parts:
        part = tensor[start : start + rows]
        checkpoint.read_into(name, part.t() if slot.transposed else part)
        start += rows
    return tensor


class Norm:
    """A norm over the last dimension, computed in float32 whatever the dtype, each kind rounding where its oracle does.

    Root-mean-square: Zhang and Sennrich 2019. Layer norm: Ba et al. 2016.
    """

    def __init__(self, config: ModelConfig, weight_H: torch.Tensor, bias_H: torch.Tensor | None = None) -> None:
        self._kind = config.norm
        self._eps = config.norm_eps
        self.weight_H = weight_H
        self.bias_H = bias_H

    def __call__(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        if self._kind == "layer":
            return F.layer_norm(hidden_TH, self.weight_H.shape, self.weight_H, self.bias_H, self._eps)
        wide = hidden_TH.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        if self._kind == "rms_plus_one":
            return (wide * (1.0 + self.weight_H.float())).to(hidden_TH.dtype)
        return self.weight_H * wide.to(hidden_TH.dtype)
