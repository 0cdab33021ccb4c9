"""Hold matrices as whole numbers of 8 or 4 bits on a GPU, with a scale for each row and 32 columns, as GGUF's blocks are.

Shape suffixes: T tokens, R rows, C columns, B blocks of 32 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..checkpoint.quantised import Codes
from ..checkpoint.tensors import StoredRows

BLOCK = 32
"""Columns that share a scale."""
PIECE_ELEMENTS = 16 << 20
"""Number of elements that are made wide at a time; they take four times as many bytes, several times over."""
ZERO = 128  # the code of 8 bits that stands for 0


class Coded:
    """Hold a matrix [R, C] of codes, uint8.

    A number of 8 bits is (code - 128) · scale. One of 4 bits is code · scale + least, and a byte holds two: columns 0 to 15 of
    each block in the low halves of its 16 bytes, the others in the high ones.
    """

    def __init__(self, parts: Sequence[Codes], dtype: torch.dtype, device: str) -> None:
        codes_RC = torch.cat([part.codes for part in parts])
        least = [part.least for part in parts if part.least is not None]
        rows, columns = codes_RC.shape
        self.shape = codes_RC.shape
        self.dtype = dtype
        self.narrow = bool(least)
        """True for 4 bits."""
        if self.narrow:
            low, high = codes_RC.view(rows, -1, 2, BLOCK // 2).unbind(2)
            codes_RC = (low | high << 4).view(rows, columns // 2)
        self.codes = codes_RC.contiguous().to(device)
        self.scales_RB = torch.cat([part.scales for part in parts]).half().to(device)
        self.least_RB = torch.cat(least).half().to(device) if least else None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales_RB.nbytes + (0 if self.least_RB is None else self.least_RB.nbytes)

    def wide(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return some rows of the matrix, by default all, in its model's dtype."""
        codes, scale_RB = self.codes[start:stop], self.scales_RB[start:stop].float()[..., None]
        if self.least_RB is None:
            numbers = (codes.view(*scale_RB.shape[:2], BLOCK).float() - ZERO) * scale_RB
        else:
            halves = codes.view(*scale_RB.shape[:2], BLOCK // 2)
            both = torch.cat((halves & 15, halves >> 4), -1).float()
            numbers = both * scale_RB + self.least_RB[start:stop].float()[..., None]
        return numbers.view(-1, self.shape[1]).to(self.dtype)

    def multiply(self, tokens_TC: torch.Tensor) -> torch.Tensor:
        """Return tokens times the matrix, [T, R]. Its rows are made wide for it, some at a time, so this is for many tokens."""
        step = max(1, PIECE_ELEMENTS // self.shape[1])
        parts = [F.linear(tokens_TC, self.wide(at, at + step)) for at in range(0, self.shape[0], step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def in_8_bits(weight_RC: torch.Tensor) -> Codes:
    """Round a matrix to 255 steps with a scale for each row and 32 columns, as GGUF's Q8_0."""
    wide = _in_blocks(weight_RC)
    scale_RB = (wide.abs().amax(-1) / 127).half().float()
    whole = torch.where(scale_RB[..., None] > 0, wide / scale_RB[..., None], 0.0).round().clamp(-ZERO, ZERO - 1)
    return Codes((whole + ZERO).to(torch.uint8).flatten(1), scale_RB, None)


def in_4_bits(weight_RC: torch.Tensor) -> Codes:
    """Round a matrix to 16 steps between the least and the largest of each row's 32 columns, as GGUF's Q4_1."""
    wide = _in_blocks(weight_RC)
    least_RB, most_RB = wide.amin(-1), wide.amax(-1)
    scale_RB, least_RB = ((most_RB - least_RB) / 15).half().float(), least_RB.half().float()
    steps = torch.where(scale_RB[..., None] > 0, (wide - least_RB[..., None]) / scale_RB[..., None], 0.0).round()
    return Codes(steps.clamp(0, 15).to(torch.uint8).flatten(1), scale_RB, least_RB)


def of_blocks(part: StoredRows) -> Codes:
    """Return the codes of rows in GGUF's blocks of type Q4_0, Q4_1 or Q8_0. Nothing is rounded."""
    nbytes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[part.stored]
    blocks = torch.from_numpy(part.data).view(part.rows, part.columns // BLOCK, nbytes)
    if part.order is not None:
        blocks = blocks[torch.from_numpy(part.order).long()]
    scale_RB = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    if part.stored == "Q8_0":
        return Codes((blocks[..., 2:].int() + ZERO).to(torch.uint8).flatten(1), scale_RB, None)  # its bytes wrap round
    halves = blocks[..., nbytes - BLOCK // 2 :]
    codes_RC = torch.cat((halves & 15, halves >> 4), -1).flatten(1)
    stored = part.stored == "Q4_1"
    return Codes(
        codes_RC,
        scale_RB,
        blocks[..., 2:4].contiguous().view(torch.float16)[..., 0].float() if stored else -8 * scale_RB,
    )


def _in_blocks(weight_RC: torch.Tensor) -> torch.Tensor:
    return weight_RC.float().reshape(weight_RC.shape[0], -1, BLOCK)
