"""Check what codecs restore, how large the encoded tensors are, and that no bytes do harm."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranvier.transport.format import codec as codecs
from ranvier.transport.format.codec import CODECS, Codec, parse
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Header, TensorMeta, decode
from ranvier.transport.format.tensors import encode, from_buffer

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TEXTS = [f"{form}{packer}" for form in (*codecs.FORMS, "topk:0.3") for packer in ("", "+lz4", "+zstd")]


def through(tensor: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, int, float | None]:
    """Encode and decode a tensor, with the header of the wire.

    Return the tensor, the encoded bytes and the error."""
    meta, buffer, coding = encode("x", tensor, codec, look=True)
    header = decode(Header(1, 0, 0, 1, (), (meta,), 0, 0, 0).encode())
    assert isinstance(header, Header)
    assert coding.raw_bytes == tensor.nbytes
    assert meta.nbytes == len(buffer)
    return from_buffer(header.tensors[0], bytearray(buffer)), len(buffer), coding.error


@pytest.mark.parametrize("text", TEXTS)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3).map(lambda s: [*s, 70]) | st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_what_comes_back(text: str, shape: list[int], dtype: torch.dtype, seed: int) -> None:
    """Restore shape and dtype always, and the values as the codec promises.

    raw is exact bit for bit. bfloat16 and float16 round as torch does. int8 is within half a step of its block. topk
    keeps the largest numbers unchanged, and sets all other numbers to zero."""
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10).to(dtype)
    codec = parse(text)
    back, _, error = through(tensor, codec)
    assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
    form = codecs.FORMS[codec.form]
    if form == "raw" or not tensor.numel():
        assert torch.equal(back, tensor)
        return
    assert error == pytest.approx(float((back.double() - tensor.double()).abs().max() / tensor.double().abs().max()))
    if form in ("bfloat16", "float16"):
        assert torch.equal(back, tensor.to(getattr(torch, form)).to(dtype))
    elif form == "int8":
        rows, kept = (
            tensor.double().view(-1, shape[-1] if shape else 1),
            back.double().view(-1, shape[-1] if shape else 1),
        )
        for start in range(0, rows.shape[1], codecs.BLOCK):
            block, made = rows[:, start : start + codecs.BLOCK], kept[:, start : start + codecs.BLOCK]
            step = block.abs().amax(-1, keepdim=True) / 127
            assert ((block - made).abs() <= step * 0.51 + block.abs() * 0.005).all()
    else:
        keeps = codecs.kept(tensor.numel(), codec.share)
        assert int((back != 0).sum()) <= keeps
        largest = tensor.abs().flatten().topk(keeps).values.sum()
        assert torch.isclose(back.abs().sum().double(), largest.double(), rtol=1e-2)
        assert torch.equal(back[back != 0], tensor[back != 0])


def test_sizes_are_those_that_show_states() -> None:
    """Encode to the sizes that `show` states."""
    tensor = torch.randn(7, 576)
    assert through(tensor, parse("bfloat16"))[1] == tensor.nbytes // 2
    assert through(tensor, parse("int8"))[1] == 7 * (576 + 9 * 4)
    assert through(tensor, parse("topk:0.01"))[1] == math.ceil(7 * 576 / 100) * 8
    assert through(torch.zeros(7, 576), parse("raw+zstd"))[1] < 100


def test_not_a_number_stays_one() -> None:
    """Keep NaN, and never turn it into a number."""
    tensor = torch.tensor([[1.0, float("nan"), 2.0]])
    for text in ("bfloat16", "int8", "int8+lz4"):
        assert through(tensor, parse(text))[0].isnan().any()


@pytest.mark.parametrize("text", ["int9", "raw+gzip", "topk:0", "topk:2", "topk:x", "int8:0.5", "+lz4", ""])
def test_codecs_that_do_not_exist(text: str) -> None:
    """Refuse a codec that does not exist."""
    with pytest.raises(ValueError, match="codec"):
        parse(text)


@pytest.mark.parametrize("text", TEXTS[:15])
def test_names_and_numbers_agree(text: str) -> None:
    """Map the name of each codec to its number and back."""
    assert CODECS[parse(text).number] == text
    assert parse(str(parse(text))) == parse(text)


@given(
    number=st.integers(1, len(CODECS) - 1), shape=st.lists(st.integers(0, 70), max_size=3), data=st.binary(max_size=400)
)
@settings(max_examples=600)
def test_no_bytes_do_harm(number: int, shape: list[int], data: bytes) -> None:
    """Return a tensor of the stated shape or raise ProtocolError, for any bytes after a valid header."""
    meta = TensorMeta("x", 8, tuple(shape), number, len(data))
    with contextlib.suppress(ProtocolError):
        decode(Header(1, 0, 0, 1, (), (meta,), 0, 0, 0).encode())
        assert from_buffer(meta, data).shape == torch.Size(shape)


@pytest.mark.parametrize("packer", ["lz4", "zstd"])
def test_a_packed_bomb_is_refused(packer: str) -> None:
    """Refuse a packed bomb before memory is allocated.

    64 MiB of zeros are packed into a few kB, after a header of four numbers."""
    meta, buffer, _ = encode("x", torch.zeros(1 << 24), parse(f"raw+{packer}"), look=False)
    small: Any = TensorMeta("x", 8, (4,), meta.codec, len(buffer))
    with pytest.raises(ProtocolError, match="expected at most 16 bytes, got a claim of 67108864"):
        from_buffer(small, buffer)


def test_places_out_of_range_are_refused() -> None:
    """Refuse a topk index that is out of range."""
    meta, buffer, _ = encode("x", torch.arange(1.0, 9.0), parse("topk:0.25"), look=False)
    wrong = bytearray(buffer)
    wrong[0] = 200
    with pytest.raises(ProtocolError, match="topk: expected index-value pairs with indices from 0 to 7"):
        from_buffer(meta, wrong)


def test_integers_have_no_lossy_codec() -> None:
    """Refuse a lossy codec for integers."""
    with pytest.raises(ValueError, match="expected floats, got torch.int64"):
        encode("x", torch.arange(3), parse("int8"), look=False)
    meta = TensorMeta("x", 5, (8,), parse("int8").number, 12)
    with pytest.raises(ProtocolError, match="codec int8: expected floats, got int64"):
        decode(Header(1, 0, 0, 1, (), (meta,), 0, 0, 0).encode())
