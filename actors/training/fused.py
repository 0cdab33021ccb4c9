"""Compute the operations between the matrix products of a block, forward and backward in one pass each (fused.c).

The functions need the compiled fused.c, a processor with AVX2 or AVX-512, and float32. Otherwise torch's own
operations are used: see `layers.py`. Matrix products take half of a small llama's step; with torch, the operations
between them took a third (benchmarks/train.py).

Shape suffixes as in layers.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from ..model.kernels.native import find

TILE = 16


@functools.cache
def library() -> Any:
    """Return the functions of fused.c; None if they cannot be used."""
    return next(iter(libraries().values()), None)


@functools.cache
def libraries() -> dict[str, Any]:
    """Return the functions of fused.c for each instruction set that this processor has, the best set first."""
    return find("ranvier.actors.training", "fused")


def able(width: int, *tensors: torch.Tensor) -> bool:
    """Return whether the functions here can compute with rows of `width` numbers of these tensors."""
    return (
        width % TILE == 0
        and library() is not None
        and all(tensor.dtype is torch.float32 and tensor.is_cpu for tensor in tensors)
    )


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _sizes(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in sizes]


class _RootMeanSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, more: float) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        width = x.shape[-1]
        out, inverse = torch.empty_like(x), torch.empty(x.numel() // width)
        library().ranvier_rms(
            _at(x),
            _at(weight),
            ctypes.c_float(eps),
            ctypes.c_float(more),
            _at(out),
            _at(inverse),
            *_sizes(len(inverse), width),
        )
        ctx.save_for_backward(x, weight, inverse)
        ctx.more = more
        return out

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        [gradient] = (each.contiguous() for each in given)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        library().ranvier_rms_back(
            _at(x), _at(weight), ctypes.c_float(ctx.more), _at(inverse), _at(gradient), _at(dx), _at(dweight),
            *_sizes(len(inverse), x.shape[-1]),
        )  # fmt: skip
        return dx, dweight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: torch.Tensor) -> torch.Tensor:
        inner = inner.contiguous()
        rows, width = len(inner), inner.shape[1] // 2
        out = torch.empty(rows, width)
        library().ranvier_swiglu(_at(inner), _at(out), *_sizes(rows, width))
        ctx.save_for_backward(inner)
        return out

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        [inner] = ctx.saved_tensors
        [gradient] = (each.contiguous() for each in given)
        made = torch.empty_like(inner)
        library().ranvier_swiglu_back(_at(inner), _at(gradient), _at(made), *_sizes(len(inner), inner.shape[1] // 2))
        return made


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv = qkv.contiguous()
        sequence = len(cos)
        batch = len(qkv) // sequence
        query = torch.empty(batch, heads, sequence, width)
        keys, values = (torch.empty(batch, kv_heads, sequence, width) for _ in range(2))
        ctx.sizes = batch, sequence, heads, kv_heads, width
        library().ranvier_heads(_at(qkv), _at(cos), _at(sin), _at(query), _at(keys), _at(values), *_sizes(*ctx.sizes))
        ctx.save_for_backward(cos, sin)
        return query, keys, values

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        dquery, dkeys, dvalues = (each.contiguous() for each in given)
        batch, sequence, heads, kv_heads, width = ctx.sizes
        made = torch.empty(batch * sequence, (heads + 2 * kv_heads) * width)
        library().ranvier_heads_back(
            _at(dquery), _at(dkeys), _at(dvalues), _at(cos), _at(sin), _at(made), *_sizes(*ctx.sizes)
        )
        return made, None, None, None, None, None


_root_mean_square: Callable[..., torch.Tensor] = _RootMeanSquare.apply
_swiglu: Callable[..., torch.Tensor] = _SwiGLU.apply
_heads: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = _Heads.apply


def root_mean_square(x: torch.Tensor, weight: torch.Tensor, eps: float, more: float) -> torch.Tensor:
    """Return x / sqrt(mean(x²) + eps) * (weight + more), over the last dimension."""
    return _root_mean_square(x, weight, eps, more)


def swiglu(inner_TI: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [T, I]; gate and up lie side by side in [T, 2 I]."""
    return _swiglu(inner_TI)


def heads(
    qkv_TE: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split [T, (heads + 2 kv heads) D] into queries [B, heads, S, D], keys and values [B, kv heads, S, D].

    Queries and keys are rotated by their positions' angles.
    """
    return _heads(qkv_TE, cos_SD, sin_SD, heads, kv_heads, cos_SD.shape[1])
