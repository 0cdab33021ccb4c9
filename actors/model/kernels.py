"""Packed weights and their products with tokens, in C (kernels.c), for processors with AVX2 or AVX-512.

A product of 16 rows at a time reads each weight once for some tokens, and a step through a group of layers is a single call:
torch's own operations took two thirds of a decoding step's time before any number was multiplied (benchmarks/text.py).
Without such a processor, or a compiler when the package was installed, torch does it all.

Shape suffixes: T tokens, R rows, C columns, B blocks of 32 columns.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from . import native

TILE, BLOCK = 16, 32
BFLOAT16, INT8, INT4 = range(3)
BITS = {BFLOAT16: 16, INT8: 8, INT4: 4}


class Matrix(ctypes.Structure):
    """`Matrix` of kernels.c."""

    _fields_ = (
        ("kind", ctypes.c_int32), ("rows", ctypes.c_int32), ("columns", ctypes.c_int32),
        ("data", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("least", ctypes.c_void_p),
    )  # fmt: skip


@functools.cache
def library() -> Any:
    """The compiled functions, with as many threads as torch has; None where they cannot be used."""
    loaded = native.library()
    if loaded is not None:
        loaded.ranvier_threads(torch.get_num_threads())
    return loaded


class Packed:
    """A matrix [R, C] as the products want it. `kind`: bfloat16, or whole numbers of 8 or 4 bits with a scale (and, of 4
    bits, a least value) for each row and 32 columns."""

    def __init__(
        self, kind: int, data: torch.Tensor, rows: int, columns: int,
        scales: torch.Tensor | None = None, least: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.kind = kind
        self.shape = (rows, columns)
        self._held = [tensor for tensor in (data, scales, least) if tensor is not None]
        pointers = [tensor.data_ptr() if tensor is not None else None for tensor in (data, scales, least)]
        self.matrix = Matrix(kind, rows, columns, *pointers)
        self._at = ctypes.byref(self.matrix)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held)

    def multiply(self, tokens_TC: torch.Tensor) -> torch.Tensor:
        """[T, R] in the dtype of the tokens."""
        rows, columns = self.shape
        wide = tokens_TC.float().contiguous()
        made = torch.empty(wide.shape[0], rows)
        room = torch.empty(wide.shape[0] * 3 * columns + 64, dtype=torch.uint8)
        library().ranvier_multiply(
            self._at, ctypes.c_void_p(wide.data_ptr()), ctypes.c_int(wide.shape[0]), ctypes.c_void_p(made.data_ptr()),
            ctypes.c_void_p(room.data_ptr()),
        )  # fmt: skip
        return made.to(tokens_TC.dtype)


def pack_bfloat16(weight_RC: torch.Tensor) -> Packed:
    """A matrix of numbers as bfloat16."""
    narrow = weight_RC.to(torch.bfloat16).contiguous()
    rows, columns = narrow.shape
    data = torch.empty(rows * columns, dtype=torch.bfloat16)
    library().ranvier_pack_bfloat16(
        ctypes.c_void_p(narrow.data_ptr()), ctypes.c_int(rows), ctypes.c_int(columns), ctypes.c_void_p(data.data_ptr())
    )
    return Packed(BFLOAT16, data, rows, columns)


def pack_int8(weight_RC: torch.Tensor) -> Packed:
    """Rounded to 255 steps: a scale for each row and 32 columns (as GGUF's Q8_0)."""
    wide = _in_blocks(weight_RC)
    scale_RB = (wide.abs().amax(-1) / 127).half().float()
    whole = torch.where(scale_RB[..., None] > 0, wide / scale_RB[..., None], 0.0).round().clamp(-128, 127)
    return pack_whole(INT8, (whole + 128).to(torch.uint8).flatten(1), scale_RB)


def pack_int4(weight_RC: torch.Tensor) -> Packed:
    """Rounded to 16 steps between the least and the largest of each row's 32 columns (as GGUF's Q4_1)."""
    wide = _in_blocks(weight_RC)
    least_RB, most_RB = wide.amin(-1), wide.amax(-1)
    scale_RB, least_RB = ((most_RB - least_RB) / 15).half().float(), least_RB.half().float()
    steps = torch.where(scale_RB[..., None] > 0, (wide - least_RB[..., None]) / scale_RB[..., None], 0.0).round()
    return pack_whole(INT4, steps.clamp(0, 15).to(torch.uint8).flatten(1), scale_RB, least_RB)


def pack_whole(
    kind: int, whole_RC: torch.Tensor, scale_RB: torch.Tensor, least_RB: torch.Tensor | None = None
) -> Packed:
    """Whole numbers from 0 (int8: what stands for -128) on, uint8 [R, C], with their scales and least values."""
    rows, columns = whole_RC.shape
    data = torch.empty(rows * columns * BITS[kind] // 8, dtype=torch.uint8)
    library().ranvier_pack_whole(
        ctypes.c_void_p(whole_RC.contiguous().data_ptr()), ctypes.c_int(rows), ctypes.c_int(columns), ctypes.c_int(kind),
        ctypes.c_void_p(data.data_ptr()),
    )  # fmt: skip
    return Packed(kind, data, rows, columns, _tiled(scale_RB), _tiled(least_RB) if least_RB is not None else None)


def _tiled(by_block_RB: torch.Tensor) -> torch.Tensor:
    """float16 [R / 16, B, 16]."""
    return by_block_RB.half().view(-1, TILE, by_block_RB.shape[1]).transpose(1, 2).contiguous()


def _in_blocks(weight_RC: torch.Tensor) -> torch.Tensor:
    return weight_RC.float().reshape(weight_RC.shape[0], -1, BLOCK)
