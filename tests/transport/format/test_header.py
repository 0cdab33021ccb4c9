"""Decode what was encoded, and raise `ProtocolError`, and nothing else, for any other bytes."""

from __future__ import annotations

import contextlib
import pickle
import re
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranvier.transport.format import header as h
from ranvier.transport.format.dtypes import TABLE
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Ack, Header, Row, TensorMeta, decode

COUNT = st.integers(0, (1 << 63) - 1)


@st.composite
def metas(draw: Any) -> TensorMeta:
    """Draw the metadata of a tensor."""
    dtype = draw(st.sampled_from(TABLE))
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=8)))
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    if nbytes > h.MAX_TENSOR_BYTES:
        shape, nbytes = (), dtype.itemsize
    return TensorMeta(draw(st.text(max_size=20)), dtype.number, shape, 0, nbytes)


HEADERS = st.builds(
    Header,
    version=st.just(h.VERSION),
    kind=st.sampled_from([0, 1, 2]),
    edge=COUNT,
    sequence=COUNT,
    rows=st.lists(st.builds(Row, COUNT, COUNT, COUNT, COUNT), max_size=30).map(tuple),
    tensors=st.lists(metas(), max_size=5).map(tuple),
    ready_ns=COUNT,
    sent_ns=COUNT,
    checksum=st.integers(0, (1 << 32) - 1),
    acks=st.lists(st.builds(Ack, COUNT, COUNT, COUNT, COUNT), max_size=4).map(tuple),
)


@given(HEADERS)
def test_round_trip(header: Header) -> None:
    """Decode an encoded header to the same header."""
    assert decode(header.encode()) == header


@given(st.binary(max_size=300))
@settings(max_examples=500)
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    """Return a header or raise ProtocolError, for any bytes."""
    with contextlib.suppress(ProtocolError):
        decode(data)


LEAVES = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(st.lists(VALUES, min_size=0, max_size=10), st.integers(0, 9), VALUES)
@settings(max_examples=500)
def test_no_msgpack_raises_anything_else(fields: list[Any], index: int, value: Any) -> None:
    """Return a header or raise ProtocolError, for any valid msgpack.

    The inputs are of a wrong shape, or a good header with one field changed."""
    good: list[Any] = [1, 0, 0, 1, [[1, 1, 0, 1]], [["x", 8, [1], 0, 4]], 5, 6, 0, []]
    if index < len(good):
        good[index] = value
    for candidate in (fields, good):
        with contextlib.suppress(ProtocolError):
            decode(msgpack.packb(candidate))


@given(HEADERS, st.data())
@settings(max_examples=100)
def test_traces_go_with_their_rows(header: Header, data: Any) -> None:
    """Send a W3C trace context with each row, of 25 bytes or none.

    The header without contexts is unchanged."""
    traces = tuple(data.draw(st.sampled_from([b"", bytes(range(25))])) for _ in header.rows)
    traced = h.TracedHeader(*(getattr(header, name) for name in header.__struct_fields__), traces)
    read = decode(traced.encode())
    assert isinstance(read, h.TracedHeader) and read == traced
    assert not isinstance(decode(header.encode()), h.TracedHeader)


@given(HEADERS, st.data())
@settings(max_examples=200)
def test_a_damaged_header_is_refused_or_read(header: Header, data: Any) -> None:
    """Read or refuse a header with one byte changed, or with any tail cut off."""
    encoded = bytearray(header.encode())
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    for candidate in (bytes(encoded), header.encode()[:at]):
        with contextlib.suppress(ProtocolError):
            decode(candidate)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x00" * (64 * 1024 + 1), "expected at most 65536 bytes, got 65537"),
        (msgpack.packb([2, 0, 0, 1, [], [], 0, 0, 0, []]), "expected wire version 1, got 2"),
        (msgpack.packb([True, 0, 0, 1, [], [], 0, 0, 0, []]), "expected wire version 1, got 195"),
        (msgpack.packb([1, 9, 0, 1, [], [], 0, 0, 0, []]), "expected `int` <= 2 - at `kind`"),
        (msgpack.packb([1, 0, -1, 1, [], [], 0, 0, 0, []]), "expected `int` >= 0 - at `edge`"),
        (
            msgpack.packb([1, 0, 0, 1, [[1, 1, 0]], [], 0, 0, 0, []]),
            "expected `array` of length 4, got 3 - at `rows[0]`",
        ),
        (
            msgpack.packb([1, 0, 0, 1, [], [["x", 10, [1], 0, 4]], 0, 0, 0, []]),
            "expected `int` <= 9 - at `tensors[0].dtype`",
        ),
        (
            msgpack.packb([1, 0, 0, 1, [], [["x", 8, [1], 15, 4]], 0, 0, 0, []]),
            "expected `int` <= 14 - at `tensors[0].codec`",
        ),
        (
            msgpack.packb([1, 0, 0, 1, [], [["x", 8, [1] * 9, 0, 4]], 0, 0, 0, []]),
            "expected `array` of length <= 8 - at `tensors[0].shape`",
        ),
        (
            msgpack.packb([1, 0, 0, 1, [], [["x", 8, [3], 0, 4]], 0, 0, 0, []]),
            "expected 12 bytes for float32[3], got 4",
        ),
        (msgpack.packb([1, 0, 0, 1, [], [["x", 8, [1 << 40, 1 << 40], 0, 4]], 0, 0, 0, []]), "expected at most"),
        (msgpack.packb([1, 0, 0, 1, [], [], 0, 0, 0]), "expected 10 fields, or kind 3 (control), got (1, 0, 0, 1,"),
        (msgpack.packb([1, 0, 0, 1, [], [], 0, 0, -5, []]), "expected `int` >= 0 - at `checksum`"),
        (
            msgpack.packb([1, 0, 0, 1, [], [], 0, 0, 0, [[1, 2, 3, -4]]]),
            "expected `int` >= 0 - at `acks[0].byte_limit`",
        ),
        (
            msgpack.packb([1, 0, 0, 1, [[1, 1, 0, 1]], [], 0, 0, 0, [], []]),
            "expected a trace for each of 1 rows, got 0",
        ),
        (msgpack.packb([1, 0, 0, 1, [[1, 1, 0, 1]], [], 0, 0, 0, [], [b"x"]]), "expected a trace of 25 bytes, got 1"),
        (
            msgpack.packb([1, 0, 0, 1, [[1, 1, 0, 1]], [], 0, 0, 0, [], [b"x" * 26]]),
            "expected `bytes` of length <= 25 - at `traces[0]`",
        ),
        (msgpack.packb([1, 3, 0, 77]), "expected a verb from 0 to 6, got 77"),
        (msgpack.packb([1, 3, 0, 3, 1]), "control ACK: expected (int, int, int)"),
        (msgpack.packb({}), "expected an array"),
        (msgpack.ExtType(3, b"x").data, "expected"),
        (pickle.dumps({"a": 1}), "expected"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, words: str) -> None:
    """Name what is wrong with a header.

    One case is a pickle where a header should be (case 41)."""
    with pytest.raises(ProtocolError, match=re.escape(words)):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",  # an array that claims 2^32 entries
        b"\xdb\xff\xff\xff\xff",  # a string that claims 4 GiB
        b"\xc6\xff\xff\xff\xff",  # bytes that claim 4 GiB
        b"\xdf\xff\xff\xff\xff",  # a map that claims 2^32 entries
        b"\x91" * 60_000,  # arrays in arrays
        b"\x94\x01\x03\x00" + b"\x91" * 60_000,  # the same behind a control message's first fields
        b"\x9a\x01\x00\x00\x01\xdd\xff\xff\xff\xff",  # 2^32 rows
        b"\x9a\x01\x00\x00\x01\xdc\x10\x00" + b"\x90" * 60_000,  # 4096 rows, all empty
        b"\x9a\x01\x00\x00\x01\x90\x91\x95\xdb\xff\xff\xff\xff",  # a tensor's name of 4 GiB
    ],
)
def test_claims_allocate_nothing(data: bytes) -> None:
    """Allocate at most a multiple of the header's limit for a length that is only claimed."""
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * h.MAX_HEADER_BYTES


def test_a_header_too_large_is_the_callers_fault() -> None:
    """Raise ValueError at the sender if a header is too large."""
    rows = tuple(Row(1 << 60, 1 << 60, 1 << 60, 1 << 60) for _ in range(4000))
    with pytest.raises(ValueError, match="4000 rows"):
        Header(1, 0, 0, 1, rows, (), 0, 0, 0).encode()
