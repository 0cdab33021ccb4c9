"""Read the header of a safetensors file, and check it before any weights are read.

The safetensors library checks offsets, too. But if two tensors have the same name, it silently keeps the last one; this
module refuses such a file. The library also needs torch to return a shape, while `check` and `show` must run without
torch. Layout: the format section of the library's README.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranvier.transport.files import regular

from ..errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}


UNKNOWN = "unknown:"
"""Prefix of the dtype of a tensor that is not one of `DTYPES`. Such a tensor may lie beside those that are read."""


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """Describe a tensor of the file; `dtype` is torch's name, `offset` is from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, SafeTensor]:
    """Return the tensors by name.

    Raises:
        CheckpointError: the file is truncated, the header is invalid or too large, a name appears twice, or tensors
            overlap or pass the file's end.
    """
    try:
        with regular(path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            if len(head) < 8:
                raise CheckpointError(f"{path}: truncated: expected at least 8 bytes, got {size}")
            (length,) = struct.unpack("<Q", head)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: the header claims {length} bytes, the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    try:
        table = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: expected a JSON object as the header, got {type(table).__name__}")
    table.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in table.items()}
    end, before = 8 + length, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end and tensor.nbytes:
            raise CheckpointError(f"{path}: tensors {before} and {tensor.name} overlap")
        end, before = tensor.offset + tensor.nbytes, tensor.name
    return tensors


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path}: tensor {twice} appears twice")
    return made


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> SafeTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: tensor {name}: expected dtype, shape and data_offsets, got {entry!r:.80}"
        ) from None
    if not isinstance(code, str):
        raise CheckpointError(f"{path}: tensor {name}: expected the name of a dtype, got {code!r:.80}")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(f"{path}: tensor {name}: expected sizes and offsets from 0, got {numbers!r:.80}")
    dtype, itemsize = DTYPES.get(code, (UNKNOWN + code, None))
    expected = math.prod(shape) * itemsize if itemsize is not None else max(0, end - begin)
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name}: expected {expected} bytes for {dtype}{shape}, got offsets {begin} to {end}"
        )
    if start + end > size:
        raise CheckpointError(f"{path}: tensor {name}: ends at byte {start + end}, the file has {size}: truncated")
    return SafeTensor(name, dtype, tuple(shape), start + begin, expected)
