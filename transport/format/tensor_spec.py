"""What an edge carries: the dtype and the shape of a tensor, checked on send and on receive.

A dimension is a number or a name. Two names have a meaning here: `tokens` is the number of tokens over all rows
of the message, `rows` the number of rows. Any other name is free, and must be the same size wherever it stands
in one message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .dtypes import BY_NAME
from .errors import ProtocolError

Dim = int | str
MAX_RANK = 8
"""More dimensions than this are refused (DESIGN: rank at most 8)."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """`TensorSpec("float32", ("tokens", 576))`: dtype name from the table, shape of sizes and names.

    Raises:
        ValueError: an unknown dtype, a rank over 8, a negative size, a name that is no identifier.
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
        """The spec that `str` writes: `float32[tokens, 576]`.

        Raises:
            ValueError: it is not written so.
        """
        match = re.fullmatch(r"\s*(\w+)\s*\[([^\[\]]*)\]\s*", text)
        if match is None:
            raise ValueError(f"{text!r}: expected dtype[size, …], such as float32[rows, 64]")
        dims = [dim.strip() for dim in match[2].split(",")] if match[2].strip() else []
        return cls(match[1], tuple(int(dim) if dim.isdecimal() else dim for dim in dims))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def check(self, edge: str, dtype: str, shape: tuple[int, ...], bound: Mapping[str, int]) -> None:
        """Refuse a tensor that is not of this spec.

        Args:
            edge: the name of the edge, for the message.
            dtype: the tensor's dtype name.
            shape: the tensor's shape.
            bound: sizes that names already have in this message (`tokens`, `rows`).

        Raises:
            ProtocolError: naming the edge, the expected and the actual.
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
        """Whether a tensor of this spec may go where `other` is asked for: same dtype, sizes that do not clash."""
        return (
            self.dtype == other.dtype
            and len(self.shape) == len(other.shape)
            and all(
                isinstance(a, str) or isinstance(b, str) or a == b for a, b in zip(self.shape, other.shape, strict=True)
            )
        )
