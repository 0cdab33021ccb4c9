"""Choose how the kernels of a step are cut into tiles, for a GPU with so many multiprocessors.

Shape suffixes as in shapes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .shapes import Shape


@dataclass(frozen=True)
class Tile:
    """Say how one product is cut: rows and columns of a tile, splits of the columns, warps, pipeline stages."""

    dots: bool
    """True for the tensor cores (`products.many`), False for the ordinary ones (`products.one`, one token)."""
    rows: int
    columns: int
    splits: int = 1
    warps: int = 4
    stages: int = 1
    ahead: int = 0
    """Columns that a program asks for in L2 before it waits (tensor cores only)."""


PRODUCTS = ("qkv", "out", "up", "down", "head")


@dataclass(frozen=True)
class Attention:
    """Say how the attention of a step is cut."""

    block: int
    """Positions that a program reads at a time; divides the chunk."""
    chunk: int
    """Positions per program."""
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Say how every kernel of a step is cut."""

    products: Mapping[str, Tile]
    attention: Attention
    pdl: bool = True
    """Start each kernel while the one before still runs (compute capability 9.0 and later)."""

    def with_product(self, name: str, tile: Tile) -> Tiles:
        return replace(self, products={**self.products, name: tile})


def size(shape: Shape, name: str) -> tuple[int, int]:
    """Return the rows and columns of the product `name`; `up` counts the rows of gate alone."""
    return {
        "qkv": (shape.qkv_rows, shape.hidden),
        "out": (shape.hidden, shape.heads * shape.head_width),
        "up": (shape.inner, shape.hidden),
        "down": (shape.hidden, shape.inner),
        "head": (shape.vocabulary, shape.hidden),
    }[name]


def above(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is not below `number` and `least`."""
    return max(least, 1 << (number - 1).bit_length())


def splits(columns: int, tile: int, wanted: int) -> int:
    """Return at most `wanted` splits, so that each has the same whole number of tiles where that is possible."""
    if columns % tile:
        return 1
    steps = columns // tile
    return max(count for count in range(1, min(wanted, steps) + 1) if steps % count == 0)


def default_tiles(
    shape: Shape, tokens: int, width: int, page: int, pdl: bool, cores: int = 132, *, coded: bool = False,
    small: bool = False,
) -> Tiles:  # fmt: skip
    """Return tiles that are good without a measurement, for a device of `cores` multiprocessors.

    Those for coded matrices were not measured, and neither were those for multiprocessors with `small` shared memory.
    """
    products = {}
    for name in PRODUCTS if shape.vocabulary else PRODUCTS[:-1]:
        _, columns = size(shape, name)
        if tokens == 1:
            tall, wide, warps = {"up": (2, 4096, 8), "head": (8, 512, 4), "down": (4, 2048, 8)}.get(name, (4, 1024, 4))
            wide = min(above(columns), wide)
            products[name] = Tile(False, tall, wide, 1, max(1, min(warps, wide // 128)))
        elif coded:  # their columns are not split
            products[name] = Tile(True, 16, 128, 1, 4, 4)
        else:
            tall, wide, warps, stages = (64, 128, 4, 4) if name in ("up", "head") else (64, 256, 8, 3)
            stages -= small
            products[name] = many(shape, name, tall, wide, 1, warps, stages, cores)
    return Tiles(products, default_attention(shape, tokens, width, page), pdl)


def default_attention(shape: Shape, tokens: int, width: int, page: int) -> Attention:
    """Return a cut of the attention: enough programs to fill the device, but few parts to merge."""
    heads, positions = tokens * shape.kv_heads, width * page
    if heads < 64:
        chunk = max(page, above(-(-positions // 64)))
        narrow = shape.head_width <= 64  # wider heads spill with two warps
        return Attention(min(chunk, 128 if narrow else 64), chunk, 2 if narrow else 4, 2)
    chunk = max(page, min(512, above(positions)), above(-(-positions // 4)))
    return Attention(min(chunk, 128), chunk, 4, 3)


def many(shape: Shape, name: str, tall: int, wide: int, programs: int, warps: int, stages: int, cores: int) -> Tile:
    """Return a tile of the tensor cores with about so many programs per multiprocessor."""
    rows, columns = size(shape, name)
    return Tile(
        True, tall, wide, splits(columns, wide, max(1, programs * cores // -(-rows // tall))), warps, stages, 1024
    )
