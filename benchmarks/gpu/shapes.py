"""Describe a group of llama-family layers on a device: its sizes, its weights, its pages, and the tiles of its kernels.

Shape suffixes: T tokens (one per session), L layers, H hidden, N query heads, K key-value heads, D head width,
I inner width, V vocabulary, S pages, P positions, W pages per session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Shape:
    """Hold the sizes and switches that the layers of a group share."""

    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    layers: int
    vocabulary: int
    eps: float = 1e-5
    window: int = 0
    """Positions that a token sees, itself included; 0 for all."""
    qkv_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None

    @property
    def attention_scale(self) -> float:
        return self.head_width**-0.5 if self.scale is None else self.scale

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_width


@dataclass(frozen=True)
class Layer:
    """Hold the weights of one layer, each matrix [rows, columns] contiguous."""

    norm_in_H: torch.Tensor
    qkv: torch.Tensor
    """[(N + 2·K)·D, H]: queries, keys, values."""
    out: torch.Tensor
    """[H, N·D]"""
    norm_mid_H: torch.Tensor
    up: torch.Tensor
    """[2·I, H]: gate, then up."""
    down: torch.Tensor
    """[H, I]"""
    qkv_bias: torch.Tensor | None = None
    norm_query_D: torch.Tensor | None = None
    norm_key_D: torch.Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """Hold a group's weights; a group without an embedding takes messages, one without a head sends them."""

    layers: Sequence[Layer]
    turns_PD: torch.Tensor
    """cos and sin of every position, float32 [positions, 2, D / 2]; rope scaling is already in them."""
    embedding_VH: torch.Tensor | None = None
    norm_out_H: torch.Tensor | None = None
    head_VH: torch.Tensor | None = None

    def bytes_per_token(self) -> int:
        """Return how many bytes of weights one decode step has to read."""
        matrices = [matrix for layer in self.layers for matrix in (layer.qkv, layer.out, layer.up, layer.down)]
        return sum(matrix.nbytes for matrix in matrices) + (0 if self.head_VH is None else self.head_VH.nbytes)


@dataclass(frozen=True)
class Pages:
    """Hold the keys and values of all sessions: per layer [pages, K, page, D], each head's page contiguous."""

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]

    @classmethod
    def empty(cls, shape: Shape, pages: int, page: int, dtype: torch.dtype, device: torch.device) -> Pages:
        def made() -> list[torch.Tensor]:
            size = (pages, shape.kv_heads, page, shape.head_width)
            return [torch.empty(size, dtype=dtype, device=device) for _ in range(shape.layers)]

        return cls(made(), made())

    @property
    def page(self) -> int:
        return self.keys[0].shape[2]


@dataclass(frozen=True)
class Tile:
    """Say how one product is cut: rows and columns of a tile, splits of the columns, warps, pipeline stages."""

    dots: bool
    """True for the tensor cores (`kernels.many`), False for the ordinary ones (`kernels.one`, one token)."""
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


def default_tiles(shape: Shape, tokens: int, width: int, page: int, pdl: bool, cores: int = 132) -> Tiles:
    """Return tiles that are good without a measurement, for a device of `cores` multiprocessors."""
    products = {}
    for name in PRODUCTS:
        rows, columns = size(shape, name)
        if tokens == 1:
            tall, wide, warps = {"up": (2, 4096, 8), "head": (8, 512, 4), "down": (4, 2048, 8)}.get(name, (4, 1024, 4))
            wide = min(above(columns), wide)
            products[name] = Tile(False, tall, wide, 1, max(1, min(warps, wide // 128)))
        else:
            tall, wide, warps, stages = (64, 128, 4, 4) if name in ("up", "head") else (64, 256, 8, 3)
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


ONE = (
    (4, 1024, 4), (2, 1024, 4), (2, 2048, 4), (8, 512, 4), (4, 512, 4), (8, 1024, 8), (4, 2048, 8), (2, 4096, 8),
    (2, 512, 2), (1, 4096, 8),
)  # fmt: skip
"""Tiles to try for one token: rows, columns, warps."""
MANY = (
    (64, 128, 1, 4, 4), (64, 64, 1, 4, 6), (32, 256, 1, 4, 4), (32, 256, 2, 4, 4), (32, 128, 2, 4, 5), (64, 256, 1, 8, 3),
    (128, 128, 1, 8, 3), (64, 128, 1, 8, 4),
)  # fmt: skip
"""Tiles to try on the tensor cores: rows, columns, programs per multiprocessor, warps, stages."""
ATTEND = ((64, 1, 2), (64, 2, 2), (64, 4, 2), (128, 2, 2), (128, 4, 3), (256, 4, 2), (256, 8, 2))
"""Cuts of the attention to try: block, warps, stages."""


def candidates(shape: Shape, name: str, tokens: int, cores: int = 132) -> list[Tile]:
    """Return tiles worth a measurement for the product `name`."""
    _, columns = size(shape, name)
    if tokens > 1:
        found = [many(shape, name, *choice, cores) for choice in MANY]
    else:
        least = {"head": 4, "out": 2, "down": 2}.get(name, 1)
        found = [
            Tile(False, tall, wide, 1, warps) for tall, wide, warps in ONE if tall >= least and wide <= above(columns)
        ]
    return list(dict.fromkeys(found))


def attention_candidates(first: Attention, page: int) -> list[Attention]:
    """Return cuts of the attention that are worth a measurement."""
    found = [
        Attention(block, chunk, warps, stages)
        for block, warps, stages in ATTEND
        for chunk in sorted({block, first.chunk // 2, first.chunk, 2 * first.chunk})
        if chunk % block == 0 and chunk % page == 0 and 4 * chunk >= first.chunk
    ]
    return list(dict.fromkeys(found))
