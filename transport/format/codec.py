"""How a tensor's bytes are written on an edge: a form, and perhaps a packer over it.

    raw         the tensor's own bytes, row-major, in the machine's byte order (little-endian is checked at import)
    bfloat16    floating-point numbers rounded to that type; also float16
    int8        per row and block of 64 columns one float32 scale, then one byte a number
    topk        the share of numbers that are largest in size, each with its place; the others become 0 (for gradients)
    lz4, zstd   after any of these, such as int8+zstd: packed without loss

A codec travels as its number in the table, which grows at its end. No torch here: what a codec does to a tensor is in
`tensors.py`; this says what sizes it may come to, so that a header can be checked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

FORMS: tuple[str, ...] = ("raw", "bfloat16", "float16", "int8", "topk")
PACKERS: tuple[str, ...] = ("", "lz4", "zstd")
CODECS: tuple[str, ...] = tuple(f"{form}+{packer}" if packer else form for packer in PACKERS for form in FORMS)
"""Every codec by its number: form and packer."""

RAW, BFLOAT16, FLOAT16, INT8, TOPK = range(5)
LZ4, ZSTD = 1, 2
BLOCK = 64
SCALE_BYTES = 4
PLACE_BYTES = 4
DEFAULT_SHARE = 1 / 16


class Codec(NamedTuple):
    """One codec as an edge declares it. `share` is that of `topk`."""

    form: int = RAW
    packer: int = 0
    share: float = 0.0

    @property
    def number(self) -> int:
        return self.packer * len(FORMS) + self.form

    def __str__(self) -> str:
        form = f"topk:{self.share:g}" if self.form == TOPK else FORMS[self.form]
        return f"{form}+{PACKERS[self.packer]}" if self.packer else form


class Coding(NamedTuple):
    """What a codec did to one tensor: its bytes before, the time, and, where it was looked at, the largest error relative
    to the largest number."""

    raw_bytes: int
    took_ns: int
    error: float | None


def parse(text: str) -> Codec:
    """The codec that a graph file names: `int8`, `raw+zstd`, `topk:0.05+lz4`.

    Raises:
        ValueError: there is no such codec.
    """
    form, plus, packer = text.partition("+")
    name, colon, share = form.partition(":")
    if name not in FORMS or (plus and packer not in PACKERS[1:]) or (colon and name != "topk"):
        raise ValueError(
            f"codec {text!r} does not exist; one of {', '.join(FORMS)}, each perhaps followed by +lz4 or +zstd"
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
    """Form and packer."""
    return number % len(FORMS), number // len(FORMS)


def kept(elements: int, share: float) -> int:
    """How many numbers `topk` keeps: at least one, if there is one."""
    return min(elements, max(1, math.ceil(elements * share)))


def form_bytes(form: int, itemsize: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """The least and the most bytes of a tensor in a form, before it is packed."""
    elements = math.prod(shape)
    if form in (BFLOAT16, FLOAT16):
        return 2 * elements, 2 * elements
    if form == INT8:
        width = shape[-1] if shape else 1
        blocks = elements // width * -(-width // BLOCK) if width else 0
        return elements + SCALE_BYTES * blocks, elements + SCALE_BYTES * blocks
    if form == TOPK:
        return (PLACE_BYTES + itemsize if elements else 0), elements * (PLACE_BYTES + itemsize)
    return elements * itemsize, elements * itemsize


def wire_bytes(number: int, itemsize: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """The least and the most bytes of a tensor on the wire. What cannot be packed grows by a little."""
    form, packer = of_number(number)
    least, most = form_bytes(form, itemsize, shape)
    return (0 if packer else least), (most + most // 128 + 1024 if packer else most)
