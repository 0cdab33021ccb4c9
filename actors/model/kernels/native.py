"""Find the compiled kernels that this processor can run.

This module does not import torch, because the check of a graph uses it, too.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from ranvier.transport.system import LINUX


@functools.cache
def library() -> Any:
    """Return the functions of the kernels for the best instruction set; None if they cannot be used."""
    return next(iter(libraries().values()), None)


PREFILL_CHUNK = 128
"""Prompt tokens that are computed together, unless the kernels use AMX."""


def prefill_chunk() -> int:
    """Return how many prompt tokens are computed together fastest (benchmarks/long_prompt.py).

    Of 64, 128, 192, 256 and 384 tokens, 192 were the fastest in two stages with AMX, by a tenth over 128. More tokens use the
    tiles better, but the second stage begins later.
    """
    return 192 if next(iter(libraries()), None) == "amx" else PREFILL_CHUNK


def repeatable_is_cheap() -> bool:
    """Return whether repeatable products cost this processor at most 5 % (benchmarks/products.py).

    With AMX, the kernels take two fifths longer for prompts. Without it, there is only one way to multiply.
    """
    return next(iter(libraries()), None) != "amx"


@functools.cache
def libraries() -> dict[str, Any]:
    """Return the functions of the kernels for each instruction set that this processor has, the best set first."""
    found = find(__package__, "product")
    for loaded in found.values():
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    return found


_int, _long, _at = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "ranvier_room": (_long, (_at, _int, _long)),
    "ranvier_step": (_int, (_at, _at, _int, _at, _at, _int, _long, _at)),
    "ranvier_product_room": (_long, (_int, _int)),
    "ranvier_multiply": (None, (_at, _at, _int, _at, _at)),
    "ranvier_rows": (None, (_at, _at, _int, _int, _at)),
    "ranvier_head_room": (_long, (_int, _int)),
    "ranvier_head": (None, (_at, _at, _at, _int, ctypes.c_float, _at, _int, _int, _at, _at)),
    "ranvier_largest": (_long, (_at, _long)),
    "ranvier_largest_of_rows": (None, (_at, _int, _long, _at)),
    "ranvier_largest_allowed": (_long, (_at, _long, _at)),
    "ranvier_finite": (_int, (_at, _long, _int, ctypes.c_uint32)),
}
"""Result and arguments of the functions that are called in every step: so ctypes takes plain numbers, and is faster."""


def find(package: str, name: str) -> dict[str, Any]:
    """Return the compiled `<name>_<set>.c` of a package, for each instruction set that this processor has.

    The best set comes first. The result is empty if nothing was compiled, and where there is no Linux.
    """
    ranked: list[tuple[int, str, Any]] = []
    spec = importlib.util.find_spec(package) if LINUX else None
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob(f"_{name}_*{EXTENSION_SUFFIXES[0]}"):
            loaded = ctypes.CDLL(str(path))
            if rank := loaded.ranvier_supported():
                ranked.append((rank, path.name.removeprefix(f"_{name}_").split(".")[0], loaded))
    return {chosen: loaded for _, chosen, loaded in sorted(ranked, key=lambda each: -each[0])}
