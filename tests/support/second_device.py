"""Pretend that this machine has a second device: its tensors say that they are there, and the processor computes their numbers.

An operation that mixes them with tensors of the processor fails, as it would on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU = torch.device("lazy:0")  # autograd computes for it in the thread that asks, whatever this process did before
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""Operations that take tensors of both devices."""


class OnGpu(torch.Tensor):
    """Wrap a tensor of the processor as one of the GPU."""

    own: torch.Tensor

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, own.shape, strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype, device=GPU,
            requires_grad=own.requires_grad,
        )  # fmt: skip
        made.own = own
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.own!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch, on the device of its arguments or on the one that it names."""
    if operation is torch.ops.aten._has_compatible_shallow_copy_type.default:
        return type(args[0]) is type(args[1])
    flat, spec = tree_flatten((args, kwargs))
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    here = [each for each in tensors if isinstance(each, OnGpu)]
    away = [each for each in tensors if not isinstance(each, OnGpu) and each.dim()]
    named = [each for each in flat if isinstance(each, torch.device)]
    gpu = named[-1].type == GPU.type if named else bool(here)
    if here and away and operation not in COPIES and not str(operation).startswith("aten.index"):
        raise RuntimeError(f"{operation}: expected all tensors on one device, got {GPU} and cpu")
    if operation is torch.ops.aten.copy_.default:
        gpu = isinstance(args[0], OnGpu)
    own_args, own_kwargs = tree_unflatten([_own(each) for each in flat], spec)
    if operation is torch.ops.aten.histc.default:  # a GPU counts integers, too
        own_args = (own_args[0].float(), *own_args[1:])
    made = operation(*own_args, **own_kwargs)
    if not gpu:  # memory is not shared between devices
        return made.clone() if here and any(made is each.own for each in here) else made
    known = {id(each.own): each for each in here}
    return tree_map(
        lambda value: (
            known[id(value)] if id(value) in known else OnGpu(value) if isinstance(value, torch.Tensor) else value
        ),
        made,
    )


def _own(value: Any) -> Any:
    """Return a value as the processor takes it."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.own if isinstance(value, OnGpu) else value


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Compute as a whole what torch would do inside for a GPU that is really there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu") == GPU:
            return function(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        if function is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            return args[0].own.tolist()
        if function is torch.Tensor.__getitem__ and isinstance(args[0], OnGpu) and isinstance(args[1], list):
            return args[0][torch.tensor(args[1]).to(GPU)]
        if function is not F.scaled_dot_product_attention or not isinstance(args[0], OnGpu):
            return function(*args, **kwargs)
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        assert all(isinstance(each, OnGpu) for each in given), "attention: expected all tensors on one device"
        if torch.is_grad_enabled() and any(each.requires_grad for each in given):
            return attention(*args, **kwargs)
        own = tree_map(_own, (args, kwargs))
        return OnGpu(function(*own[0], **own[1]))


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None = None, *,
    is_causal: bool = False, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Compute attention by operations that can be differentiated one by one."""
    score = query @ key.transpose(-2, -1) * scale
    if is_causal:
        seen = torch.ones(score.shape[-2:], dtype=torch.bool, device=GPU).tril()
    return (score if seen is None else score.masked_fill(~seen, float("-inf"))).softmax(-1) @ value


@contextmanager
def pretended() -> Iterator[None]:
    """Pretend while the block runs."""
    fused = optimizer._get_fused_kernels_supported_devices()
    known = patch.object(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused, GPU.type])
    with known, _Operations(), _Functions():
        yield
