"""Convert torch tensors to buffers and back, without a copy where possible.

Once a tensor is handed over, its values belong to the message. If other code may hold its memory, the buffer is writable, and
code that keeps the buffer copies it (`message.stable`). If nobody else holds the memory, the buffer is read-only.
"""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Callable
from typing import cast

import lz4.block
import torch
import zstandard

from . import codec as codecs
from .codec import BFLOAT16, BLOCK, FLOAT16, INDEX_BYTES, INT8, RAW, SCALE_BYTES, TOPK, Codec, Coding
from .dtypes import BY_NAME, TABLE
from .errors import ProtocolError
from .header import TensorMeta
from .message import COPY_BELOW_BYTES, Buffer, DeviceBuffer

_TORCH: tuple[torch.dtype, ...] = tuple(getattr(torch, row.name) for row in TABLE)
_NUMBER: dict[torch.dtype, int] = {dtype: number for number, dtype in enumerate(_TORCH)}
_OF_COMPLEX = frozenset([_NUMBER[torch.float16], _NUMBER[torch.float32], _NUMBER[torch.float64]])
"""Numbers of the dtypes that the real and imaginary parts of complex tensors have."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name in the table. Raises KeyError for any other name."""
    return _TORCH[BY_NAME[name].number]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in the form of the table and the specs. The dtype need not be in the table."""
    return str(dtype).removeprefix("torch.")


def _no_bytes(name: str, tensor: torch.Tensor) -> ValueError:
    kind = f"{type(tensor).__name__}, {tensor.layout} on {tensor.device}"
    return ValueError(f"tensor {name}: expected a dense tensor with allocated host memory, got a {kind}")


def to_buffer(name: str, tensor: torch.Tensor, *, sole: bool = False) -> tuple[TensorMeta, Buffer]:
    """Return the meta and the bytes of `tensor`, which has any shape and strides and is in host memory.

    The bytes are a copy if the tensor is small or not contiguous, otherwise a view. The view is read-only if nobody else can
    change the memory (`sole`).

    Raises:
        ValueError: the dtype is not in the table, or the tensor has no dense memory on this host: it is on the meta device or
            another device, it is sparse, or its memory is shorter than the tensor.
    """
    meta = _meta(name, tensor.dtype, tensor.shape)
    nbytes = meta.nbytes
    if not tensor.is_cpu:
        raise _no_bytes(name, tensor)
    if nbytes == 0:
        return meta, b""
    try:
        if meta.dtype in _OF_COMPLEX:  # torch may keep a sign as a flag outside the tensor's bytes
            tensor = tensor.resolve_neg()
        if not tensor.is_contiguous():
            tensor, sole = tensor.contiguous(), True
        address = tensor.data_ptr()  # raises if the layout has no address
        held = tensor.untyped_storage().nbytes()
        if held != nbytes:
            held -= int(tensor.storage_offset()) * tensor.itemsize
    except RuntimeError as error:
        raise _no_bytes(name, tensor) from error
    if not address or held < nbytes:  # there is no memory, or it was shrunk
        raise _no_bytes(name, tensor)
    if nbytes < COPY_BELOW_BYTES:  # ZeroMQ would copy it anyway; copying it here takes 1 µs instead of 5 µs
        return meta, ctypes.string_at(address, nbytes)
    view = _bytes_of(tensor)
    return meta, view.toreadonly() if sole else view


def to_device_buffer(name: str, tensor: torch.Tensor) -> tuple[TensorMeta, Buffer]:
    """Return the meta of `tensor`, which is on a device, and a `DeviceBuffer` that keeps it there.

    Raises:
        ValueError: the dtype is not in the table.
    """
    return _meta(name, tensor.dtype, tensor.shape), cast(Buffer, DeviceBuffer(tensor.detach().contiguous()))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:  # numpy has no bfloat16; only the bytes matter, so int16 works
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data.cast("B")


@functools.lru_cache(maxsize=1024)  # an edge carries the same few shapes over and over: 0.2 µs instead of 1.5 µs
def _meta(name: str, dtype: torch.dtype, shape: torch.Size) -> TensorMeta:
    number = _NUMBER.get(dtype)
    if number is None:
        raise ValueError(f"tensor {name}: dtype {dtype} may not be sent; use one of {', '.join(map(str, _NUMBER))}")
    return TensorMeta(name, number, tuple(shape), RAW, shape.numel() * dtype.itemsize)


def from_buffer(meta: TensorMeta, buffer: Buffer) -> torch.Tensor:
    """Return the tensor whose bytes are in `buffer`.

    A raw tensor is a view that keeps the buffer alive; a tensor that a codec wrote is decoded into new memory. The length of
    a raw buffer is not checked again: the check of the header covers it.

    Raises:
        ProtocolError: the bytes that a codec wrote do not match the header.
    """
    if isinstance(buffer, DeviceBuffer):
        return buffer.tensor
    if meta.codec != RAW:
        return _decoded(meta, buffer)
    if meta.nbytes == 0:
        return torch.empty(meta.shape, dtype=_TORCH[meta.dtype])
    flat, shape = torch.frombuffer(buffer, dtype=_TORCH[meta.dtype]), meta.shape
    # a decoding step has one row: `unsqueeze` takes half the time of `view`
    return flat.unsqueeze(0) if len(shape) == 2 and shape[0] == 1 else flat.view(shape)


LOOK_EVERY = 16
"""One message in this many measures the error of a lossy codec. Measuring it requires decoding the message again."""


def encode(name: str, tensor: torch.Tensor, codec: Codec, look: bool) -> tuple[TensorMeta, Buffer, Coding]:
    """Encode `tensor` in a codec that is not raw, and return its meta, its bytes and what the codec did.

    If `look` is true, the error of a lossy codec is measured, too.

    Raises:
        ValueError: the dtype may not be sent, or the codec cannot write it.
    """
    began_ns = time.monotonic_ns()
    plain, raw = to_buffer(name, tensor)
    if codec.form == RAW or plain.nbytes == 0:
        formed: Buffer = raw
    elif not tensor.dtype.is_floating_point:
        raise ValueError(f"tensor {name}: codec {codec}: expected floats, got {tensor.dtype}")
    else:
        formed = b"".join(_bytes(part) for part in _FORMS[codec.form](tensor.detach(), codec.share))
    packed = _PACK[codec.packer](formed)
    meta = plain._replace(codec=codec.number, nbytes=len(packed))
    took_ns = time.monotonic_ns() - began_ns
    error = None
    if look and codec.form != RAW and plain.nbytes:
        exact = tensor.detach().double()
        largest = float(exact.abs().max())
        error = float((_decoded(meta, packed).double() - exact).abs().max()) / largest if largest else 0.0
    return meta, packed, Coding(plain.nbytes, took_ns, error)


def _bytes(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""


def _blocks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as [rows, blocks, 64], with the last block of each row padded with zeros."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).view(rows.shape[0], -1, BLOCK)


def _to_int8(tensor: torch.Tensor, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _blocks(tensor.float())
    scales = wide.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scales > 0, wide / scales, 0.0).round().clamp(-127, 127)  # NaN stays in the scale
    whole = steps.nan_to_num(0.0).to(torch.int8).view(wide.shape[0], -1)
    return scales.contiguous(), whole[:, : tensor.shape[-1] if tensor.dim() else 1].contiguous()


def _to_topk(tensor: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    flat = tensor.reshape(-1)
    indices = flat.abs().topk(codecs.kept(flat.numel(), share), sorted=False).indices
    return indices.to(torch.int32), flat[indices].contiguous()


_FORMS: dict[int, Callable[[torch.Tensor, float], tuple[torch.Tensor, ...]]] = {
    BFLOAT16: lambda tensor, _: (tensor.to(torch.bfloat16).contiguous(),),
    FLOAT16: lambda tensor, _: (tensor.to(torch.float16).contiguous(),),
    INT8: _to_int8,
    TOPK: _to_topk,
}
_PACK: tuple[Callable[[Buffer], Buffer], ...] = (
    lambda data: data,
    lambda data: lz4.block.compress(data),
    lambda data: zstandard.ZstdCompressor(level=1).compress(data),
)


def _decoded(meta: TensorMeta, buffer: Buffer) -> torch.Tensor:
    form, packer = codecs.of_number(meta.codec)
    least, most = codecs.form_bytes(form, TABLE[meta.dtype].itemsize, meta.shape)
    data = _unpacked(meta, buffer, packer, most)
    if not least <= len(data) <= most:
        raise ProtocolError(f"tensor {meta.name}: expected {least} to {most} bytes once unpacked, got {len(data)}")
    dtype = _TORCH[meta.dtype]
    if not len(data):
        return torch.zeros(meta.shape, dtype=dtype)
    writable = bytearray(data)
    if form == RAW:
        return torch.frombuffer(writable, dtype=dtype).view(meta.shape)
    if form in (BFLOAT16, FLOAT16):
        narrow = torch.bfloat16 if form == BFLOAT16 else torch.float16
        return torch.frombuffer(writable, dtype=narrow).view(meta.shape).to(dtype)
    elements = math.prod(meta.shape)
    if form == INT8:
        width = meta.shape[-1] if meta.shape else 1
        split = len(data) - elements
        scales = torch.frombuffer(writable, dtype=torch.float32, count=split // SCALE_BYTES).view(
            elements // width, -1, 1
        )
        whole = torch.frombuffer(writable, dtype=torch.int8, offset=split).view(elements // width, width)
        wide = (_blocks(whole.float()) * scales).view(elements // width, -1)
        return wide[:, :width].reshape(meta.shape).to(dtype)
    count, rest = divmod(len(data), INDEX_BYTES + TABLE[meta.dtype].itemsize)
    indices = torch.frombuffer(writable, dtype=torch.int32, count=count).long()
    if rest or int(indices.min()) < 0 or int(indices.max()) >= elements:
        raise ProtocolError(
            f"tensor {meta.name}: topk: expected index-value pairs with indices from 0 to {elements - 1}, got invalid bytes"
        )
    values = torch.frombuffer(writable, dtype=dtype, offset=count * INDEX_BYTES)
    return torch.zeros(elements, dtype=dtype).index_put_((indices,), values).view(meta.shape)


def _unpacked(meta: TensorMeta, buffer: Buffer, packer: int, most: int) -> Buffer:
    """Return the unpacked bytes. Never allocate more memory than the header allows.

    Raises:
        ProtocolError: the bytes are damaged, or claim to be larger than `most` bytes once unpacked.
    """
    if not packer:
        return buffer
    try:
        if packer == codecs.LZ4:
            claimed = int.from_bytes(bytes(buffer[:4]), "little")
            if claimed > most:
                raise ProtocolError(f"tensor {meta.name}: lz4: expected at most {most} bytes, got a claim of {claimed}")
            return bytes(lz4.block.decompress(buffer))
        claimed = zstandard.frame_content_size(bytes(buffer[:32]))
        if not 0 <= claimed <= most:
            raise ProtocolError(f"tensor {meta.name}: zstd: expected at most {most} bytes, got a claim of {claimed}")
        return zstandard.ZstdDecompressor().decompress(buffer, max_output_size=max(1, most))
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError) as error:
        raise ProtocolError(f"tensor {meta.name}: cannot be unpacked: {error}") from None
