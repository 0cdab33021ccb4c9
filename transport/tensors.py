"""torch tensors to buffers and back, without copying.

A tensor handed to the wire must not be written to until it is acknowledged; a tensor made from a received buffer is
a view of the message's own bytes and must never be written in place.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .codec import RAW
from .dtypes import BY_NAME, TABLE
from .header import TensorMeta
from .message import COPY_BELOW_BYTES, Buffer

_TORCH: tuple[torch.dtype, ...] = tuple(getattr(torch, row.name) for row in TABLE)
_NUMBER: dict[torch.dtype, int] = {dtype: number for number, dtype in enumerate(_TORCH)}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name from the table. Raises KeyError for any other name."""
    return _TORCH[BY_NAME[name].number]


def to_buffer(name: str, tensor: torch.Tensor) -> tuple[TensorMeta, Buffer]:
    """The meta of `tensor` (any shape, any strides, in host memory) and a view of its bytes.

    Copied only if it is not contiguous, or so small that a copy is cheaper than a view. Raises ValueError for a dtype
    that is not in the table.
    """
    meta = _meta(name, tensor.dtype, tensor.shape)
    nbytes = meta.nbytes
    if nbytes == 0:
        return meta, b""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    if nbytes < COPY_BELOW_BYTES:  # ZeroMQ would copy it anyway, and so it takes 1 µs instead of 5
        return meta, ctypes.string_at(tensor.data_ptr(), nbytes)
    if tensor.dtype is torch.bfloat16:  # numpy knows none: the bytes are what is sent, so integers will do
        tensor = tensor.view(torch.int16)
    return meta, tensor.numpy().data.cast("B")


@functools.lru_cache(maxsize=1024)  # an edge carries the same few shapes over and over: 0.2 µs instead of 1.5
def _meta(name: str, dtype: torch.dtype, shape: torch.Size) -> TensorMeta:
    number = _NUMBER.get(dtype)
    if number is None:
        raise ValueError(f"tensor {name}: dtype {dtype} may not be sent; one of {', '.join(map(str, _NUMBER))}")
    return TensorMeta(name, number, tuple(shape), RAW, shape.numel() * dtype.itemsize)


def from_buffer(meta: TensorMeta, buffer: Buffer) -> torch.Tensor:
    """The tensor whose bytes are in `buffer`: a view, kept alive by the tensor. The caller has checked the length."""
    if meta.nbytes == 0:
        return torch.empty(meta.shape, dtype=_TORCH[meta.dtype])
    return torch.frombuffer(buffer, dtype=_TORCH[meta.dtype]).view(meta.shape)
