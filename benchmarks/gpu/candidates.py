"""List tiles that are worth a measurement."""

from __future__ import annotations

from ranvier.actors.model.gpu.shapes import Shape
from ranvier.actors.model.gpu.tiles import Attention, Tile, above, many, size

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
