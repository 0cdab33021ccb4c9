"""Describe what an edge carries: the dtype and the shape of a tensor, checked on send and on receive.

A dimension is a number or a name. Two names have a fixed meaning: `tokens` is the number of tokens over all rows of the
message, and `rows` is the number of rows. Any other name is free, but stands for one size within a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .dtypes import BY_NAME
from .errors import ProtocolError

Dim = int | str
MAX_RANK = 8
"""Largest number of dimensions of a tensor."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Describe a tensor by the name of its dtype and by a shape of sizes and names: `TensorSpec("float32", ("tokens", 576))`.

    Raises:
        ValueError: the dtype is unknown, the rank is over 8, a size is negative, or a name is not an identifier.
    """

    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in BY_NAME:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(BY_NAME)}")
        if len(self.shape) > MAX_RANK:
            raise ValueError(f"rank {len(self.shape)} is over {MAX_RANK}")
        for dim in self.shape:
            if isinstance(dim, str) and not dim.isidentifier():
                raise ValueError(f"dimension name {dim!r} is not an identifier")
            if isinstance(dim, int) and dim < 0:
                raise ValueError(f"dimension {dim} is negative")

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Parse a spec as `str` writes it, such as `float32[tokens, 576]`.

        Raises:
            ValueError: the text does not have this form, or the spec is invalid.
        """
        match = re.fullmatch(r"\s*(\w+)\s*\[([^\[\]]*)\]\s*", text)
        if match is None:
            raise ValueError(f"{text!r}: expected dtype[size, …], such as float32[rows, 64]")
        dims = [dim.strip() for dim in match[2].split(",")] if match[2].strip() else []
        return cls(match[1], tuple(int(dim) if dim.isdecimal() else dim for dim in dims))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def check(self, edge: str, dtype: str, shape: tuple[int, ...], bound: Mapping[str, int]) -> None:
        """Refuse a tensor that does not match this spec.

        Args:
            edge: the name of the edge, for the message.
            dtype: the tensor's dtype name.
            shape: the tensor's shape.
            bound: the sizes that names have in this message (`tokens`, `rows`).

        Raises:
            ProtocolError: the tensor differs; the message names the edge, the expected and the actual tensor.
        """
        expected = self.shape
        if dtype == self.dtype and len(shape) == len(expected):
            free: dict[str, int] = {}
            for want, have in zip(expected, shape, strict=True):
                if isinstance(want, str):
                    want = bound[want] if want in bound else free.setdefault(want, have)
                if want != have:
                    break
            else:
                return
        sizes = ", ".join(f"{name}={size}" for name, size in bound.items())
        raise ProtocolError(
            f"edge {edge}: expected {self}{f' with {sizes}' if sizes else ''}, got {dtype}{list(shape)}"
        )

    def fits(self, other: TensorSpec) -> bool:
        """Return whether a tensor of this spec may go where `other` is expected: same dtype and rank, no conflicting sizes."""
        return (
            self.dtype == other.dtype
            and len(self.shape) == len(other.shape)
            and all(
                isinstance(a, str) or isinstance(b, str) or a == b for a, b in zip(self.shape, other.shape, strict=True)
            )
        )
