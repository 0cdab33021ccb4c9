r"""Make the data of a test: blocks of every kind that llama.cpp quantises to, and the numbers that it reads from them.

Run it with the Python of the peers' environment, after `make peers`:

    .bench-venv/bin/python tests/actors/checkpoint/data/make_blocks.py \
        .bench-venv/llama/build/bin/libggml-base.so tests/actors/checkpoint/data/blocks.npz

The file has, for each kind, `KIND.blocks` uint8 [rows, bytes] and `KIND.numbers` float32 [rows, 256].
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

KINDS = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23,
    "IQ1_M": 29, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40,
}  # fmt: skip
"""Numbers of the kinds in ggml's ggml.h."""
ROWS, COLUMNS = 4, 256


class Traits(ctypes.Structure):
    """Describe a kind to Python (`ggml_type_traits` of ggml.h)."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64), ("size", ctypes.c_size_t),
        ("quantised", ctypes.c_bool), ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )  # fmt: skip


def main(library: str, target: str) -> None:
    ggml = ctypes.CDLL(library)
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    random, made = np.random.default_rng(0), {}
    weights = random.standard_normal((ROWS, COLUMNS), dtype=np.float32) * np.float32(0.08)
    importance = np.ones(COLUMNS, np.float32)
    for name, kind in KINDS.items():
        traits = ggml.ggml_get_type_traits(kind).contents
        blocks = np.zeros((ROWS, COLUMNS // traits.block * traits.size), np.uint8)
        numbers = np.zeros((ROWS, COLUMNS), np.float32)
        ggml.ggml_quantize_chunk(
            kind, weights.ctypes.data, blocks.ctypes.data, 0, ROWS, COLUMNS, importance.ctypes.data
        )
        traits.to_float(blocks.ctypes.data, numbers.ctypes.data, numbers.size)
        made |= {f"{name}.blocks": blocks, f"{name}.numbers": numbers}
    np.savez_compressed(target, **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
