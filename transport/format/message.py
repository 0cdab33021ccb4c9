"""Check a message and its frames: `[header, tensor bytes, tensor bytes, …]`.

This module does not import torch: here a tensor is its `TensorMeta` and a buffer. So a process that only passes on token ids
does not need torch. `tensors.py` converts the pair to a `torch.Tensor` and back.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .dtypes import TABLE
from .errors import ProtocolError
from .header import MAX_TENSORS, Header, Row, TensorMeta
from .tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

if sys.byteorder != "little":  # the bytes of a tensor are sent as they are in memory
    raise ImportError("ranvier's wire format is little-endian; this machine is not")


Buffer = bytes | memoryview


class DeviceBuffer:
    """Stand as the buffer of a tensor that stays on a device: code between the two ends only passes it on, and asks its length.

    Nobody may write into the tensor any more.
    """

    readonly = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return self.tensor.nbytes


COPY_BELOW_BYTES = 64 * 1024
"""Buffers of fewer bytes are copied when they are sent: tracking their release costs more (pyzmq's own threshold)."""


def stable(buffer: Buffer) -> Buffer:
    """Return bytes that nobody can change any more: the buffer itself if it is read-only, otherwise a copy.

    The memory of a writable view may be used again by an actor or a caller. A view of memory that nobody else holds is made
    read-only by `tensors.to_buffer`.
    """
    return buffer if isinstance(buffer, bytes) or buffer.readonly else bytes(buffer)


def checksum(buffers: Sequence[Buffer]) -> int:
    """Return the CRC-32 over the tensors' bytes. It is never 0, because 0 in a header means that there is no checksum."""
    value = 0
    for buffer in buffers:
        value = zlib.crc32(buffer, value)
    return value or 1


def check_frames(header: Header, buffers: Sequence[Buffer]) -> None:
    """Refuse frames that do not match their header.

    Raises:
        ProtocolError: the number of frames, the length of a frame, or the checksum differs from the header.
    """
    tensors = header.tensors
    if len(buffers) == 1 == len(tensors) and len(buffers[0]) == tensors[0].nbytes and not header.checksum:
        return  # nearly every message ends here: a loop over its one tensor takes three times as long
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
    """Refuse a message whose tensors do not match the specs of its edge.

    Raises:
        ProtocolError: the tensors differ; the message names the edge, the expected and the actual tensor.
    """
    if len(tensors) != len(specs):
        raise ProtocolError(f"edge {edge}: expected {len(specs)} tensors, got {len(tensors)}")
    bound = {"tokens": rows[0].tokens if len(rows) == 1 else sum(row.tokens for row in rows), "rows": len(rows)}
    for (name, spec), meta in zip(specs, tensors, strict=True):
        if meta.name != name:
            raise ProtocolError(f"edge {edge}: expected tensor {name!r}, got {meta.name!r}")
        if len(rows) > 1 and spec.shape[:1] not in (("tokens",), ("rows",)):
            raise ProtocolError(
                f"edge {edge}: expected 1 row, as {spec} does not begin with tokens or rows, got {len(rows)}"
            )
        spec.check(edge, TABLE[meta.dtype].name, meta.shape, bound)
