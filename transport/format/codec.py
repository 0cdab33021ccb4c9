"""Define how a tensor's bytes are written on an edge: a form, and optionally a packer applied to it.

    raw         the tensor's own bytes, row-major, in the machine's byte order (little-endian is checked at import)
    bfloat16    floating-point numbers rounded to that type; float16 likewise
    int8        one float32 scale for each block of 64 columns of each row, then one byte per number
    topk        a share of the numbers, those of the largest magnitude, each with its index; the rest becomes 0 (for gradients)
    lz4, zstd   lossless packing after any of these, such as int8+zstd

A codec travels as its number in the table, which only grows at its end. This module gives the sizes that an encoded tensor
may have, so that a header can be checked. It does not import torch: `tensors.py` encodes and decodes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

FORMS: tuple[str, ...] = ("raw", "bfloat16", "float16", "int8", "topk")
PACKERS: tuple[str, ...] = ("", "lz4", "zstd")
CODECS: tuple[str, ...] = tuple(f"{form}+{packer}" if packer else form for packer in PACKERS for form in FORMS)
"""Names of all codecs, each a form and a packer. The index of a name is the number of the codec."""

RAW, BFLOAT16, FLOAT16, INT8, TOPK = range(5)
LZ4, ZSTD = 1, 2
BLOCK = 64
SCALE_BYTES = 4
INDEX_BYTES = 4
DEFAULT_SHARE = 1 / 16


class Codec(NamedTuple):
    """Describe one codec as an edge declares it. `share` is the share of numbers that `topk` keeps."""

    form: int = RAW
    packer: int = 0
    share: float = 0.0

    @property
    def number(self) -> int:
        """Return the codec's number in `CODECS`."""
        return self.packer * len(FORMS) + self.form

    def __str__(self) -> str:
        form = f"topk:{self.share:g}" if self.form == TOPK else FORMS[self.form]
        return f"{form}+{PACKERS[self.packer]}" if self.packer else form


class Coding(NamedTuple):
    """Record what a codec did to one tensor: its bytes before encoding, and the time that encoding took.

    `error` is the largest absolute error divided by the largest magnitude, or None if it was not measured.
    """

    raw_bytes: int
    took_ns: int
    error: float | None


def parse(text: str) -> Codec:
    """Return the codec that a graph file names, such as `int8`, `raw+zstd` or `topk:0.05+lz4`.

    Raises:
        ValueError: the codec does not exist, or its share is not over 0 and at most 1.
    """
    form, plus, packer = text.partition("+")
    name, colon, share = form.partition(":")
    if name not in FORMS or (plus and packer not in PACKERS[1:]) or (colon and name != "topk"):
        raise ValueError(
            f"codec {text!r} does not exist; use one of {', '.join(FORMS)}, optionally followed by +lz4 or +zstd"
        )
    kept = DEFAULT_SHARE if name == "topk" else 0.0
    if colon:
        try:
            kept = float(share)
        except ValueError:
            kept = -1.0
        if not 0 < kept <= 1:
            raise ValueError(f"codec {text!r}: expected a share over 0 and at most 1, got {share!r}")
    return Codec(FORMS.index(name), PACKERS.index(packer), kept)


def of_number(number: int) -> tuple[int, int]:
    """Return the form and the packer of the codec with this number."""
    return number % len(FORMS), number // len(FORMS)


def kept(elements: int, share: float) -> int:
    """Count the numbers that `topk` keeps: at least 1, unless the tensor is empty."""
    return min(elements, max(1, math.ceil(elements * share)))


def form_bytes(form: int, itemsize: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the minimum and the maximum bytes of a tensor in a form, before packing."""
    elements = math.prod(shape)
    if form in (BFLOAT16, FLOAT16):
        return 2 * elements, 2 * elements
    if form == INT8:
        width = shape[-1] if shape else 1
        blocks = elements // width * -(-width // BLOCK) if width else 0
        return elements + SCALE_BYTES * blocks, elements + SCALE_BYTES * blocks
    if form == TOPK:
        return (INDEX_BYTES + itemsize if elements else 0), elements * (INDEX_BYTES + itemsize)
    return elements * itemsize, elements * itemsize


def wire_bytes(number: int, itemsize: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the minimum and the maximum bytes of a tensor on the wire.

    Data that cannot be compressed grows slightly when it is packed.
    """
    form, packer = of_number(number)
    least, most = form_bytes(form, itemsize, shape)
    return (0 if packer else least), (most + most // 128 + 1024 if packer else most)
