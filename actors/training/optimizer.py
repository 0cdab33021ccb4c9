"""Make torch's optimisers, and compute learning rates, gradient norms and clipping factors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..protocol.training_spec import Optimizer


def make(settings: Optimizer, weights: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """Return torch's optimiser of the configured kind over `weights`."""
    weights = list(weights)
    if settings.kind == "sgd":
        return torch.optim.SGD(weights, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        weights, settings.lr, settings.betas, settings.eps, weight_decay=settings.weight_decay, fused=True
    )


def pace(settings: Optimizer, update: int, updates: int) -> float:
    """Return the learning rate of update number `update`, counted from 0, of `updates`.

    It rises linearly to `lr` in the first `warmup` updates. Then it stays constant, or falls linearly or by a cosine
    (Loshchilov and Hutter 2017) to `least` times `lr`.
    """
    if update < settings.warmup:
        return settings.lr * (update + 1) / settings.warmup
    if settings.decay == "constant":
        return settings.lr
    share = min(1.0, (update - settings.warmup) / max(1, updates - settings.warmup))
    left = 1 - share if settings.decay == "linear" else (1 + math.cos(math.pi * share)) / 2
    return settings.lr * (settings.least + (1 - settings.least) * left)


def squares(gradients: Iterable[torch.Tensor]) -> float:
    """Return the sum of the squares of all elements."""
    held = list(gradients)
    return math.fsum(norm * norm for norm in torch.stack(torch._foreach_norm(held)).double().tolist()) if held else 0.0


def clipping(settings: Optimizer, norm: float) -> float:
    """Return the factor that clips gradients of norm `norm`, at most 1 (as torch's `clip_grad_norm_` computes it)."""
    return min(1.0, settings.clip / (norm + 1e-6)) if settings.clip is not None else 1.0
