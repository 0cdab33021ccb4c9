"""Define what the kernels of products.py and attention.py share."""

import triton
import triton.language as tl

LINE = tl.constexpr(64)
"""Elements of two bytes per cache line."""
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The interpreter multiplies the bits of bfloat16 as integers in `tl.dot` (Triton 3.6 and 3.9): give it float32."""


@triton.jit
def dot(a, b, total):
    """Add the product of two tiles to `total`, in float32."""
    if INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines of `pointers` in L2; waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
