"""Read the header of a GGUF file (versions 2 and 3), within bounds and without touching the weights.

The `gguf` package's reader makes a numpy object for each of the 100,000 strings of a vocabulary. For SmolLM2's file
that takes 3.5 s in every process that opens it; this reader takes 0.1 s. The package still converts most kinds of
quantised blocks to numbers (`gguf.quants`). It is imported only for that, because the import takes 0.1 s, too.
Layout: ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranvier.transport.files import regular

from ..errors import CheckpointError

MAX_TENSORS = 65_536
MAX_FIELDS = 65_536
MAX_DIMS = 4
MAX_DEPTH = 2
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}  # fmt: skip
"""Types by their number in a file: name, elements per block, bytes per block (ggml's ggml.h)."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Describe a tensor of the file; `shape` is row-major (GGUF's order reversed), `offset` is from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Return the metadata and the tensor table.

    Raises:
        CheckpointError: the file is not GGUF, or is truncated; a name appears twice; tensors overlap or pass its end.
    """
    try:
        with regular(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).read()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (struct.error, IndexError):
        raise CheckpointError(f"{path}: truncated: the header continues past the end of the file") from None


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0

    def read(self) -> GGUFHeader:
        magic, version = struct.unpack_from("<4sI", self.data, 0)
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path}: expected the magic b'GGUF', got {magic!r}")
        if version and not version & 0xFFFF:  # a small number whose bytes stand the other way round
            raise CheckpointError(
                f"{self.path}: a big-endian file, expected a little-endian one; convert it with gguf-convert-endian of the "
                "gguf package"
            )
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: expected GGUF version 2 or 3, got {version}")
        tensor_count, field_count = struct.unpack_from("<QQ", self.data, 8)
        self.at = 24
        if tensor_count > MAX_TENSORS or field_count > MAX_FIELDS:
            raise CheckpointError(
                f"{self.path}: expected at most {MAX_TENSORS} tensors and {MAX_FIELDS} fields, "
                f"got {tensor_count} and {field_count}"
            )
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            if key in fields:
                raise CheckpointError(f"{self.path}: metadata {key!r} appears twice")
            fields[key] = self._value(self._scalar("I"), 0)
        raw = [self._tensor() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: expected an alignment that is a power of two, got {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return GGUFHeader(fields, self._placed(raw, start, alignment))

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        dims = self._scalar("I")
        if dims > MAX_DIMS:
            raise CheckpointError(f"{self.path}: tensor {name}: expected at most {MAX_DIMS} dimensions, got {dims}")
        shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
        return name, self._scalar("I"), shape, self._scalar("Q")

    def _placed(
        self, raw: list[tuple[str, int, tuple[int, ...], int]], start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        for name, number, shape, offset in raw:
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor {name} appears twice")
            if number not in _TYPES:
                raise CheckpointError(f"{self.path}: tensor {name}: unknown type {number}")
            kind, block, block_bytes = _TYPES[number]
            elements = 1
            for size in shape:
                elements *= size
            if not shape or not elements or shape[-1] % block:
                raise CheckpointError(
                    f"{self.path}: tensor {name}: expected a row length that is a multiple of {block} ({kind}), "
                    f"got shape {shape}"
                )
            nbytes = elements // block * block_bytes
            if offset % alignment:
                raise CheckpointError(f"{self.path}: tensor {name}: offset {offset} is not aligned to {alignment}")
            if start + offset + nbytes > self.size:
                raise CheckpointError(
                    f"{self.path}: tensor {name}: needs bytes {start + offset} to {start + offset + nbytes}, but "
                    f"the file has {self.size}: it is truncated, or the offset is wrong"
                )
            tensors[name] = GGUFTensor(name, kind, shape, start + offset, nbytes)
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise CheckpointError(f"{self.path}: tensors {before} and {tensor.name} overlap")
            end, before = tensor.offset + tensor.nbytes, tensor.name
        return tensors

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        start = self.at + 8
        if length > self.size - start:
            raise CheckpointError(f"{self.path}: a string claims {length} bytes, {self.size - start} are left")
        self.at = start + length
        return self.data[start : self.at].decode("utf-8", "replace")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth >= MAX_DEPTH:
            raise CheckpointError(f"{self.path}: metadata of unknown type {kind}")
        item, count = self._scalar("I"), self._scalar("Q")
        if item in _SCALARS:
            code = f"<{count}{_SCALARS[item]}" if count <= self.size else ""
            if not code or struct.calcsize(code) > self.size - self.at:
                raise CheckpointError(f"{self.path}: an array claims {count} values, more than the file holds")
            values = struct.unpack_from(code, self.data, self.at)
            self.at += struct.calcsize(code)
            return list(values)
        if count > (self.size - self.at) // 8:  # a string or an array takes at least 8 bytes, for its length
            raise CheckpointError(f"{self.path}: an array claims {count} values, more than the file holds")
        if item == _STRING:
            return self._strings(count)
        return [self._value(item, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        # the body of `_string`, inlined, because a vocabulary has 100,000 strings
        data, at, size, length_of = self.data, self.at, self.size, struct.Struct("<Q").unpack_from
        values = []
        for _ in range(count):
            (length,) = length_of(data, at)
            at += 8 + length
            if at > size:
                raise CheckpointError(f"{self.path}: a string claims {length} bytes, past the end of the file")
            values.append(data[at - length : at].decode("utf-8", "replace"))
        self.at = at
        return values
