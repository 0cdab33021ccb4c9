"""Attend from one new token per session to its pages on a GPU: norms, rotary positions, cache write, split-KV attention.

The rules of products.py hold here, too: what may be read before the wait, and sums in a fixed order.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import LINE, dot, prefetch


@triton.jit
def _turned(x, norm, cos, sin, d, eps: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr, ROWS: tl.constexpr, live):
    """Load a head [D] or heads [ROWS, D] at `x`, normalise, and rotate by `cos` and `sin` [D], -sin in the first half."""
    pair = (d + D // 2) % D
    if ROWS == 0:
        one = tl.load(x + d)
        other = tl.load(x + pair)
        if NORMED:
            inverse = 1.0 / tl.sqrt(tl.sum(one * one, 0) / D + eps)
            one = one * inverse * tl.load(norm + d).to(tl.float32)
            other = other * inverse * tl.load(norm + pair).to(tl.float32)
        result = one * cos + other * sin
    else:
        g = tl.arange(0, ROWS)
        one = tl.load(x + g[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
        other = tl.load(x + g[:, None] * D + pair[None, :], mask=live[:, None], other=0.0)
        if NORMED:
            inverse = (1.0 / tl.sqrt(tl.sum(one * one, 1) / D + eps))[:, None]
            one = one * inverse * tl.load(norm + d).to(tl.float32)[None, :]
            other = other * inverse * tl.load(norm + pair).to(tl.float32)[None, :]
        result = one * cos[None, :] + other * sin[None, :]
    return result


@triton.jit
def _absorb(top, total, summed, query, key, value, seen, GP: tl.constexpr, BLOCK: tl.constexpr):
    """Add the positions `seen` to a running softmax in base 2."""
    score = dot(query, tl.trans(key), tl.zeros((GP, BLOCK), tl.float32))
    score = tl.where(seen[None, :], score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    share = tl.exp2(score - safe[:, None])
    old = tl.exp2(top - safe)
    total = total * old + tl.sum(share, 1)
    summed = dot(share.to(value.dtype), value, summed * old[:, None])
    return higher, total, summed


@triton.jit
def _places(table, at, p, newest, K: tl.constexpr, k, PAGE: tl.constexpr, D: tl.constexpr):
    """Return where the positions `at + p` of head k begin in the pages, for those before `newest`."""
    position = at + p
    page = tl.load(table + position // PAGE, mask=position < newest, other=0).to(tl.int64)
    return (page * K + k) * (PAGE * D) + position % PAGE * D


@triton.jit(do_not_specialize=["WIDTH", "CHUNK", "SPLITS"])
def attend(
    qkv, keys, values, tables, lengths, turns, norm_q, norm_k, out, part_ml, part_sum, count,
    WIDTH, CHUNK, SPLITS,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GM: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr, JOIN: tl.constexpr,
    WINDOW: tl.constexpr, scale: tl.constexpr, eps: tl.constexpr, NORMED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Attend from the newest token of each session to its pages: a program per session, key-value head and chunk.

    qkv [T, (K·G + 2·K)·D] float32 as the product left it; keys, values [pages, K, PAGE, D]; tables [T, WIDTH] pages;
    lengths [T], the new token included, 0 for a row without a session; turns [positions, 2, D / 2] float32;
    out [T, K·G·D]. The program with the newest position writes the new key and value, and uses them from registers.
    Chunks of CHUNK positions that hold no visible position do nothing. The last of the others merges their parts:
    part_ml [T·K·SPLITS, 2, G] holds the maximum and the sum of the exponentials (base 2), part_sum [.., G, D] the values.

    A chunk is read in steps of BLOCK positions; SINGLE says that it is one step, whose keys and values are then loaded
    before the wait. (More programs, which fetched the next matrices into L2 meanwhile, made a step slower by 1 to 3 %:
    the kernels that wait already fill the memory's queues.)
    """
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(0)
    k = tl.program_id(1)
    s = tl.program_id(2)
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    p = tl.arange(0, BLOCK)
    live = g < G
    length = tl.load(lengths + b)
    newest = length - 1
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - WINDOW, 0)
    first = lowest // CHUNK
    last = newest // CHUNK  # of no meaning where the length is 0, which `active` excludes
    active = (length > 0) & (s >= first) & (s <= last)
    if active:
        table = tables + b * WIDTH
        start = tl.maximum(s * CHUNK, lowest // BLOCK * BLOCK)
        end = tl.minimum(s * CHUNK + CHUNK, newest)
        seen = (start + p < end) & (start + p >= lowest)
        turn = turns + newest.to(tl.int64) * D + d % (D // 2)
        cos = tl.load(turn)
        sin = tl.load(turn + D // 2)
        sin = tl.where(d < D // 2, -sin, sin)
        if SINGLE:
            places = _places(table, start, p, newest, K, k, PAGE, D)[:, None] + d[None, :]
            key = tl.load(keys + places, mask=seen[:, None], other=0.0)
            value = tl.load(values + places, mask=seen[:, None], other=0.0)
        if PDL:
            if not SINGLE:
                places = _places(table, start, p, newest, K, k, PAGE, D)
                lines = places[:, None] + tl.arange(0, (D + LINE - 1) // LINE)[None, :] * LINE
                prefetch(keys + lines)
                prefetch(values + lines)
            gdc_wait()
        row = qkv + b * ((K * G + 2 * K) * D)
        query = _turned(row + k * (G * D), norm_q, cos, sin, d, eps, D, NORMED, GP, live)
        query = (query * (scale * 1.4426950408889634)).to(keys.dtype.element_ty)
        new_key = _turned(row + (K * G + k) * D, norm_k, cos, sin, d, eps, D, NORMED, 0, live).to(keys.dtype.element_ty)
        new_value = tl.load(row + (K * G + K + k) * D + d).to(values.dtype.element_ty)
        top = tl.full((GP,), float("-inf"), tl.float32)
        total = tl.zeros((GP,), tl.float32)
        summed = tl.zeros((GP, D), tl.float32)
        if SINGLE:
            top, total, summed = _absorb(top, total, summed, query, key, value, seen, GP, BLOCK)
        else:
            for at in range(start, end, BLOCK):
                visible = (at + p < end) & (at + p >= lowest)
                where = _places(table, at, p, newest, K, k, PAGE, D)[:, None] + d[None, :]
                held_key = tl.load(keys + where, mask=visible[:, None], other=0.0)
                held_value = tl.load(values + where, mask=visible[:, None], other=0.0)
                top, total, summed = _absorb(top, total, summed, query, held_key, held_value, visible, GP, BLOCK)
        # the newest position comes from registers: it is not in its page yet
        score_new = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1)
        score_new = tl.where(s == last, score_new, float("-inf"))
        higher = tl.maximum(top, score_new)
        share_new = tl.exp2(score_new - higher)
        old = tl.exp2(top - higher)
        total = total * old + share_new
        summed = summed * old[:, None] + share_new[:, None] * new_value.to(tl.float32)[None, :]
        q_head = (b * K + k) * G
        if first == last:
            done = (summed / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + (q_head + g)[:, None] * D + d[None, :], done, mask=live[:, None])
        else:
            entry = (b * K + k) * SPLITS + s
            tl.store(part_ml + entry * (2 * G) + g, higher, mask=live)
            tl.store(part_ml + entry * (2 * G) + G + g, total, mask=live)
            tl.store(part_sum + (entry * G + g)[:, None] * D + d[None, :], summed, mask=live[:, None])
            tl.debug_barrier()  # the whole program's stores come before its arrival
            arrived = tl.atomic_add(count + b * K + k, 1, sem="acq_rel")
            if arrived == last - first:
                _merge(part_ml, part_sum, out, (b * K + k) * SPLITS, first, last, q_head, G, GM, D, JOIN)
                tl.store(count + b * K + k, 0)
        if s == last:
            page = tl.load(table + newest // PAGE).to(tl.int64)
            slot = (page * K + k) * (PAGE * D) + (newest % PAGE) * D
            tl.store(keys + slot + d, new_key)
            tl.store(values + slot + d, new_value)
    else:
        if PDL:
            gdc_wait()


@triton.jit
def _merge(
    part_ml, part_sum, out, entry, first, last, q_head,
    G: tl.constexpr, GM: tl.constexpr, D: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Merge the parts `first` to `last` of one session's key-value head, JOIN of them at a time, in their order."""
    g = tl.arange(0, GM)
    d = tl.arange(0, D)
    j = tl.arange(0, JOIN)
    top = tl.full((GM,), float("-inf"), tl.float32)
    total = tl.zeros((GM,), tl.float32)
    summed = tl.zeros((GM, D), tl.float32)
    for s in range(first, last + 1, JOIN):
        inside = ((s + j) <= last)[:, None] & (g < G)[None, :]
        at = part_ml + (entry + s + j)[:, None] * (2 * G) + g[None, :]
        tops = tl.load(at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(at + G, mask=inside, other=0.0, cache_modifier=".cg")
        where = ((entry + s + j)[:, None] * G + g[None, :])[:, :, None] * D + d[None, None, :]
        sums = tl.load(part_sum + where, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(tops, 0))
        higher = tl.where(g < G, higher, 0.0)
        share = tl.exp2(tops - higher[None, :])
        old = tl.exp2(top - higher)
        total = total * old + tl.sum(totals * share, 0)
        summed = summed * old[:, None] + tl.sum(sums * share[:, :, None], 0)
        top = higher
    done = (summed / tl.where(g < G, total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + (q_head + g)[:, None] * D + d[None, :], done, mask=(g < G)[:, None])
