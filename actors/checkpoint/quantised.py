"""Read matrices that a checkpoint stores as small numbers with scales.

All methods come down to one formula: a weight is `(number - zero) * scale`, where number is a whole number or one of few
bits of floating point, and zero and scale belong to a group of columns. `Quantised` computes it in float32, a few rows at a
time. What differs is how the numbers lie in the file: `quant_forms.py` has one `Form` for each way. `quant_methods.py` reads
`quantization_config` and finds the tensors of each matrix.

Shape suffixes: R rows (outputs of the layer), C columns (its inputs), G groups, B blocks of 32 columns, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import CheckpointError
from .tensors import PIECE_ELEMENTS, TensorEntry

if TYPE_CHECKING:
    import torch

BLOCK = 32
"""Columns that share a scale in the kernels' tiles."""
Tile = Literal["int4", "int8"]


Parts = Mapping[str, TensorEntry]
"""The tensors of a quantised matrix, by the last part of their names."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Hold a matrix as the kernels' tiles need it.

    `codes` uint8 [R, C]: for int4 the numbers, for int8 the numbers less their zeros plus 128. `scales` float32 [R, B], and for
    int4 `least` float32 [R, B], which is what the number 0 stands for.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor | None


class Form:
    """Describe how the numbers of a matrix lie in the file."""

    @property
    def stored(self) -> str:
        """Return the name of the form, as `show` prints it."""
        raise NotImplementedError

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Return the shape of the weights; check the shapes and dtypes of the parts against each other.

        Raises:
            CheckpointError: they do not fit together.
        """
        raise NotImplementedError

    def check(self, parts: Parts) -> None:
        """Check zeros against the settings. Reads them all.

        Raises:
            CheckpointError: they are not what the settings say.
        """
        return

    def rows(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Return some rows of the weights, float32 [stop - start, C]; `start` is a multiple of 32."""
        raise NotImplementedError

    def blocks(self, parts: Parts, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return zeros and scales, both float32 [R, B]; None if the numbers are not whole, or a block has two scales."""
        return None

    @property
    def range(self) -> tuple[int, int]:
        """Return the least and the largest whole number, without its zero subtracted."""
        raise NotImplementedError

    def numbers(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Return some rows of the whole numbers, int16 [stop - start, C]; `start` is a multiple of 32."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Quantised:
    """Describe a quantised tensor, under the name that it has in the model before it is quantised."""

    name: str
    shape: tuple[int, ...]
    parts: Parts
    form: Form

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values())).file

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple({entry.file: None for entry in self.parts.values()})

    @property
    def stored(self) -> str:
        return self.form.stored

    def read_into(self, target: torch.Tensor) -> None:
        """Read the tensor into `target`, converted to its dtype; one of three dimensions must be contiguous.

        Raises:
            CheckpointError: the file ends early, or a weight is not finite.
        """
        rows = target.view(-1, target.shape[-1]) if target.dim() > 2 else target
        # a piece of a matrix, or all rows of an expert
        step = self._step if target.dim() < 3 else target.shape[1]
        for start in range(0, rows.shape[0], step):
            stop = min(start + step, rows.shape[0])
            made = self.form.rows(self.parts, self.shape, start, stop)
            if not bool(made.isfinite().all()):
                raise CheckpointError(
                    f"{self.file}: tensor {self.name}: a weight is NaN or infinite: its scale is, or is too large"
                )
            rows[start:stop].copy_(made)

    @property
    def _step(self) -> int:
        """Return how many rows are read at a time: whole words of packed zeros have 32 of them."""
        return max(32, PIECE_ELEMENTS // max(1, self.shape[-1]) // 32 * 32)

    def check(self) -> None:
        """Check the scales, and the zeros where the method says what they are.

        Raises:
            CheckpointError: a scale is NaN or infinite, or a zero is not what it must be.
        """
        for name, entry in self.parts.items():
            if "scale" in name:
                found = mapped(entry)
                if not _all_finite(found, entry.stored) or (name == "weight_global_scale" and not bool(found.all())):
                    raise CheckpointError(
                        f"{entry.file}: tensor {entry.name}: expected finite scales, got {_worst(found)}"
                    )
        self.form.check(self.parts)

    @property
    def scale_bytes(self) -> int:
        """Return the bytes of the scales and zeros that `check` reads."""
        return sum(entry.nbytes for name, entry in self.parts.items() if "scale" in name or "zero" in name)

    @functools.cached_property
    def tile(self) -> Tile | None:
        """Return the packed form that holds the matrix without rounding; None: no form does. Only its scales are read."""
        found = (
            self.form.blocks(self.parts, self.shape) if len(self.shape) == 2 and self.shape[1] % BLOCK == 0 else None
        )
        if found is None or not _is_half(found[1]):
            return None
        zeros, scales = found
        least, most = self.form.range
        if least >= 0 and most <= 15 and _is_half(zeros * scales):
            return "int4"
        return "int8" if least - float(zeros.max()) >= -128 and most - float(zeros.min()) <= 127 else None

    def codes(self, tile: Tile) -> Codes:
        """Return the matrix for tiles of `tile`, which must hold it without rounding."""
        import torch

        self.check()
        found = self.form.blocks(self.parts, self.shape)
        assert found is not None, "the matrix has a tile"
        zeros, scales = found
        codes = torch.empty(self.shape, dtype=torch.uint8)
        for start in range(0, self.shape[0], self._step):
            stop = min(start + self._step, self.shape[0])
            numbers = self.form.numbers(self.parts, self.shape, start, stop)
            if tile == "int8":
                numbers = numbers - zeros[start:stop].to(torch.int16).repeat_interleave(BLOCK, 1) + 128
            codes[start:stop] = numbers.to(torch.uint8)
        return Codes(codes, scales, -(zeros * scales) if tile == "int4" else None)


def _all_finite(scales: torch.Tensor, stored: str) -> bool:
    """Return whether no scale is NaN or infinite; those of one byte are compared as bytes, which is fast."""
    import torch

    if stored in ("uint8", "float8_e8m0fnu"):
        return not bool((scales.view(torch.uint8) == 255).any())
    if stored == "float8_e4m3fn":
        return not bool(((scales.view(torch.uint8) & 127) == 127).any())
    return bool(scales.isfinite().all())


def _worst(scales: torch.Tensor) -> float:
    """Return a scale that is not finite, or 0 if all are."""
    wide = scales.float()
    bad = wide[~wide.isfinite()] if scales.is_floating_point() else wide[wide == 255] * float("nan")
    return float(bad[0]) if bad.numel() else 0.0


def _is_half(numbers: torch.Tensor) -> bool:
    """Return whether float16 holds all numbers without rounding."""
    return bool((numbers.half().float() == numbers).all())


SCALES = ("float16", "bfloat16", "float32")


def expect(parts: Parts, name: str, shape: tuple[int, ...], *dtypes: str) -> None:
    """Check one part of a matrix.

    Raises:
        CheckpointError: it is missing, or has another shape or dtype.
    """
    entry = part(parts, name)
    if entry.shape != shape or entry.stored not in dtypes:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name}: expected {' or '.join(dtypes)}{list(shape)}, got {entry.stored}"
            f"{list(entry.shape)}"
        )


def matrix(parts: Parts, name: str, dtype: str, shape: str) -> TensorEntry:
    """Return one part of a matrix that must have two dimensions; `shape` names them.

    Raises:
        CheckpointError: it is missing, or has another number of dimensions or dtype.
    """
    entry = part(parts, name)
    if entry.stored != dtype or len(entry.shape) != 2:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name}: expected {dtype}[{shape}], got {entry.stored}{list(entry.shape)}"
        )
    return entry


def part(parts: Parts, name: str) -> TensorEntry:
    """Return one part of a matrix.

    Raises:
        CheckpointError: it is missing.
    """
    entry = parts.get(name)
    if entry is None:
        first = next(iter(parts.values()))
        raise CheckpointError(f"{first.file}: tensor {first.name} needs a tensor {name} beside it, which is missing")
    return entry


def mapped(entry: TensorEntry) -> torch.Tensor:
    """Return a tensor of the file as it lies there, mapped and not read.

    Raises:
        CheckpointError: the file ends early.
    """
    import numpy as np
    import torch

    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=_dtype(entry.stored))
    try:
        data = np.memmap(entry.file, np.uint8, "c", entry.offset, (entry.nbytes,))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name}: truncated, or it cannot be mapped: {error}"
        ) from None
    flat: torch.Tensor = torch.from_numpy(np.asarray(data))
    return flat.view(_dtype(entry.stored)).view(entry.shape)


def _dtype(stored: str) -> Any:
    import torch

    return getattr(torch, stored)


def unpacked(words: torch.Tensor, width: int, dim: int, count: int) -> torch.Tensor:
    """Unpack `count` unsigned numbers of `width` bits from int32 words along a dimension, low bits first, uint8.

    Numbers may cross from one word into the next, as those of three bits do.
    """
    import torch

    octets = words.movedim(dim, -1).contiguous().view(torch.uint8)  # little-endian, as the file
    if 8 % width == 0:  # without indices, which take four times as long
        mask = (1 << width) - 1
        parts = [octets >> shift & mask for shift in range(0, 8, width)]
        return torch.stack(parts, -1).flatten(-2)[..., :count].movedim(-1, dim)
    octets = octets.to(torch.int32)
    at = torch.arange(count) * width
    byte, shift = at // 8, (at % 8).to(torch.int32)
    low = octets[..., byte]
    high = octets[..., (byte + 1).clamp(max=octets.shape[-1] - 1)]
    made = ((low | high << 8) >> shift) & ((1 << width) - 1)
    return made.to(torch.uint8).movedim(-1, dim)
