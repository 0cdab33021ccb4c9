"""Say how the matrices of bitsandbytes lie in a file: numbers of four bits by a table, or of eight bits by rows.

Source: `bitsandbytes/functional.py` (`QuantState`, `dequantize_4bit`, `int8_vectorwise_dequant`).

Shape suffixes: R rows (outputs of the layer), C columns (its inputs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .bounds import MOST_SIZE, number, whole
from .quantised import Form, Parts, expect, mapped, matrix, part

if TYPE_CHECKING:
    import torch

MOST_STATE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class FourBits(Form):
    """Describe four bits a number, the first in the high half of a byte; each block of the flat matrix has a scale.

    The scales (`absmax`) may be quantised themselves: bytes by a table, times a scale for each `nested_blocksize`, plus an
    offset. The sizes are in a JSON object that lies beside the matrix as a tensor of bytes.
    """

    @property
    def stored(self) -> str:
        return "bitsandbytes 4 bits"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        state, weight = _state(parts), part(parts, "weight")
        rows, columns = state["shape"]
        blocks = -(-rows * columns // state["blocksize"])
        expect(parts, "weight", weight.shape, "uint8", "bfloat16", "float16", "float32")
        if weight.nbytes != -(-rows * columns // 2):
            raise CheckpointError(
                f"{weight.file}: tensor {weight.name}: expected {-(-rows * columns // 2)} bytes for [{rows}, {columns}], got "
                f"{weight.nbytes}"
            )
        expect(parts, "quant_map", (16,), "float32")
        if "nested_absmax" in parts:
            expect(parts, "absmax", (blocks,), "uint8")
            expect(parts, "nested_absmax", (-(-blocks // state["nested_blocksize"]),), "float32")
            expect(parts, "nested_quant_map", (256,), "float32")
        else:
            expect(parts, "absmax", (blocks,), "float32")
        return rows, columns

    def check(self, parts: Parts) -> None:
        _check_finite(parts, "quant_map", "nested_quant_map", "nested_absmax", "absmax")

    def rows(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        import torch

        state = _state(parts)
        size, first, last = state["blocksize"], start * shape[1], stop * shape[1]
        packed = mapped(parts["weight"]).view(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
        codes = torch.stack((packed >> 4, packed & 15), -1).flatten()[first % 2 :][: last - first]
        scale = _scales(parts, state, first // size, -(-last // size)).repeat_interleave(size)
        return (mapped(parts["quant_map"])[codes.int()] * scale[first % size :][: last - first]).view(stop - start, -1)


@dataclass(frozen=True, slots=True)
class EightBits(Form):
    """Describe whole numbers of eight bits with a scale for each row (`SCB`), which stands for 127."""

    @property
    def stored(self) -> str:
        return "bitsandbytes int8"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        rows, columns = matrix(parts, "weight", "int8", "rows, columns").shape
        expect(parts, "SCB", (rows,), "float32")
        if "weight_format" in parts and bool(mapped(parts["weight_format"]).any()):
            entry = parts["weight_format"]
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name}: expected 0, which means rows, got another layout"
            )
        return rows, columns

    def check(self, parts: Parts) -> None:
        _check_finite(parts, "SCB")

    def rows(self, parts: Parts, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        return mapped(parts["weight"])[start:stop].float() * mapped(parts["SCB"])[start:stop, None] * (1 / 127)


def _scales(parts: Parts, state: Mapping[str, Any], first: int, last: int) -> torch.Tensor:
    """Return the scales of some blocks, float32."""
    scales = mapped(parts["absmax"])[first:last]
    if "nested_absmax" not in parts:
        return scales
    size = state["nested_blocksize"]
    outer = mapped(parts["nested_absmax"])[first // size : -(-last // size)].repeat_interleave(size)
    inner = mapped(parts["nested_quant_map"])[scales.int()] * outer[first % size :][: last - first]
    return inner + float(state["nested_offset"])


def _state(parts: Parts) -> Mapping[str, Any]:
    """Return the sizes of a matrix.

    Raises:
        CheckpointError: they are damaged.
    """
    entry = part(parts, "quant_state")
    try:
        state = json.loads(entry.read()) if entry.nbytes <= MOST_STATE_BYTES else None
    except ValueError:
        state = None
    shape = state.get("shape") if isinstance(state, dict) else None
    sizes = isinstance(shape, list) and len(shape) == 2 and all(whole(size, 1, MOST_SIZE) for size in shape)
    if not isinstance(state, dict) or not sizes or not whole(state.get("blocksize"), 1, MOST_SIZE):
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name}: expected JSON with shape and blocksize, got {state!r:.80}"
        )
    if "nested_absmax" in parts and not (
        whole(state.get("nested_blocksize"), 1, MOST_SIZE) and number(abs(state.get("nested_offset", 0.0)), -1.0, 1e6)
    ):
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name}: expected nested_blocksize and nested_offset, got {state!r:.80}"
        )
    return state


def _check_finite(parts: Parts, *names: str) -> None:
    for name in names:
        entry = parts.get(name)
        if entry is not None and entry.stored == "float32" and not bool(mapped(entry).isfinite().all()):
            raise CheckpointError(f"{entry.file}: tensor {entry.name}: expected finite numbers")
