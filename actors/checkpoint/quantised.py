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


@dataclass(frozen=True, slots=True)
class Whole:
    """Hold a matrix as whole numbers.

    A weight is `(number - zero) * scale`: `numbers` int16 [R, C], `zeros` int16 [R, B], `scales` float32 [R, B].
    """

    numbers: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor


class Form:
    """Describe how the numbers of a matrix lie in the file."""

    @property
    def stored(self) -> str:
        """Return what to call it."""
        raise NotImplementedError

    def shape(self, parts: Mapping[str, TensorEntry]) -> tuple[int, ...]:
        """Return the shape of the weights; check the shapes and dtypes of the parts against each other.

        Raises:
            CheckpointError: they do not fit together.
        """
        raise NotImplementedError

    def check(self, parts: Mapping[str, TensorEntry]) -> None:
        """Check more than shapes and scales.

        Raises:
            CheckpointError: the parts are not what the settings say.
        """
        return

    def rows(self, parts: Mapping[str, TensorEntry], start: int, stop: int) -> torch.Tensor:
        """Return some rows of the weights, float32 [stop - start, C]."""
        raise NotImplementedError

    def whole(self, parts: Mapping[str, TensorEntry]) -> Whole | None:
        """Return the matrix as whole numbers by blocks of 32 columns; None if it cannot be written so."""
        return None


@dataclass(frozen=True, eq=False)
class Quantised:
    """Describe a quantised tensor, under the name that it has in the model before it is quantised."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorEntry]
    form: Form

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values())).file

    @property
    def stored(self) -> str:
        return self.form.stored

    def read_into(self, target: torch.Tensor) -> None:
        """Read the tensor into `target` (same shape, any strides), converted to its dtype.

        Raises:
            CheckpointError: the file ends early, or a weight is not finite.
        """
        rows = target.flatten(0, -2) if target.dim() > 2 else target
        # a piece of a matrix, or all rows of an expert
        step = max(1, PIECE_ELEMENTS // max(1, rows.shape[-1])) if target.dim() < 3 else target.shape[1]
        for start in range(0, rows.shape[0], step):
            stop = min(start + step, rows.shape[0])
            made = self.form.rows(self.parts, start, stop)
            if not bool(made.isfinite().all()):
                raise CheckpointError(
                    f"{self.file}: tensor {self.name}: a weight is NaN or infinite, because its scale is"
                )
            rows[start:stop].copy_(made)

    def check(self) -> None:
        """Check the scales, and the zeros where the method says what they are.

        Raises:
            CheckpointError: a scale is NaN or infinite, or a zero is not what it must be.
        """
        for name, entry in self.parts.items():
            if "scale" in name:
                found = array(entry)
                wrong = (found == 255) if entry.stored == "uint8" else ~found.float().isfinite()
                if bool(wrong.any()) or (name == "weight_global_scale" and not bool(found.all())):
                    raise CheckpointError(
                        f"{entry.file}: tensor {entry.name}: expected finite scales, got {_worst(found)}"
                    )
        self.form.check(self.parts)

    def whole(self) -> Whole | None:
        """Return the matrix as whole numbers; None if the kernels' tiles cannot hold it without rounding."""
        return self.form.whole(self.parts) if self.tile else None

    @functools.cached_property
    def tile(self) -> Tile | None:
        """Return the packed form that holds the matrix without rounding; None: no form does."""
        found = self.form.whole(self.parts) if len(self.shape) == 2 and self.shape[1] % BLOCK == 0 else None
        if found is None or not _is_half(found.scales):
            return None
        least, most = int(found.numbers.min()), int(found.numbers.max())
        if least >= 0 and most <= 15 and _is_half(found.zeros * found.scales):
            return "int4"
        zero = found.zeros
        return "int8" if least - int(zero.max()) >= -128 and most - int(zero.min()) <= 127 else None


def _worst(scales: torch.Tensor) -> float:
    """Return a scale that is not finite, or 0 if all are."""
    wide = scales.float()
    bad = wide[~wide.isfinite()] if scales.is_floating_point() else wide[wide == 255] * float("nan")
    return float(bad[0]) if bad.numel() else 0.0


def _is_half(numbers: torch.Tensor) -> bool:
    """Return whether float16 holds all numbers without rounding."""
    return bool((numbers.half().float() == numbers).all())


def array(entry: TensorEntry) -> torch.Tensor:
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


def bits(words: torch.Tensor, count: int, dim: int, number: int) -> torch.Tensor:
    """Unpack unsigned numbers of `count` bits from int32 words along a dimension, low bits first, uint8.

    `number` is how many there are. Numbers may cross from one word into the next, as those of three bits do.
    """
    import torch

    words = words.movedim(dim, -1).contiguous()
    octets = words.view(torch.uint8).to(torch.int32)  # little-endian, as the file
    at = torch.arange(number) * count
    byte, shift = at // 8, (at % 8).to(torch.int32)
    low = octets[..., byte]
    high = octets[..., (byte + 1).clamp(max=octets.shape[-1] - 1)]
    made = ((low | high << 8) >> shift) & ((1 << count) - 1)
    return made.to(torch.uint8).movedim(-1, dim)
