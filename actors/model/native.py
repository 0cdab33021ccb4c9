"""Find the compiled kernels that this processor can run.

This module does not import torch, because the check of a graph uses it, too.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any


@functools.cache
def library() -> Any:
    """Return the functions of kernels.c; None if they cannot be used."""
    loaded = find("ranvier.actors.model", "_kernels")
    if loaded is not None:
        loaded.ranvier_room.restype = ctypes.c_int64
    return loaded


def find(package: str, name: str) -> Any:
    """Return the library `name`, compiled for the widest vectors that this processor has (AVX-512 or AVX2).

    Return None if the processor has neither, or if nothing was compiled.
    """
    for vectors in ("avx512", "avx2"):
        spec = importlib.util.find_spec(f"{package}.{name}_{vectors}")
        if spec is None or spec.origin is None:
            continue
        loaded = ctypes.CDLL(spec.origin)
        if loaded.ranvier_supported():
            return loaded
    return None
