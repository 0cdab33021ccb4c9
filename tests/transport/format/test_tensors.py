"""Keep every dtype and shape bit for bit over the wire, and refuse what does not fit its header or its edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranvier.transport.format.aligned import ALIGNED_BYTES, aligned
from ranvier.transport.format.dtypes import TABLE
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Header, Row, TensorMeta, decode
from ranvier.transport.format.message import check_frames, check_specs, checksum
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.format.tensors import from_buffer, to_buffer, torch_dtype


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    """Draw a tensor of any dtype, any shape (also of size zero and rank zero) and any strides."""
    dtype = torch_dtype(draw(st.sampled_from(TABLE)).name)
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    count = 1
    for size in shape:
        count *= size
    raw = torch.tensor(list(draw(st.binary(min_size=count * 8, max_size=count * 8))), dtype=torch.uint8)
    if dtype is torch.bool:
        tensor = (raw[:count] % 2 == 1).view(shape)
    else:
        tensor = raw[: count * torch.empty(0, dtype=dtype).element_size()].view(dtype).view(shape)
    if draw(st.booleans()) and tensor.dim() >= 2:
        tensor = tensor.transpose(0, -1)
    if draw(st.booleans()) and tensor.dim() >= 1 and tensor.shape[0] > 1:
        tensor = tensor[::2]
    return tensor


@given(tensors())
def test_round_trip_bit_for_bit(tensor: torch.Tensor) -> None:
    """Restore a tensor bit for bit.

    It may have NaNs with their payload, negative zeros or no elements, or be transposed or strided."""
    meta, buffer = to_buffer("x", tensor)
    header = Header(1, 0, 0, 1, (), (meta,), 0, 0, checksum((buffer,)))
    got = decode(header.encode())
    assert isinstance(got, Header)
    received = bytearray(buffer)
    check_frames(got, (received,))
    back = from_buffer(got.tensors[0], received)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert [bytes_of(back)] == [bytes_of(tensor)]


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes by torch's own flattening, not by the code under test."""
    return bytes(tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).tolist())


def test_sending_does_not_copy() -> None:
    """Send a large tensor from its own memory, and receive it as a view of the buffer."""
    tensor = torch.zeros(1 << 14)
    _, buffer = to_buffer("x", tensor)
    tensor[1] = 7
    assert torch.frombuffer(buffer, dtype=torch.float32)[1] == 7
    data = bytearray(16)
    view = from_buffer(TensorMeta("x", 8, (4,), 0, 16), memoryview(data))
    data[0:4] = b"\x00\x00\x80\x3f"
    assert view[0] == 1


def test_a_tensor_that_learns_is_sent_as_it_is() -> None:
    """Send a tensor that requires a gradient."""
    meta, _ = to_buffer("x", torch.ones(2, requires_grad=True))
    assert meta.nbytes == 8


def test_a_dtype_outside_the_table_is_refused() -> None:
    """Refuse a dtype that is not in the table."""
    with pytest.raises(ValueError, match=r"tensor x: dtype torch.complex64 may not be sent"):
        to_buffer("x", torch.zeros(1, dtype=torch.complex64))


META = TensorMeta("x", 8, (2, 3), 0, 24)


def header(*tensors: TensorMeta, check: int = 0) -> Header:
    """Return a header with these tensors."""
    return Header(1, 0, 4, 1, (Row(1, 1, 0, 2),), tensors, 0, 0, check)


@pytest.mark.parametrize(
    ("head", "buffers", "words"),
    [
        (header(META), (), "expected 1 tensor frames"),
        (header(META), (b"0" * 24, b""), "expected 1 tensor frames .* got 2"),
        (header(META), (b"0" * 23,), "edge 4: tensor x: expected a frame of 24 bytes, got 23"),
        (header(META, check=5), (b"0" * 24,), "expected checksum 0x00000005"),
    ],
)
def test_frames_that_do_not_fit_the_header(head: Header, buffers: tuple[bytes, ...], words: str) -> None:
    """Refuse a truncated frame (case 18) and a flipped bit (case 17) where they are noticed."""
    with pytest.raises(ProtocolError, match=words):
        check_frames(head, buffers)


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (
            [("x", TensorSpec("float32", ("tokens", 4)))],
            r"edge a.x -> b.x: expected float32\[tokens, 4\] with tokens=2, rows=1, got ",
        ),
        ([("x", TensorSpec("float16", ("tokens", 3)))], "expected float16"),
        ([("x", TensorSpec("float32", ("rows", 3)))], "expected float32"),
        ([("x", TensorSpec("float32", ("n", "n")))], "expected float32"),
        ([("x", TensorSpec("float32", (6,)))], "expected float32"),
        ([("y", TensorSpec("float32", ("tokens", 3)))], "expected tensor 'y', got 'x'"),
        ([], "expected 0 tensors, got 1"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_edge(specs: list[tuple[str, TensorSpec]], words: str) -> None:
    """Refuse tensors that do not fit the specification of their edge."""
    with pytest.raises(ProtocolError, match=words):
        check_specs("a.x -> b.x", specs, (Row(1, 1, 0, 2),), (META,))


def test_named_sizes_fit_when_they_agree() -> None:
    """Accept named sizes that agree."""
    check_specs("e", [("x", TensorSpec("float32", ("tokens", "width")))], (Row(1, 1, 0, 2),), (META,))
    square = TensorMeta("x", 8, (3, 3), 0, 36)
    check_specs("e", [("x", TensorSpec("float32", ("n", "n")))], (), (square,))


@pytest.mark.parametrize(
    ("dtype", "shape", "words"),
    [
        ("complex64", (1,), "dtype 'complex64' is not one of"),
        ("float32", (1,) * 9, "rank 9"),
        ("float32", (-1,), "negative"),
        ("float32", ("a b",), "not an identifier"),
    ],
)
def test_a_spec_that_cannot_be(dtype: str, shape: tuple[Any, ...], words: str) -> None:
    """Refuse an impossible specification of a tensor."""
    with pytest.raises(ValueError, match=words):
        TensorSpec(dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_that_begins_elsewhere_is_copied(dtype: torch.dtype) -> None:
    """Copy a tensor whose address is not aligned, and no other.

    A tensor of bfloat16 is never copied."""
    memory = (torch.arange(400) % 100).to(torch.uint8)  # no byte pattern of a NaN
    assert memory.data_ptr() % ALIGNED_BYTES == 0
    for begins in range(0, 200, dtype.itemsize):
        tensor = memory[begins : begins + 192].view(dtype).view(3, -1)
        made = aligned(tensor)
        assert torch.equal(made, tensor)
        keeps = begins % ALIGNED_BYTES == 0 or dtype is torch.bfloat16
        assert (made is tensor) == keeps
        assert keeps or made.data_ptr() % ALIGNED_BYTES == 0
