"""Pack weights, and multiply them with tokens in C, on processors with AVX2 or AVX-512 (product.h).

A product takes 16 rows at a time and reads each weight once for several tokens. A step through a group of layers is a single
call (step.c). With torch's own operations, overhead outside the products took two thirds of a decoding step
(benchmarks/one_stream.py). If the processor has no such instructions, or if there was no compiler when the package was
installed, torch computes everything.

Shape suffixes: T tokens, R rows, C columns, B blocks of 32 columns.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ranvier.actors.checkpoint.quantised import Codes
from ranvier.actors.checkpoint.tensors import StoredRows

from ..coded import BLOCK, in_4_bits, in_8_bits
from . import native
from .pages import fresh

TILE = 16
HELD = 256
"""Positions in a block of a cache (attend.c)."""
BFLOAT16, INT8, INT4 = range(3)
CHUNK_BYTES = 16 << 20
"""Memory that is requested from the system at once for weights."""
BITS = {BFLOAT16: 16, INT8: 8, INT4: 4}


class Matrix(ctypes.Structure):
    """Describe a packed matrix to C (`Matrix` of product.h)."""

    _fields_ = (
        ("kind", ctypes.c_int32), ("rows", ctypes.c_int32), ("columns", ctypes.c_int32), ("fast", ctypes.c_int32),
        ("data", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("least", ctypes.c_void_p),
    )  # fmt: skip


@functools.cache
def library() -> Any:
    """Return the compiled functions, with as many threads as torch has; None if they cannot be used."""
    loaded = native.library()
    if loaded is not None:
        loaded.ranvier_threads(torch.get_num_threads())
    return loaded


def rest(microseconds: int) -> None:
    """Let the threads beside the caller's wait so long for the next step before they sleep."""
    if (loaded := library()) is not None:
        loaded.ranvier_rest(microseconds)


class Packed:
    """Hold a matrix [R, C] as the products need it.

    `kind` is bfloat16, or whole numbers of 8 or 4 bits. These have a scale, and those of 4 bits a least value, for each row
    and 32 columns.
    """

    def __init__(
        self, kind: int, data: torch.Tensor, rows: int, columns: int,
        scales: torch.Tensor | None = None, least: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.kind = kind
        self.shape = (rows, columns)
        self._held = [tensor for tensor in (data, scales, least) if tensor is not None]
        pointers = [tensor.data_ptr() if tensor is not None else None for tensor in (data, scales, least)]
        self.matrix = Matrix(kind, rows, columns, False, *pointers)
        self._at = ctypes.byref(self.matrix)
        self._room = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held)

    def rows(self, index_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows [T, C] in float32 or bfloat16.

        Raises:
            IndexError: there is no such row.
        """
        wanted_T = index_T.long().contiguous()
        rows = self.shape[0]
        wrong = next((row for row in wanted_T.tolist() if not 0 <= row < rows), None)
        if wrong is not None:  # C would read memory beside the matrix
            raise IndexError(f"expected rows from 0 to {rows - 1}, got {wrong}")
        made_TC = torch.empty(len(wanted_T), self.shape[1], dtype=dtype)
        narrow = dtype is torch.bfloat16
        library().ranvier_rows(self._at, wanted_T.data_ptr(), len(wanted_T), narrow, made_TC.data_ptr())
        return made_TC

    def multiply(self, tokens_TC: torch.Tensor) -> torch.Tensor:
        """Return the products [T, R] in the dtype of the tokens."""
        rows, columns = self.shape
        wide = tokens_TC.float().contiguous()
        made = torch.empty(wide.shape[0], rows)
        count = wide.shape[0]
        room = torch.empty(library().ranvier_product_room(count, columns), dtype=torch.uint8)
        library().ranvier_multiply(self._at, wide.data_ptr(), count, made.data_ptr(), room.data_ptr())
        return made.to(tokens_TC.dtype)

    def after_norm(
        self, tokens_TC: torch.Tensor, weight_C: torch.Tensor, shift_C: torch.Tensor | None, centred: bool, eps: float
    ) -> torch.Tensor:
        """Return the products [T, R] with the norm of the tokens, in float32 throughout.

        The tokens are in bfloat16 or float32. `weight_C` and `shift_C` of the norm are in float32.
        """
        count, columns = tokens_TC.shape
        tokens_TC = tokens_TC.contiguous()
        made_TR = torch.empty(count, self.shape[0])
        needed = library().ranvier_head_room(count, columns)
        if self._room.numel() < needed:
            self._room = torch.empty(needed, dtype=torch.uint8)
        library().ranvier_head(
            self._at, weight_C.data_ptr(), shift_C.data_ptr() if shift_C is not None else None, centred, eps,
            tokens_TC.data_ptr(), tokens_TC.dtype is torch.bfloat16, count, made_TR.data_ptr(), self._room.data_ptr(),
        )  # fmt: skip
        return made_TR


def pack_bfloat16(weight_RC: torch.Tensor) -> Packed:
    """Pack a matrix, rounded to bfloat16."""
    narrow = weight_RC.to(torch.bfloat16).contiguous()
    rows, columns = narrow.shape
    data = _pages.take(rows * columns * 2)
    library().ranvier_pack_bfloat16(
        ctypes.c_void_p(narrow.data_ptr()), ctypes.c_int(rows), ctypes.c_int(columns), ctypes.c_void_p(data.data_ptr())
    )
    return Packed(BFLOAT16, data, rows, columns)


def pack_int8(weight_RC: torch.Tensor) -> Packed:
    """Pack a matrix, rounded as `in_8_bits` does."""
    return pack_codes([in_8_bits(weight_RC)], INT8)


def pack_int4(weight_RC: torch.Tensor) -> Packed:
    """Pack a matrix, rounded as `in_4_bits` does."""
    return pack_codes([in_4_bits(weight_RC)], INT4)


def pack_whole(
    kind: int, whole_RC: torch.Tensor, scale_RB: torch.Tensor, least_RB: torch.Tensor | None = None
) -> Packed:
    """Pack whole numbers, uint8 [R, C], with their scales and least values. For int8, 0 stands for -128."""
    rows, columns = whole_RC.shape
    data = _pages.take(rows * columns * BITS[kind] // 8)
    whole_RC = whole_RC.contiguous()  # a copy of it must live until C has read it
    library().ranvier_pack_whole(
        ctypes.c_void_p(whole_RC.data_ptr()), ctypes.c_int(rows), ctypes.c_int(columns), ctypes.c_int(kind),
        ctypes.c_void_p(data.data_ptr()),
    )  # fmt: skip
    return Packed(kind, data, rows, columns, _tiled(scale_RB), _tiled(least_RB) if least_RB is not None else None)


def pack_codes(parts: Sequence[Codes], kind: int) -> Packed:
    """Pack matrices of whole numbers as one, stacked by rows. Nothing is rounded."""
    codes_RC, scale_RB = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    least = [part.least for part in parts if part.least is not None]
    return pack_whole(kind, codes_RC, scale_RB, torch.cat(least) if least else None)


STORED = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2}
"""GGUF's types that the kernels read, with their numbers in pack.c."""


def pack_stored(parts: Sequence[StoredRows], kind: int) -> Packed:
    """Pack matrices of GGUF blocks as one, stacked by rows. The rows of each matrix must fill whole tiles.

    `kind` bfloat16 rounds them; int8 (for Q8_0) and int4 (for the others) keep the numbers of the file.
    """
    rows, columns = sum(part.rows for part in parts), parts[0].columns
    data = _pages.take(rows * columns * BITS[kind] // 8)
    if kind == BFLOAT16:
        start = 0
        for part in parts:
            _read_blocks(part, True, data.data_ptr() + 2 * start * columns)
            start += part.rows
        return Packed(kind, data, rows, columns)
    shape = rows // TILE, columns // BLOCK, TILE
    scales, least = (_pages.take(2 * math.prod(shape)).view(torch.float16).view(shape) for _ in range(2))
    start = 0
    for part in parts:
        small = 2 * start * columns // BLOCK
        library().ranvier_pack_blocks(
            ctypes.c_void_p(part.data.ctypes.data), ctypes.c_int(STORED[part.stored]), ctypes.c_int(part.rows),
            ctypes.c_int(columns), _order(part), ctypes.c_void_p(data.data_ptr() + start * columns * BITS[kind] // 8),
            ctypes.c_void_p(scales.data_ptr() + small), ctypes.c_void_p(least.data_ptr() + small),
        )  # fmt: skip
        start += part.rows
    return Packed(kind, data, rows, columns, scales, least if kind == INT4 else None)


def read_stored(part: StoredRows) -> torch.Tensor:
    """Return the numbers of GGUF blocks as bfloat16 [R, C]."""
    made = torch.empty(part.rows, part.columns, dtype=torch.bfloat16)
    _read_blocks(part, False, made.data_ptr())
    return made


def _read_blocks(part: StoredRows, tiled: bool, to: int) -> None:
    library().ranvier_read_blocks(
        ctypes.c_void_p(part.data.ctypes.data), ctypes.c_int(STORED[part.stored]), ctypes.c_int(part.rows),
        ctypes.c_int(part.columns), _order(part), ctypes.c_int(tiled), ctypes.c_void_p(to),
    )  # fmt: skip


def _order(part: StoredRows) -> ctypes.c_void_p:
    return ctypes.c_void_p(part.order.ctypes.data if part.order is not None else None)


class _LargePages:
    """Give out memory for weights, in large pages: a step reads all weights."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] that begins at a multiple of 64 bytes."""
        if nbytes > self._left.numel():
            self._left = fresh(max(nbytes, CHUNK_BYTES), large_from=0)
        taken, self._left = self._left[:nbytes], self._left[-(-nbytes // 64) * 64 :]
        return taken


_pages = _LargePages()


def _tiled(by_block_RB: torch.Tensor) -> torch.Tensor:
    """Return scales or least values in tiles: float16 [R / 16, B, 16]."""
    tiled = by_block_RB.half().view(-1, TILE, by_block_RB.shape[1]).transpose(1, 2)
    return _pages.take(2 * tiled.numel()).view(torch.float16).view(tiled.shape).copy_(tiled)
