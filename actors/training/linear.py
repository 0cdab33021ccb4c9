"""Multiply by a weight whose gradient is added up in place, or computed later.

A backward that is split into inputs and weights (zero bubble, Qi et al. 2023) needs this to compute nothing twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

Late = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Weights, their inputs, and the gradients of the products, from which `make_up` computes the weights' gradients."""
_late: Late | None = None


@contextlib.contextmanager
def put_off() -> Iterator[Late]:
    """Collect in a list what `make_up` needs, instead of computing weights' gradients, while the context is open."""
    global _late
    before, _late = _late, []
    try:
        yield _late
    finally:
        _late = before


def make_up(late: Late) -> None:
    """Compute the gradients that were put off, and add them to those of the weights."""
    for weight, given, gradient in late:
        _accumulate(weight, given, gradient)
    late.clear()


def _accumulate(weight: torch.Tensor, given_TC: torch.Tensor, gradient_TR: torch.Tensor) -> None:
    with torch.no_grad():
        if weight.grad is None:
            weight.grad = gradient_TR.t() @ given_TC
        else:
            weight.grad.addmm_(gradient_TR.t(), given_TC)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(given)
        ctx.weight = weight  # not saved_tensors: the backward writes to its gradient
        return F.linear(given, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        [given], [gradient] = ctx.saved_tensors, gradients
        wants_given, wants_weight, wants_bias = ctx.needs_input_grad
        if wants_weight and _late is not None:
            _late.append((ctx.weight, given, gradient))
        elif wants_weight:
            _accumulate(ctx.weight, given, gradient)
        return gradient @ ctx.weight if wants_given else None, None, gradient.sum(0) if wants_bias else None


_linear: Callable[..., torch.Tensor] = _Linear.apply


def linear(given_TC: torch.Tensor, weight_RC: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply [T, C] by a leaf [R, C]: [T, R]."""
    return _linear(given_TC, weight_RC, bias_R)
