"""Where the compiled kernels are, and whether this processor runs them. No torch here: the check of a graph asks, too."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any


@functools.cache
def library() -> Any:
    """The functions of kernels.c, as compiled for the widest vectors that this processor has (AVX-512 with BF16 and VNNI, or
    AVX2); None where it has neither, or they were not compiled."""
    for name in ("_kernels_avx512", "_kernels_avx2"):
        spec = importlib.util.find_spec(f"ranvier.actors.model.{name}")
        if spec is None or spec.origin is None:
            continue
        loaded = ctypes.CDLL(spec.origin)
        if loaded.ranvier_supported():
            loaded.ranvier_room.restype = ctypes.c_int64
            return loaded
    return None
