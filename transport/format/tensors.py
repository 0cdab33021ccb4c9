"""torch tensors to buffers and back, without copying.

From the moment a tensor is handed over, its values are the message's. A buffer of memory that others may hold can be written
to, and is copied by whoever keeps it (`message.stable`); one of memory that nobody else holds is read-only.
"""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Callable

import lz4.block
import torch
import zstandard

from . import codec as codecs
from .codec import BFLOAT16, BLOCK, FLOAT16, INT8, PLACE_BYTES, RAW, SCALE_BYTES, TOPK, Codec, Coding
from .dtypes import BY_NAME, TABLE
from .errors import ProtocolError
from .header import TensorMeta
from .message import COPY_BELOW_BYTES, Buffer

_TORCH: tuple[torch.dtype, ...] = tuple(getattr(torch, row.name) for row in TABLE)
_NUMBER: dict[torch.dtype, int] = {dtype: number for number, dtype in enumerate(_TORCH)}
_OF_COMPLEX = frozenset([_NUMBER[torch.float16], _NUMBER[torch.float32], _NUMBER[torch.float64]])
"""The real dtypes that there are complex numbers of."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name from the table. Raises KeyError for any other name."""
    return _TORCH[BY_NAME[name].number]


def dtype_name(dtype: torch.dtype) -> str:
    """As the table and the specs call it; also of those that are in neither."""
    return str(dtype).removeprefix("torch.")


def _no_bytes(name: str, tensor: torch.Tensor) -> ValueError:
    kind = f"{type(tensor).__name__}, {tensor.layout} on {tensor.device}"
    return ValueError(f"tensor {name}: expected a dense tensor with host memory of its own, got a {kind}")


def to_buffer(name: str, tensor: torch.Tensor, *, sole: bool = False) -> tuple[TensorMeta, Buffer]:
    """The meta of `tensor` (any shape, any strides, in host memory) and its bytes: a view of them, read-only if nobody else
    can change them (`sole`), or a copy if it is not contiguous or small.

    Raises:
        ValueError: a dtype that is not in the table, or memory that is no tensor's of this machine: on the meta device or
            another one, sparse, or shorter than the tensor.
    """
    meta = _meta(name, tensor.dtype, tensor.shape)
    nbytes = meta.nbytes
    if not tensor.is_cpu:
        raise _no_bytes(name, tensor)
    if nbytes == 0:
        return meta, b""
    if meta.dtype in _OF_COMPLEX and tensor.is_neg():  # an imaginary part: its sign is a flag, not in its bytes
        tensor = tensor.resolve_neg()
    try:
        if not tensor.is_contiguous():
            tensor, sole = tensor.contiguous(), True
        address = tensor.data_ptr()  # raises where the layout has none
        held = tensor.untyped_storage().nbytes()
        if held != nbytes:
            held -= int(tensor.storage_offset()) * tensor.itemsize
    except RuntimeError as error:
        raise _no_bytes(name, tensor) from error
    if not address or held < nbytes:  # there is none, or it was made smaller
        raise _no_bytes(name, tensor)
    if nbytes < COPY_BELOW_BYTES:  # ZeroMQ would copy it anyway, and so it takes 1 µs instead of 5
        return meta, ctypes.string_at(address, nbytes)
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:  # numpy knows none: the bytes are what is sent, so integers will do
        tensor = tensor.view(torch.int16)
    view = tensor.numpy().data.cast("B")
    return meta, view.toreadonly() if sole else view


@functools.lru_cache(maxsize=1024)  # an edge carries the same few shapes over and over: 0.2 µs instead of 1.5
def _meta(name: str, dtype: torch.dtype, shape: torch.Size) -> TensorMeta:
    number = _NUMBER.get(dtype)
    if number is None:
        raise ValueError(f"tensor {name}: dtype {dtype} may not be sent; one of {', '.join(map(str, _NUMBER))}")
    return TensorMeta(name, number, tuple(shape), RAW, shape.numel() * dtype.itemsize)


def from_buffer(meta: TensorMeta, buffer: Buffer) -> torch.Tensor:
    """The tensor whose bytes are in `buffer`: a view, kept alive by the tensor, unless a codec wrote it. The header's check
    has seen to the length.

    Raises:
        ProtocolError: what a codec wrote is not what the header says.
    """
    if meta.codec != RAW:
        return _decoded(meta, buffer)
    if meta.nbytes == 0:
        return torch.empty(meta.shape, dtype=_TORCH[meta.dtype])
    flat, shape = torch.frombuffer(buffer, dtype=_TORCH[meta.dtype]), meta.shape
    # one row, what each decoding step brings, in half the time of `view`
    return flat.unsqueeze(0) if len(shape) == 2 and shape[0] == 1 else flat.view(shape)


LOOK_EVERY = 16
"""The error of a lossy codec is measured in one message of so many: it means decoding once more."""


def encode(name: str, tensor: torch.Tensor, codec: Codec, look: bool) -> tuple[TensorMeta, Buffer, Coding]:
    """Meta and bytes of `tensor` in a codec that is not raw; `look`: measure its error, too.

    Raises:
        ValueError: a dtype that may not be sent, or that the codec cannot write.
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
    """[rows, blocks, 64], the last block of a row filled up with zeros."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).view(rows.shape[0], -1, BLOCK)


def _to_int8(tensor: torch.Tensor, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _blocks(tensor.float())
    scales = wide.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scales > 0, wide / scales, 0.0).round().clamp(-127, 127)  # not a number stays in the scale
    whole = steps.nan_to_num(0.0).to(torch.int8).view(wide.shape[0], -1)
    return scales.contiguous(), whole[:, : tensor.shape[-1] if tensor.dim() else 1].contiguous()


def _to_topk(tensor: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    flat = tensor.reshape(-1)
    places = flat.abs().topk(codecs.kept(flat.numel(), share), sorted=False).indices
    return places.to(torch.int32), flat[places].contiguous()


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
    count, rest = divmod(len(data), PLACE_BYTES + TABLE[meta.dtype].itemsize)
    places = torch.frombuffer(writable, dtype=torch.int32, count=count).long()
    if rest or int(places.min()) < 0 or int(places.max()) >= elements:
        raise ProtocolError(f"tensor {meta.name}: topk: expected places from 0 to {elements - 1}, got others")
    values = torch.frombuffer(writable, dtype=dtype, offset=count * PLACE_BYTES)
    return torch.zeros(elements, dtype=dtype).index_put_((places,), values).view(meta.shape)


def _unpacked(meta: TensorMeta, buffer: Buffer, packer: int, most: int) -> Buffer:
    """The bytes before they were packed; never more memory than the header allows."""
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
