"""Say how the numbers, zeros and scales of each quantised form lie in a file.

The formulas are those of the packages that write the files; each class names its source. What the packages compute in the
dtype of the model is computed here in float32, without the rounding in between.

Shape suffixes: R rows (outputs of the layer), C columns (its inputs), G groups, B blocks of 32 columns, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .quantised import BLOCK, Form, Whole, array, bits
from .tensors import TensorEntry

if TYPE_CHECKING:
    import torch

Parts = Mapping[str, TensorEntry]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Numbers of four bits: one of sign, two of exponent, one of mantissa (OCP Microscaling Formats 1.0)."""


def expect(parts: Parts, name: str, shape: tuple[int, ...], *dtypes: str) -> None:
    """Check one part.

    Raises:
        CheckpointError: it is missing, or has another shape or dtype.
    """
    entry = parts.get(name)
    if entry is None:
        first = next(iter(parts.values()))
        raise CheckpointError(f"{first.file}: tensor {first.name} needs a tensor {name} beside it, which is missing")
    if entry.shape != shape or entry.stored not in dtypes:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name}: expected {' or '.join(dtypes)}{list(shape)}, got {entry.stored}"
            f"{list(entry.shape)}"
        )


SCALES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Grouped(Form):
    """Describe whole numbers in groups of columns; subclasses say how they are packed.

    `group` is the number of columns of a group; 0: all columns. `symmetric`: the middle of the range is zero.
    """

    bits: int
    group: int
    symmetric: bool

    @property
    def stored(self) -> str:
        return f"packed int{self.bits}"

    def groups(self, columns: int) -> int:
        return -(-columns // self.group) if self.group else 1

    def _group_of(self, parts: Parts, columns: int) -> torch.Tensor:
        """Return the group of each column."""
        import torch

        if "g_idx" in parts:
            return array(parts["g_idx"]).long()
        return torch.arange(columns) // (self.group or columns)

    def _numbers(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """Return numbers of some rows, without their zeros subtracted, [R, C]."""
        raise NotImplementedError

    def _zeros(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """Return the zeros of some rows, [R, G]."""
        raise NotImplementedError

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """Return the scales of some rows, [R, G]."""
        raise NotImplementedError

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        group = self._group_of(parts, self.shape(parts)[1])
        numbers = self._numbers(parts, start, stop).float() - self._zeros(parts, start, stop).float()[:, group]
        return numbers * self._scales(parts, start, stop).float()[:, group]

    def whole(self, parts: Parts) -> Whole | None:
        import torch

        rows, columns = self.shape(parts)
        group = self._group_of(parts, columns)
        by_block = group.view(-1, BLOCK)
        if not bool((by_block == by_block[:, :1]).all()):
            return None  # some block of 32 columns belongs to two groups
        of_block = by_block[:, 0]
        return Whole(
            self._numbers(parts, 0, rows).to(torch.int16),
            self._zeros(parts, 0, rows).to(torch.int16)[:, of_block],
            self._scales(parts, 0, rows).float()[:, of_block],
        )

    def check_groups(self, parts: Parts, columns: int) -> None:
        """Check the groups of columns.

        Raises:
            CheckpointError: their size does not fit, or a column belongs to a group that does not exist.
        """
        first = next(iter(parts.values()))
        if self.group < 0 or (self.group and columns % self.group and "g_idx" not in parts):
            raise CheckpointError(
                f"{first.file}: tensor {first.name}: expected groups that divide {columns} columns, got groups of {self.group}"
            )
        if "g_idx" in parts:
            expect(parts, "g_idx", (columns,), "int32", "int64")
            found = array(parts["g_idx"])
            if columns and not 0 <= int(found.min()) <= int(found.max()) < self.groups(columns):
                entry = parts["g_idx"]
                raise CheckpointError(
                    f"{entry.file}: tensor {entry.name}: expected groups from 0 to {self.groups(columns) - 1}, got "
                    f"{int(found.min())} to {int(found.max())}"
                )


@dataclass(frozen=True, slots=True)
class GPTQ(Grouped):
    """Describe GPTQ's form: numbers packed along the columns, transposed (auto_gptq's `qlinear_cuda.py`).

    In its first version (`v1`), zeros are stored minus one.
    """

    v1: bool = True

    @property
    def stored(self) -> str:
        return f"gptq int{self.bits}"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        weight = parts["qweight"]
        if weight.stored != "int32" or len(weight.shape) != 2 or weight.shape[0] * 32 % self.bits:
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name}: expected int32[rows, columns], got {weight.stored}{list(weight.shape)}"
            )
        columns, rows = weight.shape[0] * 32 // self.bits, weight.shape[1]
        self.check_groups(parts, columns)
        groups = self.groups(columns)
        expect(parts, "scales", (groups, rows), *SCALES)
        expect(parts, "qzeros", (groups, rows * self.bits // 32), "int32")
        return rows, columns

    def _numbers(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        words = array(parts["qweight"])[:, start:stop]
        return bits(words, self.bits, 0, words.shape[0] * 32 // self.bits).t()

    def _zeros(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        zeros = bits(array(parts["qzeros"]), self.bits, 1, parts["scales"].shape[1])[:, start:stop].int()
        if self.v1:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        return zeros.t()

    def check(self, parts: Parts) -> None:
        middle = 1 << (self.bits - 1)
        zeros = self._zeros(parts, 0, parts["scales"].shape[1])
        if self.symmetric and bool((zeros != middle).any()):
            entry = parts["qzeros"]
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name}: expected the zero {middle} of a symmetric model, got "
                f"{int(zeros[zeros != middle][0])}: its checkpoint_format is not {'gptq' if self.v1 else 'gptq_v2'}"
            )

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return array(parts["scales"])[:, start:stop].t()


@dataclass(frozen=True, slots=True)
class AWQ(Grouped):
    """Describe AWQ's form: four bits packed along the rows, eight at a time in an order of their own, transposed.

    Source: `awq/modules/linear/gemm.py` of AutoAWQ.
    """

    @property
    def stored(self) -> str:
        return "awq int4"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        weight = parts["qweight"]
        if weight.stored != "int32" or len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name}: expected int32[columns, rows / 8], got {weight.stored}"
                f"{list(weight.shape)}"
            )
        columns, rows = weight.shape[0], weight.shape[1] * 8
        self.check_groups(parts, columns)
        groups = self.groups(columns)
        expect(parts, "scales", (groups, rows), *SCALES)
        expect(parts, "qzeros", (groups, rows // 8), "int32")
        return rows, columns

    def _numbers(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return self._unpacked(parts["qweight"], start, stop)

    def _zeros(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return self._unpacked(parts["qzeros"], start, stop)

    def _unpacked(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        first, last = start // 8, -(-stop // 8)
        words = array(entry)[:, first:last]
        made = bits(words, 4, 1, 8 * words.shape[1]).view(len(words), -1, 8)[..., [0, 4, 1, 5, 2, 6, 3, 7]]
        return made.flatten(1)[:, start - 8 * first : stop - 8 * first].t()

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return array(parts["scales"])[:, start:stop].t()


@dataclass(frozen=True, slots=True)
class AWQRows(Grouped):
    """Describe AWQ's other form, `gemv`: four bits packed along the columns (`awq/modules/linear/gemv.py`)."""

    @property
    def stored(self) -> str:
        return "awq int4"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        weight = parts["qweight"]
        if weight.stored != "int32" or len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name}: expected int32[rows, columns / 8], got {weight.stored}"
                f"{list(weight.shape)}"
            )
        rows, columns = weight.shape[0], weight.shape[1] * 8
        self.check_groups(parts, columns)
        words = -(-self.groups(columns) // 8)
        repeat = {64: 2, 32: 4}.get(self.group, 1)
        words = -(-words // repeat) * repeat
        expect(parts, "qzeros", (rows, words), "int32")
        expect(parts, "scales", (rows, words * 8), *SCALES)
        return rows, columns

    def _numbers(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        words = array(parts["qweight"])[start:stop]
        return bits(words, 4, 1, 8 * words.shape[1])

    def _zeros(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        words = array(parts["qzeros"])[start:stop]
        return bits(words, 4, 1, 8 * words.shape[1])

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return array(parts["scales"])[start:stop]


@dataclass(frozen=True, slots=True)
class PackedRows(Grouped):
    """Describe compressed-tensors' `pack-quantized`: numbers plus half their range, packed along the columns.

    Zeros are packed along the rows (`compressors/pack_quantized`).
    """

    def shape(self, parts: Parts) -> tuple[int, ...]:
        weight, said = parts["weight_packed"], parts.get("weight_shape")
        per_word = 32 // self.bits
        if said is None:
            expect(parts, "weight_shape", (2,), "int64")
        assert said is not None
        expect(parts, "weight_shape", (2,), "int64", "int32")
        rows, columns = (int(size) for size in array(said))
        if weight.stored != "int32" or weight.shape != (rows, -(-columns // per_word)) or rows < 1 or columns < 1:
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name}: expected int32[{rows}, {-(-columns // per_word)}] for weights "
                f"[{rows}, {columns}], got {weight.stored}{list(weight.shape)}"
            )
        self.check_groups(parts, columns)
        groups = self.groups(columns)
        expect(parts, "weight_scale", parts["weight_scale"].shape if self._one(parts) else (rows, groups), *SCALES)
        if not self.symmetric:
            zero = parts.get("weight_zero_point")
            unpacked = zero is not None and zero.stored == "int8"
            expect(parts, "weight_zero_point", (rows if unpacked else -(-rows // per_word), groups), "int32", "int8")
        return rows, columns

    def _one(self, parts: Parts) -> bool:
        return "weight_scale" in parts and not self.group and parts["weight_scale"].shape in ((), (1,))

    def _numbers(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        columns = self.shape(parts)[1]
        return bits(array(parts["weight_packed"])[start:stop], self.bits, 1, columns)

    def _zeros(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        import torch

        middle = 1 << (self.bits - 1)
        if self.symmetric:
            return torch.full((stop - start, self.groups(self.shape(parts)[1])), middle)
        if parts["weight_zero_point"].stored == "int8":
            return array(parts["weight_zero_point"])[start:stop].int() + middle
        return bits(array(parts["weight_zero_point"]), self.bits, 0, self.shape(parts)[0])[start:stop]

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        scale = array(parts["weight_scale"])
        return scale.view(1, 1).expand(stop - start, 1) if self._one(parts) else scale[start:stop]


@dataclass(frozen=True, slots=True)
class Bytes(Grouped):
    """Describe whole numbers of a byte each, with a scale for the matrix, a row or a group of columns.

    Source: compressed-tensors' `int-quantized` and `naive-quantized`.
    """

    def shape(self, parts: Parts) -> tuple[int, ...]:
        weight = parts["weight"]
        if weight.stored != "int8" or len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name}: expected int8[rows, columns], got {weight.stored}{list(weight.shape)}"
            )
        rows, columns = weight.shape
        self.check_groups(parts, columns)
        for name in ("weight_scale", *(() if self.symmetric else ("weight_zero_point",))):
            found = parts.get(name)
            one = found is not None and not self.group and found.shape in ((), (1,))
            shape = found.shape if one and found is not None else (rows, self.groups(columns))
            expect(parts, name, shape, *(SCALES if name == "weight_scale" else ("int8", "int32")))
        return rows, columns

    def _numbers(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return array(parts["weight"])[start:stop]

    def _zeros(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        import torch

        if self.symmetric:
            return torch.zeros(stop - start, self.groups(parts["weight"].shape[1]))
        return self._by_row(parts["weight_zero_point"], start, stop)

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return self._by_row(parts["weight_scale"], start, stop)

    def _by_row(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        found = array(entry)
        return found.view(1, 1).expand(stop - start, 1) if found.numel() == 1 else found[start:stop]


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
        weight = parts["weight"]
        if len(weight.shape) != 2:
            raise CheckpointError(f"{weight.file}: tensor {weight.name}: expected a matrix, got {list(weight.shape)}")
        rows, columns = weight.shape
        dtypes = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
        if self.block is None:
            found = parts.get(self.scale)
            known = found is not None and found.shape in ((), (1,), (rows,))
            expect(parts, self.scale, found.shape if known and found is not None else (rows, 1), *dtypes)
        else:
            expect(parts, self.scale, (-(-rows // self.block[0]), -(-columns // self.block[1])), *dtypes)
        return rows, columns

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        import torch

        numbers = array(parts["weight"])[start:stop].float()
        scale = _scale(parts[self.scale])
        if self.block is None:
            return numbers * (scale.view(1, 1) if scale.numel() == 1 else scale.view(-1, 1)[start:stop])
        of_row = torch.arange(start, stop) // self.block[0]
        of_column = torch.arange(numbers.shape[1]) // self.block[1]
        return numbers * scale[of_row][:, of_column]

    def whole(self, parts: Parts) -> Whole | None:
        return None


def _scale(entry: TensorEntry) -> torch.Tensor:
    """Return scales as float32; bytes are powers of two."""
    import torch

    found = array(entry)
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
        weight = parts[self.weight]
        if weight.stored != "uint8" or len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name}: expected uint8[rows, columns / 2], got {weight.stored}"
                f"{list(weight.shape)}"
            )
        rows, columns = weight.shape[0], weight.shape[1] * 2
        kinds = ("float8_e4m3fn",) if self.whole_scale else ("uint8", "float8_e8m0fnu")
        expect(parts, self.scale, (rows, -(-columns // self.group)), *kinds)
        if self.whole_scale:
            found = parts.get(self.whole_scale)
            expect(parts, self.whole_scale, found.shape if found and found.shape in ((), (1,)) else (), "float32")
        return rows, columns

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        numbers = _fp4(array(parts[self.weight])[start:stop])
        scale = self._scales(parts, start, stop)
        return numbers * scale.repeat_interleave(self.group, 1)[:, : numbers.shape[1]]

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        scale = _scale(parts[self.scale])[start:stop]
        if self.whole_scale:
            whole = array(parts[self.whole_scale]).float().view(())
            scale = scale / whole if self.divides else scale * whole
        return scale

    def whole(self, parts: Parts) -> Whole | None:
        import torch

        if self.group % BLOCK:
            return None
        rows, columns = self.shape(parts)
        scale = self._scales(parts, 0, rows).repeat_interleave(self.group // BLOCK, 1)
        zeros = torch.zeros(rows, columns // BLOCK, dtype=torch.int16)
        return Whole((_fp4(array(parts[self.weight])) * 2).to(torch.int16), zeros, scale / 2)


def _fp4(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers of bytes along the last dimension, float32."""
    import torch

    both = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    return torch.tensor(FP4)[both]


@dataclass(frozen=True, slots=True)
class ExpertsFloat4(Form):
    """Describe the experts of gpt-oss in MXFP4: `blocks` [E, rows, G, 16] and `scales` [E, rows, G], transposed.

    Source: `_convert_moe_packed_tensors` of transformers' `integrations/mxfp4.py`.
    """

    @property
    def stored(self) -> str:
        return "mxfp4"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        blocks = parts["blocks"]
        if blocks.stored != "uint8" or len(blocks.shape) != 4 or blocks.shape[3] != 16:
            raise CheckpointError(
                f"{blocks.file}: tensor {blocks.name}: expected uint8[experts, rows, groups, 16], got {blocks.stored}"
                f"{list(blocks.shape)}"
            )
        experts, rows, groups, _ = blocks.shape
        expect(parts, "scales", (experts, rows, groups), "uint8")
        return experts, groups * 32, rows

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """Return rows of [E * columns, rows], one expert after the other."""
        import torch

        _, columns, _ = self.shape(parts)
        made, blocks, scales = [], array(parts["blocks"]), _scale(parts["scales"])
        for expert in range(start // columns, -(-stop // columns)):
            numbers = _fp4(blocks[expert]) * scales[expert][..., None]
            first, last = max(0, start - expert * columns), min(columns, stop - expert * columns)
            made.append(numbers.flatten(1).t()[first:last])
        return torch.cat(made)

    def whole(self, parts: Parts) -> Whole | None:
        return None
