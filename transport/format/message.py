"""A message and its frames: `[header, tensor bytes, tensor bytes, …]`.

No torch here: a tensor is its `TensorMeta` and a buffer, so that a process which only passes token ids on need not
hold torch. `tensors.py` turns the pair into a `torch.Tensor` and back.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence

from .dtypes import TABLE
from .errors import ProtocolError
from .header import MAX_TENSORS, Header, Row, TensorMeta
from .tensor_spec import TensorSpec

if sys.byteorder != "little":  # the bytes of a tensor are sent as they lie in memory
    raise ImportError("ranvier's wire format is little-endian; this machine is not")

Buffer = bytes | memoryview
COPY_BELOW_BYTES = 64 * 1024
"""Buffers smaller than this are copied on their way out: tracking their release costs more (pyzmq's own threshold)."""


def stable(buffer: Buffer) -> Buffer:
    """Return bytes that nobody can change any more: the buffer itself if it cannot be written to, else a copy.

    A view that can be written to may be of memory that an actor, or a caller, uses again. Whoever knows that nobody else holds
    that memory makes the view read-only (`tensors.to_buffer`).
    """
    return buffer if isinstance(buffer, bytes) or buffer.readonly else bytes(buffer)


def checksum(buffers: Sequence[Buffer]) -> int:
    """CRC-32 over the tensors' bytes, never 0 (which stands for: not checked)."""
    value = 0
    for buffer in buffers:
        value = zlib.crc32(buffer, value)
    return value or 1


def check_frames(header: Header, buffers: Sequence[Buffer]) -> None:
    """Refuse frames that are not those of their header.

    Raises:
        ProtocolError: the number of frames, a frame's length or the checksum is not as the header says.
    """
    tensors = header.tensors
    if len(buffers) == 1 == len(tensors) and len(buffers[0]) == tensors[0].nbytes and not header.checksum:
        return  # nearly every message: a loop over its one tensor takes three times as long
    if len(buffers) != len(tensors):
        raise ProtocolError(
            f"edge {header.edge}: expected {len(tensors)} tensor frames (at most {MAX_TENSORS}), got {len(buffers)}"
        )
    for meta, buffer in zip(tensors, buffers, strict=True):
        if len(buffer) != meta.nbytes:
            raise ProtocolError(
                f"edge {header.edge}: tensor {meta.name}: expected a frame of {meta.nbytes} bytes, got {len(buffer)}"
            )
    if header.checksum:
        actual = checksum(buffers)
        if actual != header.checksum:
            raise ProtocolError(
                f"edge {header.edge}: expected checksum {header.checksum:#010x}, got {actual:#010x}: bytes were changed"
            )


def check_specs(
    edge: str,
    specs: Sequence[tuple[str, TensorSpec]],
    rows: Sequence[Row],
    tensors: Sequence[TensorMeta],
) -> None:
    """Refuse a message whose tensors are not those its edge carries.

    Raises:
        ProtocolError: naming the edge, the expected and the actual.
    """
    if len(tensors) != len(specs):
        raise ProtocolError(f"edge {edge}: expected {len(specs)} tensors, got {len(tensors)}")
    bound = {"tokens": rows[0].tokens if len(rows) == 1 else sum(row.tokens for row in rows), "rows": len(rows)}
    for (name, spec), meta in zip(specs, tensors, strict=True):
        if meta.name != name:
            raise ProtocolError(f"edge {edge}: expected tensor {name!r}, got {meta.name!r}")
        if len(rows) > 1 and spec.shape[:1] not in (("tokens",), ("rows",)):
            raise ProtocolError(
                f"edge {edge}: expected one row for {spec}, which has no place for each, got {len(rows)}"
            )
        spec.check(edge, TABLE[meta.dtype].name, meta.shape, bound)
