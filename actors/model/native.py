"""Where the compiled kernels are, and whether this processor runs them. No torch here: the check of a graph asks, too."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any


@functools.cache
def library() -> Any:
    """The functions of kernels.c; None where they were not compiled, or the processor lacks AVX-512 with BF16 and VNNI."""
    spec = importlib.util.find_spec("ranvier.actors.model._kernels")
    if spec is None or spec.origin is None:
        return None
    loaded = ctypes.CDLL(spec.origin)
    if not loaded.ranvier_supported():
        return None
    loaded.ranvier_room.restype = ctypes.c_int64
    return loaded
