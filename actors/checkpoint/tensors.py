"""Describe where the tensors of a checkpoint lie, and read one tensor at a time.

Tensors have the names and shapes of transformers, in whatever order and form a file stores them. A tensor is read piece by
piece into memory of the caller's dtype, so a host holds only its own tensors, and a piece of a few MiB or one expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError
from . import safetensors_file

if TYPE_CHECKING:
    import torch

PIECE_ELEMENTS = 1 << 18
"""Elements converted at a time: 1 MiB of float32, which stays in the processor's cache."""
WHOLE = ("bool", "uint8", "int8", "int16", "int32", "int64")
"""Dtypes that are not floating-point; they are read without conversion."""


class Entry(Protocol):
    """Describe one tensor of a checkpoint, and read it.

    `stored` is a dtype of the wire format, a GGUF type in capitals, or the name of another quantised form. `shape` is
    row-major.
    """

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> Path: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def stored(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_into(self, target: torch.Tensor) -> None:
        """Read the tensor into `target`, converted to its dtype.

        `target` has the same shape. It is contiguous; a matrix may have any strides.

        Raises:
            CheckpointError: the file ends early.
        """


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Describe a tensor that lies in one piece of a file.

    For some architectures, GGUF stores the rows of q and k in another order than transformers: as pairs that the
    rotary embedding rotates together. `permuted_heads` is the number of heads to reorder, or 0. If `transposed`, the file
    has the tensor with rows and columns exchanged. `added` is what the file adds to each number. `factors` multiply the
    numbers: one all of them, or one for each entry of the first dimension.
    """

    name: str
    file: Path
    stored: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    permuted_heads: int = 0
    transposed: bool = False
    added: float = 0.0
    factors: tuple[float, ...] = ()

    def part(self, name: str, start: int, stop: int, shape: tuple[int, ...] | None = None) -> TensorEntry:
        """Return the entries `start` to `stop` of the first dimension as a tensor of their own, which may get another shape."""
        assert not self.transposed and not self.permuted_heads, "the rows of the file are those of the tensor"
        row = self.nbytes // self.shape[0]
        return replace(
            self, name=name, shape=shape or (stop - start, *self.shape[1:]), offset=self.offset + start * row,
            nbytes=(stop - start) * row, factors=self.factors[start:stop] if len(self.factors) > 1 else self.factors,
        )  # fmt: skip

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self) -> bytes:
        """Return the tensor's bytes.

        Raises:
            CheckpointError: the file ends early.
        """
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            return bytes(read_exactly(file, self, self.nbytes))

    def read_into(self, target: torch.Tensor) -> None:
        if not target.numel():
            return
        if len(self.factors) > 1:
            for number in range(self.shape[0]):
                self.part(self.name, number, number + 1).read_into(target[number : number + 1])
            return
        rows = _rows(target.t() if self.transposed else target, bool(self.permuted_heads))
        order = head_order(self) if self.permuted_heads else None
        row_bytes = self.nbytes // rows.shape[0]
        step = max(1, PIECE_ELEMENTS // rows.shape[-1])
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, rows.shape[0], step):
                stop = min(start + step, rows.shape[0])
                piece = _converted(self, read_exactly(file, self, (stop - start) * row_bytes), stop - start)
                if self.added:
                    piece = piece.float() - self.added
                if self.factors:
                    piece = piece.float() * self.factors[0]
                if order is None:
                    rows[start:stop].copy_(piece)
                else:
                    rows[order[start:stop]] = piece.to(rows.dtype)


@dataclass(frozen=True, slots=True)
class Stacked:
    """Describe a tensor of two or three dimensions whose `parts` lie in different places, stacked by rows.

    The parts have as many columns.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Entry, ...]

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple({file: None for part in self.parts for file in part.files})

    @property
    def stored(self) -> str:
        return self.parts[0].stored

    def read_into(self, target: torch.Tensor) -> None:
        rows, start = _rows(target, False), 0
        for part in self.parts:
            count = math.prod(part.shape) // rows.shape[-1]
            part.read_into(rows[start : start + count].view(part.shape))
            start += count


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Describe experts [E, C, n R], whose columns come from `parts` [E, R, C] in turn, transposed.

    Biases [E, n R] come from parts [E, R].
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorEntry, ...]

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple({part.file: None for part in self.parts})

    @property
    def stored(self) -> str:
        return self.parts[0].stored

    def read_into(self, target: torch.Tensor) -> None:
        """Read the tensor into `target`, an expert at a time.

        Raises:
            CheckpointError: the file ends early.
        """
        for number in range(self.shape[0]):
            for place, each in enumerate(self.parts):
                expert = each.part(self.name, number, number + 1, each.shape[1:])
                columns = target[number, ..., place :: len(self.parts)]
                expert.read_into(columns.t() if columns.dim() > 1 else columns)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Hold rows of a matrix in one of GGUF's block types.

    `data` is uint8, as in the file. `order` is int32 and gives each row's number in the file; None: the same order.
    """

    stored: str
    rows: int
    columns: int
    data: Any
    order: Any


@dataclass(frozen=True, slots=True)
class Tensors:
    """Hold the entries of tensors by name, and read the tensors."""

    path: Path
    tensors: Mapping[str, Entry]

    def require(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> Entry:
        """Return the entry of a tensor that must be there.

        If `dtype` is a floating-point one, the file may have any floating-point type; otherwise it must have `dtype`.

        Raises:
            CheckpointError: the tensor is missing, or has another shape or dtype; the message names file and tensor.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        if entry.stored.startswith(safetensors_file.UNKNOWN):
            code = entry.stored.removeprefix(safetensors_file.UNKNOWN)
            known = ", ".join(safetensors_file.DTYPES)
            raise CheckpointError(f"{entry.file}: tensor {name}: dtype {code!r:.40} is not one of {known}")
        if entry.shape != shape:
            raise CheckpointError(f"{entry.file}: tensor {name}: expected shape {shape}, got {entry.shape}")
        if dtype in WHOLE and entry.stored != dtype:
            raise CheckpointError(f"{entry.file}: tensor {name}: expected {dtype}, got {entry.stored}")
        if dtype not in WHOLE and entry.stored in WHOLE:
            raise CheckpointError(f"{entry.file}: tensor {name}: expected floating-point weights, got {entry.stored}")
        return entry

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Read a tensor into `target` (same shape, any strides); floating-point numbers are converted to its dtype.

        Raises:
            CheckpointError: the file ends early, or has no tensor of this name and shape.
        """
        self.require(name, tuple(target.shape), str(target.dtype).removeprefix("torch.")).read_into(target)

    def stored_rows(self, name: str, shape: tuple[int, ...]) -> StoredRows:
        """Return a matrix of GGUF blocks as it lies in the file, which is mapped and not read.

        Raises:
            CheckpointError: the file ends early, or has no tensor of this name and shape.
        """
        import numpy as np

        entry = self.require(name, shape)
        assert isinstance(entry, TensorEntry)
        try:
            data = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.nbytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{entry.file}: tensor {name}: truncated, or it cannot be mapped: {error}") from None
        order = None
        if entry.permuted_heads:
            order = np.ascontiguousarray(np.argsort(head_order(entry).numpy()).astype(np.int32))
        rows, columns = shape[::-1] if entry.transposed else shape
        return StoredRows(entry.stored, rows, columns, data, order)


def open_tensors(file: Path) -> Tensors:
    """Open a safetensors file without a config.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    return Tensors(
        file,
        {name: TensorEntry(name, file, found.dtype, found.shape, found.offset, found.nbytes)
         for name, found in safetensors_file.read_header(file).items()},
    )  # fmt: skip


def read_exactly(file: Any, entry: Entry, count: int) -> bytearray:
    """Read `count` bytes of an entry from where `file` stands.

    Raises:
        CheckpointError: the file ends early.
    """
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = file.readinto(view)
        if not got:
            raise CheckpointError(f"{entry.file}: tensor {entry.name}: truncated (missing bytes: {len(view)})")
        view = view[got:]
    return data


def _rows(target: torch.Tensor, reordered: bool) -> torch.Tensor:
    """Return `target` as a matrix of the rows to read; a vector is one row or, if `reordered`, one row per number."""
    if target.dim() > 1:
        return target.view(-1, target.shape[-1]) if target.dim() > 2 else target
    return target.view(-1, 1) if reordered else target.view(1, -1)


def _converted(entry: TensorEntry, data: bytearray, rows: int) -> torch.Tensor:
    """Return `rows` rows of the tensor: GGUF blocks as float32, other data in its stored dtype."""
    import numpy as np
    import torch

    if not entry.stored.isupper():
        dtype: torch.dtype = getattr(torch, entry.stored)
        return torch.frombuffer(data, dtype=dtype).view(rows, -1)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    # as one long row, because the package converts only sixteen rows at a time; no block is part of two rows
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(1, -1)
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[entry.stored])).view(rows, -1)


def head_order(entry: TensorEntry) -> torch.Tensor:
    """Return, for each row in GGUF's order, its row in transformers' order (halves of a head, not pairs)."""
    import torch

    rows = torch.arange(entry.shape[0])
    # transformers' row r = (head, half, i) lies at (head, i, half)
    return rows.view(entry.permuted_heads, 2, -1).transpose(1, 2).reshape(-1)
