"""Compute one decode step of llama-family layers on a GPU: the Triton kernels.

A layer takes five kernels (`launches.py` wires them):

1. `one` or `many` with QKV: RMS scale, the product with q, k and v, the bias.
2. `attend`: q/k norm, rotary, the write of the new key and value into their page, split-KV attention, the merge.
3. `one` or `many` with ADDED: the output product, the residual, the next norm's weight, partial sums of squares.
4. `one` or `many` with GATED: RMS scale, the products with gate and up, SiLU.
5. `one` or `many` with ADDED: the down product, as in 3.

RMSNorm is cut in two. Who writes the residual `hidden` also writes `normed` = hidden · weight of the next norm, and for
each tile of rows the sum of squares. Who reads `normed` multiplies its product by 1 / rms, which commutes with it.

Programmatic dependent launch (PDL): with it a kernel starts while the one before still runs. It loads its first weights
at once and then waits (`gdc_wait`) until the kernel before has ended and its writes are visible. Only weights, finished
pages and the step's inputs may be read before the wait. Every program must wait, so that the end of one kernel implies
the end of all kernels before it.

Nothing here adds floats atomically. Programs that share a result write parts, count their arrivals in an integer, and
the last one to arrive adds the parts in a fixed order. So a replay gives the same bits. Each count is left at zero.

Names: T tokens (one per session), R rows of a matrix, C its columns, H hidden, PARTS sums of squares per token,
K key-value heads, G query heads per key-value head, D head width. BR, BC, TP and GP are tile sizes, powers of two.

The kernels run on a CPU with TRITON_INTERPRET=1 (numpy < 2.4). Sizes are `tl.constexpr`, one compilation per shape; only
what changes with a session's depth is an ordinary argument.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import sampling
from .primitives import LINE, dot, prefetch

QKV = tl.constexpr(0)
"""out = product / rms + bias, float32."""
GATED = tl.constexpr(1)
"""out = silu(gate / rms) · up / rms; rows R.. of the matrix are `up`."""
ADDED = tl.constexpr(2)
"""hidden += product; also writes `normed` and the sums of squares."""
LOGITS = tl.constexpr(3)
"""out = product / rms, float32; also writes the largest of each tile of rows and where it is."""
NOWHERE = tl.constexpr(sampling.NOWHERE)
"""The index that stands for "the largest logit is not finite"; a host must treat it as an error."""


@triton.jit(do_not_specialize=["PARTS"])
def enter(
    source, tokens, norm, hidden, normed, sums, PARTS,
    H: tl.constexpr, HP: tl.constexpr, PARTS_P: tl.constexpr,
    EMBED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill the residual of one token: row `tokens[t]` of an embedding, or row t of what a message brought.

    The first kernel of a graph follows a copy, so it is launched without PDL, but lets the next one start early.
    """
    if PDL:
        gdc_launch_dependents()
    t = tl.program_id(0)
    h = tl.arange(0, HP)
    row = t.to(tl.int64)
    if EMBED:
        row = tl.load(tokens + t).to(tl.int64)
    value = tl.load(source + row * H + h, mask=h < H, other=0.0).to(tl.float32)
    weight = tl.load(norm + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(hidden + t * H + h, value, mask=h < H)
    tl.store(normed + t * H + h, (value * weight).to(normed.dtype.element_ty), mask=h < H)
    part = tl.arange(0, PARTS_P)
    tl.store(sums + t * PARTS + part, tl.where(part == 0, tl.sum(value * value, 0), 0.0), mask=part < PARTS)


@triton.jit
def _weights(base, r, c, left_r, left_c, C: tl.constexpr, WHOLE: tl.constexpr):
    """Load a tile of weights [BR, BC]; each byte is read once per step, so it should leave the L2 cache first."""
    at = base + r[:, None] * C + c[None, :]
    if WHOLE:
        tile = tl.load(at, eviction_policy="evict_first")
    else:
        inside = (r < left_r)[:, None] & (c < left_c)[None, :]
        tile = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def squares_of(sums, t, T, PARTS, PARTS_P: tl.constexpr):
    """Load the partial sums of squares [T, PARTS]: early, so that they travel beside the weights."""
    part = tl.arange(0, PARTS_P)
    at = sums + t[:, None] * PARTS + part[None, :]
    return tl.load(at, mask=(t < T)[:, None] & (part < PARTS)[None, :], other=0.0)


@triton.jit
def inverse_rms(squares, eps: tl.constexpr, H: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(squares, 1) / H + eps)


@triton.jit
def finish(
    product, up, tile, r, t, T, inverse, before, weight, bias, out, hidden, normed, sums_out, best, best_at,
    R: tl.constexpr, TILES: tl.constexpr, EPILOGUE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Do what follows a product [BR, TP].

    `r` are the rows of the whole matrix; `before` [BR, TP] the residual and `weight` [BR] the next norm's (ADDED only).
    """
    inside = (r < R)[:, None] & (t < T)[None, :]
    at = t[None, :] * R + r[:, None]
    if EPILOGUE == QKV:
        value = product * inverse[None, :]
        if BIAS:
            value += tl.load(bias + r, mask=r < R, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, value, mask=inside)
    elif EPILOGUE == GATED:
        gate = product * inverse[None, :]
        value = gate / (1.0 + tl.exp(-gate)) * (up * inverse[None, :])
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
    elif EPILOGUE == ADDED:
        value = tl.where(inside, before + product, 0.0)
        tl.store(hidden + at, value, mask=inside)
        tl.store(normed + at, (value * weight[:, None]).to(normed.dtype.element_ty), mask=inside)
        tl.store(sums_out + t * TILES + tile, tl.sum(value * value, 0), mask=t < T)
    else:
        value = product * inverse[None, :]
        tl.store(out + at, value, mask=inside)
        value = tl.where(value == value, value, float("inf"))  # NaN is found by `pick`
        value = tl.where(inside, value, float("-inf"))
        top = tl.max(value, 0)
        where = tl.min(tl.where((value == top[None, :]) & inside, r[:, None], NOWHERE), 0)
        tl.store(best + t * TILES + tile, top, mask=t < T)
        tl.store(best_at + t * TILES + tile, where, mask=t < T)


@triton.jit(do_not_specialize=["T", "PARTS"])
def one(
    w, x, sums, bias, out, hidden, norm, normed, sums_out, best, best_at, parts, count, T, PARTS,
    R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    H: tl.constexpr, PARTS_P: tl.constexpr, eps: tl.constexpr,
    EPILOGUE: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply a matrix [R, C] by one token [C] on the ordinary cores: a program per BR rows.

    Two tiles of weights are in flight per program, the first one since before the wait. Every tensor keeps the layout in
    which the weights are loaded, [BR, BC] with eight columns per thread: with a reshape or a third dimension Triton
    moved all weights through shared memory, at half the speed. What the end needs is loaded before the loop, because a
    load takes longest while the next kernel fills the memory's queues with its own weights.
    """
    if PDL:
        gdc_launch_dependents()
    WHOLE: tl.constexpr = (R % BR == 0) and (C % BC == 0)
    LAST: tl.constexpr = (C - 1) // BC * BC
    tile = tl.program_id(0)
    r = tl.arange(0, BR)
    c = tl.arange(0, BC)
    left = R - tile * BR
    base = w + tile.to(tl.int64) * (BR * C)
    base_up = base + tl.full((), R, tl.int64) * C
    now = _weights(base, r, c, left, C, C, WHOLE)
    total = tl.zeros((BR, BC), tl.float32)
    if EPILOGUE == GATED:
        now_up = _weights(base_up, r, c, left, C, C, WHOLE)
        total_up = tl.zeros((BR, BC), tl.float32)
    t = tl.arange(0, 1)
    rows = tile * BR + r
    weight = tl.zeros((BR,), tl.float32)
    if EPILOGUE == ADDED:
        weight = tl.load(norm + rows, mask=rows < R, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    at = x + c[None, :]
    before = tl.zeros((BR, 1), tl.float32)
    if EPILOGUE == ADDED:
        before = tl.load(hidden + rows[:, None] + t[None, :], mask=(rows < R)[:, None], other=0.0)
    else:
        squares = squares_of(sums, t, T, PARTS, PARTS_P)
    for k in range(0, LAST, BC):
        after = _weights(base + k + BC, r, c, left, C - k - BC, C, WHOLE)
        if EPILOGUE == GATED:
            after_up = _weights(base_up + k + BC, r, c, left, C - k - BC, C, WHOLE)
        xs = tl.load(at + k).to(tl.float32)
        total += now.to(tl.float32) * xs
        now = after
        if EPILOGUE == GATED:
            total_up += now_up.to(tl.float32) * xs
            now_up = after_up
    if WHOLE:
        xs = tl.load(at + LAST).to(tl.float32)
    else:
        xs = tl.load(at + LAST, mask=(c < C - LAST)[None, :], other=0.0).to(tl.float32)
    product = tl.sum(total + now.to(tl.float32) * xs, 1)[:, None]
    up = product
    if EPILOGUE == GATED:
        up = tl.sum(total_up + now_up.to(tl.float32) * xs, 1)[:, None]
    inverse = tl.full((1,), 1.0, tl.float32)
    if EPILOGUE != ADDED:
        inverse = inverse_rms(squares, eps, H)
    finish(
        product, up, tile, rows, t, T, inverse, before, weight,
        bias, out, hidden, normed, sums_out, best, best_at, R, (R + BR - 1) // BR, EPILOGUE, BIAS,
    )  # fmt: skip


@triton.jit
def end(
    product, up, tile, r, t, T, squares, bias, out, hidden, norm, normed, sums_out, best, best_at,
    H: tl.constexpr, eps: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, EPILOGUE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Finish a tile of `many`."""
    before = product
    weight = tl.zeros_like(r).to(tl.float32)
    inverse = tl.zeros_like(t).to(tl.float32)
    if EPILOGUE == ADDED:
        inside = (r < R)[:, None] & (t < T)[None, :]
        before = tl.load(hidden + t[None, :] * R + r[:, None], mask=inside, other=0.0)
        weight = tl.load(norm + r, mask=r < R, other=0.0).to(tl.float32)
    else:
        inverse = inverse_rms(squares, eps, H)
    finish(
        product, up, tile, r, t, T, inverse, before, weight,
        bias, out, hidden, normed, sums_out, best, best_at, R, TILES, EPILOGUE, BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "PARTS"])
def many(
    w, x, sums, bias, out, hidden, norm, normed, sums_out, best, best_at, parts, count, T, PARTS,
    TP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    SPLITS: tl.constexpr, AHEAD: tl.constexpr,
    H: tl.constexpr, PARTS_P: tl.constexpr, eps: tl.constexpr,
    EPILOGUE: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply a matrix [R, C] by T tokens [T, C] on the tensor cores: a program per BR rows and split of the columns.

    T is padded to TP >= 16. A result's bits depend neither on T nor on the other tokens, only on BR, BC and SPLITS.
    Before the wait the first AHEAD columns of the program's weights are asked for in L2.
    """
    if PDL:
        gdc_launch_dependents()
    SPAN: tl.constexpr = ((C + SPLITS - 1) // SPLITS + BC - 1) // BC * BC
    WHOLE: tl.constexpr = (R % BR == 0) and (SPAN * SPLITS == C)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    r = tl.arange(0, BR)
    c = tl.arange(0, BC)
    t = tl.arange(0, TP)
    left = R - tile * BR
    begin = split * SPAN
    base = w + tile.to(tl.int64) * (BR * C) + begin
    base_up = base + tl.full((), R, tl.int64) * C
    if PDL:
        if WHOLE and AHEAD > 0:
            lines = r[:, None] * C + tl.arange(0, AHEAD // LINE)[None, :] * LINE
            prefetch(base + lines)
            if EPILOGUE == GATED:
                prefetch(base_up + lines)
        gdc_wait()
    squares = tl.zeros((TP, 1), tl.float32)
    if EPILOGUE != ADDED:
        squares = squares_of(sums, t, T, PARTS, PARTS_P)
    product = tl.zeros((BR, TP), tl.float32)
    up = product
    at = x + t[None, :] * C + (begin + c)[:, None]
    for k in range(0, SPAN, BC):
        if WHOLE:
            xs = tl.load(at + k, mask=(t < T)[None, :], other=0.0)
        else:
            xs = tl.load(at + k, mask=(t < T)[None, :] & (begin + k + c < C)[:, None], other=0.0)
        tile_w = _weights(base + k, r, c, left, C - begin - k, C, WHOLE)
        product = dot(tile_w, xs, product)
        if EPILOGUE == GATED:
            tile_up = _weights(base_up + k, r, c, left, C - begin - k, C, WHOLE)
            up = dot(tile_up, xs, up)
    if SPLITS == 1:
        end(
            product, up, tile, tile * BR + r, t, T, squares, bias, out, hidden, norm, normed, sums_out, best, best_at,
            H, eps, R, (R + BR - 1) // BR, EPILOGUE, BIAS,
        )  # fmt: skip
    else:
        BOTH: tl.constexpr = 2 if EPILOGUE == GATED else 1
        inner = t[None, :] * BR + r[:, None]
        mine = parts + (tile * SPLITS + split) * (BOTH * BR * TP) + inner
        kept = (t < T)[None, :] & (r >= 0)[:, None]
        tl.store(mine, product, mask=kept)
        if EPILOGUE == GATED:
            tl.store(mine + BR * TP, up, mask=kept)
        tl.debug_barrier()  # the whole program's stores come before its arrival
        arrived = tl.atomic_add(count + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            first = parts + tile * (SPLITS * BOTH * BR * TP) + inner
            product = tl.zeros((BR, TP), tl.float32)
            up = product
            for s in tl.static_range(SPLITS):
                product += tl.load(first + s * (BOTH * BR * TP), mask=kept, other=0.0, cache_modifier=".cg")
                if EPILOGUE == GATED:
                    up += tl.load(first + s * (BOTH * BR * TP) + BR * TP, mask=kept, other=0.0, cache_modifier=".cg")
            end(
                product, up, tile, tile * BR + r, t, T, squares, bias, out, hidden, norm, normed, sums_out, best, best_at,
                H, eps, R, (R + BR - 1) // BR, EPILOGUE, BIAS,
            )  # fmt: skip
            tl.store(count + tile, 0)


@triton.jit
def pick(best, best_at, token, TILES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Write each row's most likely token, the lowest index among equals; NOWHERE if the largest logit is not finite.

    NaN counts as the largest (`finish` writes infinity in its place).
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), NOWHERE, tl.int32)
    for start in range(0, TILES, BLOCK):
        inside = start + i < TILES
        value = tl.load(best + t * TILES + start + i, mask=inside, other=float("-inf"))
        index = tl.load(best_at + t * TILES + start + i, mask=inside, other=NOWHERE)
        better = (value > top) | ((value == top) & (index < where))
        top = tl.where(better, value, top)
        where = tl.where(better, index, where)
    highest = tl.max(top, 0)
    found = tl.min(tl.where(top == highest, where, NOWHERE), 0)
    finite = (highest > float("-inf")) & (highest < float("inf"))
    tl.store(token + t, tl.where(finite, found, NOWHERE))
