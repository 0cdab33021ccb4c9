"""Multiply coded matrices (`actors/model/coded.py`) by tokens on a GPU, with what follows the products, as products.py does.

A tile of codes becomes numbers in registers, so a step reads a half or a third of the bytes of bfloat16. Names as there.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import dot
from .products import ADDED, GATED, end, finish, inverse_rms, squares_of

BLOCK = tl.constexpr(32)
"""Columns that share a scale."""


@triton.jit
def _numbers(w, scales, least, row, inside_r, k, C: tl.constexpr, BC: tl.constexpr, NARROW: tl.constexpr):
    """Load a tile of codes from column k on.

    Return their numbers, for 4 bits those of the low halves and of the high ones, and the columns of the first.
    """
    if NARROW:
        j = k // 2 + tl.arange(0, BC // 2)
        column = j // 16 * 32 + j % 16
        inside = inside_r[:, None] & (column < C)[None, :]
        at = row[:, None].to(tl.int64)
        codes = tl.load(w + at * (C // 2) + j[None, :], mask=inside, other=0, eviction_policy="evict_first")
        block = at * (C // BLOCK) + (j // 16)[None, :]
        scale = tl.load(scales + block, mask=inside, other=0.0).to(tl.float32)
        lowest = tl.load(least + block, mask=inside, other=0.0).to(tl.float32)
        low = (codes & 15).to(tl.float32) * scale + lowest
        high = (codes >> 4).to(tl.float32) * scale + lowest
    else:
        column = k + tl.arange(0, BC)
        inside = inside_r[:, None] & (column < C)[None, :]
        at = row[:, None].to(tl.int64)
        codes = tl.load(w + at * C + column[None, :], mask=inside, other=0, eviction_policy="evict_first")
        scale = tl.load(scales + at * (C // BLOCK) + (column // BLOCK)[None, :], mask=inside, other=0.0).to(tl.float32)
        low = (codes.to(tl.float32) - 128.0) * scale
        high = low
    return low, high, column


@triton.jit(do_not_specialize=["T", "PARTS"])
def one_coded(
    w, scales, least, x, sums, bias, out, hidden, norm, normed, sums_out, best, best_at, T, PARTS,
    R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, NARROW: tl.constexpr,
    H: tl.constexpr, PARTS_P: tl.constexpr, eps: tl.constexpr,
    EPILOGUE: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply a matrix [R, C] by one token [C] on the ordinary cores: a program per BR rows."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    t = tl.arange(0, 1)
    rows = tile * BR + tl.arange(0, BR)
    inside = rows < R
    WIDE: tl.constexpr = BC // 2 if NARROW else BC
    total = tl.zeros((BR, WIDE), tl.float32)
    total_up = tl.zeros((BR, WIDE), tl.float32)
    for k in range(0, C, BC):
        low, high, column = _numbers(w, scales, least, rows, inside, k, C, BC, NARROW)
        xs = tl.load(x + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
        total += low * xs
        if NARROW:
            xs_high = tl.load(x + column + 16, mask=column < C, other=0.0).to(tl.float32)[None, :]
            total += high * xs_high
        if EPILOGUE == GATED:
            low, high, column = _numbers(w, scales, least, rows + R, inside, k, C, BC, NARROW)
            total_up += low * xs
            if NARROW:
                total_up += high * xs_high
    product = tl.sum(total, 1)[:, None]
    up = tl.sum(total_up, 1)[:, None]
    inverse = tl.full((1,), 1.0, tl.float32)
    weight = tl.zeros((BR,), tl.float32)
    before = tl.zeros((BR, 1), tl.float32)
    if EPILOGUE == ADDED:
        weight = tl.load(norm + rows, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(hidden + rows[:, None] + t[None, :], mask=inside[:, None], other=0.0)
    else:
        inverse = inverse_rms(squares_of(sums, t, T, PARTS, PARTS_P), eps, H)
    finish(
        product, up, tile, rows, t, T, inverse, before, weight,
        bias, out, hidden, normed, sums_out, best, best_at, R, (R + BR - 1) // BR, EPILOGUE, BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "PARTS"])
def many_coded(
    w, scales, least, x, sums, bias, out, hidden, norm, normed, sums_out, best, best_at, T, PARTS,
    TP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, NARROW: tl.constexpr,
    H: tl.constexpr, PARTS_P: tl.constexpr, eps: tl.constexpr,
    EPILOGUE: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply a matrix [R, C] by T tokens [T, C] on the tensor cores, T padded to TP >= 16: a program per BR rows."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    t = tl.arange(0, TP)
    rows = tile * BR + tl.arange(0, BR)
    inside = rows < R
    squares = tl.zeros((TP, 1), tl.float32)
    if EPILOGUE != ADDED:
        squares = squares_of(sums, t, T, PARTS, PARTS_P)
    product = tl.zeros((BR, TP), tl.float32)
    up = product
    for k in range(0, C, BC):
        low, high, column = _numbers(w, scales, least, rows, inside, k, C, BC, NARROW)
        there = (t < T)[None, :] & (column < C)[:, None]
        at = x + t[None, :] * C + column[:, None]
        xs = tl.load(at, mask=there, other=0.0)
        product = dot(low.to(xs.dtype), xs, product)
        if NARROW:
            xs_high = tl.load(at + 16, mask=there, other=0.0)
            product = dot(high.to(xs.dtype), xs_high, product)
        if EPILOGUE == GATED:
            low, high, column = _numbers(w, scales, least, rows + R, inside, k, C, BC, NARROW)
            up = dot(low.to(xs.dtype), xs, up)
            if NARROW:
                up = dot(high.to(xs.dtype), xs_high, up)
    end(
        product, up, tile, rows, t, T, squares, bias, out, hidden, norm, normed, sums_out, best, best_at,
        H, eps, R, (R + BR - 1) // BR, EPILOGUE, BIAS,
    )  # fmt: skip
