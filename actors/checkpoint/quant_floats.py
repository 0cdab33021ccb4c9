"""Say how small floating-point numbers and their scales lie in a file, for each form that has them.

Shape suffixes: R rows (outputs of the layer), C columns (its inputs), G groups, B blocks of 32 columns, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .quantised import BLOCK, Form, Parts, expect, mapped, matrix, part
from .tensors import TensorEntry

if TYPE_CHECKING:
    import torch

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Numbers of four bits: one of sign, two of exponent, one of mantissa (OCP Microscaling Formats 1.0)."""


@dataclass(frozen=True, slots=True)
class Float8(Form):
    """Describe numbers of eight bits of floating point, with a scale for the matrix, each row, or each block.

    `block` has the rows and columns of a block; at the edges blocks may be smaller. `scale` is the name of the scales, which
    are factors, also where the name ends in `_inv`. Source: compressed-tensors' `FP8BlockDequantizer`, DeepSeek's
    `kernel.py`.
    """

    block: tuple[int, int] | None
    scale: str

    @property
    def stored(self) -> str:
        return "fp8"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        rows, columns = matrix(parts, "weight", "float8_e4m3fn", "rows, columns").shape
        dtypes = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
        if self.block is None:
            found = parts.get(self.scale)
            known = found is not None and found.shape in ((), (1,), (rows,))
            expect(parts, self.scale, found.shape if known and found is not None else (rows, 1), *dtypes)
        else:
            expect(parts, self.scale, (-(-rows // self.block[0]), -(-columns // self.block[1])), *dtypes)
        return rows, columns

    def rows(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        import torch

        numbers = mapped(parts["weight"])[start:stop].float()
        scale = _scale(parts[self.scale])
        if self.block is None:
            return numbers * (scale.view(1, 1) if scale.numel() == 1 else scale.view(-1, 1)[start:stop])
        of_row = torch.arange(start, stop) // self.block[0]
        of_column = torch.arange(numbers.shape[1]) // self.block[1]
        return numbers * scale[of_row][:, of_column]


def _scale(entry: TensorEntry) -> torch.Tensor:
    """Return scales as float32; bytes are powers of two."""
    import torch

    found = mapped(entry)
    return (found.view(torch.float8_e8m0fnu) if entry.stored == "uint8" else found).float()


@dataclass(frozen=True, slots=True)
class Float4(Form):
    """Describe numbers of four bits of floating point, two in a byte, the first in its low half.

    Each `group` of columns has a scale: a power of two (MXFP4), or a number of eight bits times a scale of the whole matrix
    (NVFP4), which compressed-tensors divides by. Sources: transformers' `integrations/mxfp4.py`, modelopt's
    `nvfp4_tensor.py`, compressed-tensors' `compressors/nvfp4`.
    """

    group: int
    weight: str
    scale: str
    whole_scale: str = ""
    divides: bool = False

    @property
    def stored(self) -> str:
        return "nvfp4" if self.whole_scale else "mxfp4"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        weight = matrix(parts, self.weight, "uint8", "rows, columns / 2")
        rows, columns = weight.shape[0], weight.shape[1] * 2
        kinds = ("float8_e4m3fn",) if self.whole_scale else ("uint8", "float8_e8m0fnu")
        expect(parts, self.scale, (rows, -(-columns // self.group)), *kinds)
        if self.whole_scale:
            found = parts.get(self.whole_scale)
            expect(parts, self.whole_scale, found.shape if found and found.shape in ((), (1,)) else (), "float32")
        return rows, columns

    def rows(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        numbers = _fp4(mapped(parts[self.weight])[start:stop])
        scale = self._scales(parts, start, stop)
        if shape[1] % self.group:
            return numbers * scale.repeat_interleave(self.group, 1)[:, : shape[1]]
        return (numbers.view(stop - start, -1, self.group) * scale[..., None]).view(stop - start, -1)

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        scale = _scale(parts[self.scale])[start:stop]
        if self.whole_scale:
            whole = mapped(parts[self.whole_scale]).float().view(())
            scale = scale / whole if self.divides else scale * whole
        return scale

    @property
    def range(self) -> tuple[int, int]:
        return -12, 12

    def blocks(self, parts: Parts, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        import torch

        if self.group % BLOCK:
            return None
        scales = self._scales(parts, 0, shape[0]).repeat_interleave(self.group // BLOCK, 1) / 2
        return torch.zeros_like(scales), scales

    def numbers(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        import torch

        return (_fp4(mapped(parts[self.weight])[start:stop]) * 2).to(torch.int16)  # halves are the finest numbers


def _fp4(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers of bytes along the last dimension, float32."""
    import torch

    pairs = torch.tensor([(FP4[byte & 15], FP4[byte >> 4]) for byte in range(256)])
    return pairs[packed.int()].flatten(-2)


@dataclass(frozen=True, slots=True)
class ExpertsFloat8(Form):
    """Describe the experts of a layer in one tensor [E, R, C] of eight bits of floating point.

    Scales are for each block, or [E, 1, 1], [E, R, 1] or [E, 1, C]. Source: transformers' `finegrained_fp8.py`.
    """

    block: tuple[int, int] | None

    @property
    def stored(self) -> str:
        return "fp8"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        experts, rows, columns = parts["weight"].shape
        found = parts["scale"].shape
        if self.block is not None:
            expected: tuple[int, ...] = (experts, -(-rows // self.block[0]), -(-columns // self.block[1]))
        else:
            known = ((experts,), (experts, 1, 1), (experts, rows, 1), (experts, 1, columns))
            expected = found if found in known else known[1]
        expect(parts, "scale", expected, "float32", "bfloat16", "float16", "float8_e8m0fnu")
        return experts, rows, columns

    def rows(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Return rows of [E * R, C], one expert after the other; all of an expert."""
        import torch

        _, rows, columns = shape
        made, scales = [], _scale(parts["scale"]).view(shape[0], -1) if self.block is None else _scale(parts["scale"])
        for expert in range(start // rows, -(-stop // rows)):
            numbers = mapped(parts["weight"])[expert].float()
            if self.block is None:
                scale = scales[expert].view(parts["scale"].shape[1:] or (1, 1))
            else:
                of_row, of_column = torch.arange(rows) // self.block[0], torch.arange(columns) // self.block[1]
                scale = scales[expert][of_row][:, of_column]
            made.append(numbers * scale)
        return torch.cat(made)[start % rows :][: stop - start]


@dataclass(frozen=True, slots=True)
class ExpertsFloat4(Form):
    """Describe the experts of gpt-oss in MXFP4: `blocks` [E, rows, G, 16] and `scales` [E, rows, G], transposed.

    Source: `_convert_moe_packed_tensors` of transformers' `integrations/mxfp4.py`.
    """

    @property
    def stored(self) -> str:
        return "mxfp4"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        blocks = part(parts, "blocks")
        if blocks.stored != "uint8" or len(blocks.shape) != 4 or blocks.shape[3] != 16:
            raise CheckpointError(
                f"{blocks.file}: tensor {blocks.name}: expected uint8[experts, rows, groups, 16], got {blocks.stored}"
                f"{list(blocks.shape)}"
            )
        experts, rows, groups, _ = blocks.shape
        expect(parts, "scales", (experts, rows, groups), "uint8")
        return experts, groups * 32, rows

    def rows(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Return rows of [E * columns, rows], one expert after the other."""
        import torch

        columns = shape[1]
        made, blocks, scales = [], mapped(parts["blocks"]), _scale(parts["scales"])
        for expert in range(start // columns, -(-stop // columns)):
            numbers = _fp4(blocks[expert]) * scales[expert][..., None]
            first, last = max(0, start - expert * columns), min(columns, stop - expert * columns)
            made.append(numbers.flatten(1).t()[first:last])
        return torch.cat(made)
