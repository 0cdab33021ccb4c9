"""Say how whole numbers, zeros and scales lie in a file, for each form that has them.

The formulas are those of the packages that write the files; each class names its source. What the packages compute in the
dtype of the model is computed here in float32, without the rounding in between.

Shape suffixes: R rows (outputs of the layer), C columns (its inputs), G groups, B blocks of 32 columns, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .quantised import BLOCK, SCALES, Form, Parts, expect, mapped, matrix, part, unpacked
from .tensors import TensorEntry

if TYPE_CHECKING:
    import torch


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

        found = mapped(parts["g_idx"]) if "g_idx" in parts else None
        if found is not None and (bool(found.any()) or self.groups(columns) == 1):
            return found.long()
        return torch.arange(columns) // (self.group or columns)  # some older files have an index of zeros

    def _numbers(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Return numbers of some rows, without their zeros subtracted, [R, C]."""
        raise NotImplementedError

    def _zeros(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Return the zeros of some rows, [R, G]."""
        raise NotImplementedError

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """Return the scales of some rows, [R, G]."""
        raise NotImplementedError

    def rows(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        numbers = self._numbers(parts, shape, start, stop).float()
        zeros, scales = self._zeros(parts, shape, start, stop).float(), self._scales(parts, start, stop).float()
        group = self._group_of(parts, shape[1])
        size = self.group or shape[1]
        if shape[1] % size == 0 and bool((group.view(-1, size) == group[::size, None]).all()):
            in_order, wide = group[::size], numbers.view(stop - start, -1, size)  # without indices for each column
            return ((wide - zeros[:, in_order, None]) * scales[:, in_order, None]).view(stop - start, -1)
        return (numbers - zeros[:, group]) * scales[:, group]

    @property
    def range(self) -> tuple[int, int]:
        return 0, (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """Return the zero of symmetric numbers."""
        return 1 << (self.bits - 1)

    def blocks(self, parts: Parts, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        import torch

        by_block = self._group_of(parts, shape[1]).view(-1, BLOCK)
        if not bool((by_block == by_block[:, :1]).all()):
            return None
        group = by_block[:, 0]
        scales = self._scales(parts, 0, shape[0]).float()[:, group]
        if self.symmetric:  # `check` has compared the zeros of the file
            return torch.full_like(scales, self.middle), scales
        return self._zeros(parts, shape, 0, shape[0]).float()[:, group], scales

    def numbers(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        import torch

        return self._numbers(parts, shape, start, stop).to(torch.int16)

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
            found = mapped(parts["g_idx"])
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
        weight = matrix(parts, "qweight", "int32", f"columns * {self.bits} / 32, rows")
        columns, rows = weight.shape[0] * 32 // self.bits, weight.shape[1]
        if weight.shape[0] * 32 % self.bits or rows * self.bits % 32:
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name}: expected rows and columns of {self.bits} bits that fill whole words, "
                f"got {rows} rows and {weight.shape[0]} words"
            )
        self.check_groups(parts, columns)
        groups = self.groups(columns)
        expect(parts, "scales", (groups, rows), *SCALES)
        expect(parts, "qzeros", (groups, rows * self.bits // 32), "int32")
        return rows, columns

    def _numbers(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        return unpacked(mapped(parts["qweight"])[:, start:stop], self.bits, 0, shape[1]).t()

    def _zeros(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        words = mapped(parts["qzeros"])[:, start * self.bits // 32 : -(-stop * self.bits // 32)]
        zeros = unpacked(words, self.bits, 1, stop - start).int()
        if self.v1:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        return zeros.t()

    def check(self, parts: Parts) -> None:
        middle, entry = self.middle, parts["qzeros"]
        stored = middle - 1 if self.v1 else middle
        word = sum(stored << (self.bits * n) for n in range(32 // self.bits))
        word -= 1 << 32 if word >> 31 else 0  # as int32
        if not self.symmetric or (32 % self.bits == 0 and bool((mapped(entry) == word).all())):
            return
        zeros = self._zeros(parts, self.shape(parts), 0, parts["scales"].shape[1])
        if bool((zeros != middle).any()):
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name}: expected the zero {middle} of a symmetric model, got "
                f"{int(zeros[zeros != middle][0])}: its checkpoint_format is not {'gptq' if self.v1 else 'gptq_v2'}"
            )

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return mapped(parts["scales"])[:, start:stop].t()


@dataclass(frozen=True, slots=True)
class AWQ(Grouped):
    """Describe AWQ's form: four bits packed along the rows, eight at a time in an order of their own, transposed.

    Source: `awq/modules/linear/gemm.py` of AutoAWQ.
    """

    @property
    def stored(self) -> str:
        return "awq int4"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        weight = matrix(parts, "qweight", "int32", "columns, rows / 8")
        columns, rows = weight.shape[0], weight.shape[1] * 8
        self.check_groups(parts, columns)
        groups = self.groups(columns)
        expect(parts, "scales", (groups, rows), *SCALES)
        expect(parts, "qzeros", (groups, rows // 8), "int32")
        return rows, columns

    def _numbers(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        return self._unpacked(parts["qweight"], start, stop)

    def _zeros(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        return self._unpacked(parts["qzeros"], start, stop)

    def _unpacked(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        first, last = start // 8, -(-stop // 8)
        words = mapped(entry)[:, first:last]
        made = unpacked(words, 4, 1, 8 * words.shape[1]).view(len(words), -1, 8)[..., [0, 4, 1, 5, 2, 6, 3, 7]]
        return made.flatten(1)[:, start - 8 * first : stop - 8 * first].t()

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return mapped(parts["scales"])[:, start:stop].t()


@dataclass(frozen=True, slots=True)
class AWQRows(Grouped):
    """Describe AWQ's other form, `gemv`: four bits packed along the columns (`awq/modules/linear/gemv.py`)."""

    @property
    def stored(self) -> str:
        return "awq int4"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        weight = matrix(parts, "qweight", "int32", "rows, columns / 8")
        rows, columns = weight.shape[0], weight.shape[1] * 8
        self.check_groups(parts, columns)
        words = -(-self.groups(columns) // 8)
        repeat = {64: 2, 32: 4}.get(self.group, 1)
        words = -(-words // repeat) * repeat
        expect(parts, "qzeros", (rows, words), "int32")
        expect(parts, "scales", (rows, words * 8), *SCALES)
        return rows, columns

    def _numbers(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        return unpacked(mapped(parts["qweight"])[start:stop], 4, 1, shape[1])

    def _zeros(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        words = mapped(parts["qzeros"])[start:stop]
        return unpacked(words, 4, 1, 8 * words.shape[1])

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return mapped(parts["scales"])[start:stop]


@dataclass(frozen=True, slots=True)
class PackedRows(Grouped):
    """Describe compressed-tensors' `pack-quantized`: numbers plus half their range, packed along the columns.

    Zeros are packed along the rows (`compressors/pack_quantized`).
    """

    def shape(self, parts: Parts) -> tuple[int, ...]:
        weight, per_word = part(parts, "weight_packed"), 32 // self.bits
        expect(parts, "weight_shape", (2,), "int64", "int32")
        rows, columns = (int(size) for size in mapped(parts["weight_shape"]))
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
            plain = zero is not None and zero.stored == "int8"
            expect(parts, "weight_zero_point", (rows if plain else -(-rows // per_word), groups), "int32", "int8")
        return rows, columns

    def _one(self, parts: Parts) -> bool:
        return "weight_scale" in parts and not self.group and parts["weight_scale"].shape in ((), (1,))

    def _numbers(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        return unpacked(mapped(parts["weight_packed"])[start:stop], self.bits, 1, shape[1])

    def _zeros(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        import torch

        if self.symmetric:
            return torch.full((stop - start, self.groups(shape[1])), self.middle)
        if parts["weight_zero_point"].stored == "int8":
            return mapped(parts["weight_zero_point"])[start:stop].int() + self.middle
        words = mapped(parts["weight_zero_point"])[start * self.bits // 32 : -(-stop * self.bits // 32)]
        return unpacked(words, self.bits, 0, stop - start)

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        scale = mapped(parts["weight_scale"])
        return scale.view(1, 1).expand(stop - start, 1) if self._one(parts) else scale[start:stop]


@dataclass(frozen=True, slots=True)
class Bytes(Grouped):
    """Describe whole numbers of a byte each, with a scale for the matrix, a row or a group of columns.

    Source: compressed-tensors' `int-quantized` and `naive-quantized`.
    """

    @property
    def stored(self) -> str:
        return f"int{self.bits} in bytes"

    @property
    def range(self) -> tuple[int, int]:
        return -128, 127

    @property
    def middle(self) -> int:
        return 0

    def shape(self, parts: Parts) -> tuple[int, ...]:
        rows, columns = matrix(parts, "weight", "int8", "rows, columns").shape
        self.check_groups(parts, columns)
        for name in ("weight_scale", *(() if self.symmetric else ("weight_zero_point",))):
            found = parts.get(name)
            one = found is not None and not self.group and found.shape in ((), (1,))
            shape = found.shape if one and found is not None else (rows, self.groups(columns))
            expect(parts, name, shape, *(SCALES if name == "weight_scale" else ("int8", "int32")))
        return rows, columns

    def _numbers(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        return mapped(parts["weight"])[start:stop]

    def _zeros(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        import torch

        if self.symmetric:
            return torch.zeros(stop - start, self.groups(shape[1]))
        return self._by_row(parts["weight_zero_point"], start, stop)

    def _scales(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return self._by_row(parts["weight_scale"], start, stop)

    def _by_row(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        found = mapped(entry)
        return found.view(1, 1).expand(stop - start, 1) if found.numel() == 1 else found[start:stop]
