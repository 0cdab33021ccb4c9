"""Take memory from the system, in large pages where that is faster.

The memory is empty until it is written, and goes back to the system when the last tensor that shows it is gone. What malloc
gives may stay with the process instead.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

from ranvier.transport.system import LINUX

LARGE = 2 << 20
"""Bytes of a large page, on x86 and on most ARM systems."""


def fresh(nbytes: int, large_from: int | None = None) -> torch.Tensor:
    """Return uint8 [nbytes], with large pages from byte `large_from` on (None: nowhere), if the system has them.

    What reads much memory with small pages takes many address translations, each of which goes through two page tables in a
    virtual machine. But a large page takes 2 MiB as soon as one of its bytes is written.
    """
    large = LINUX and large_from is not None and nbytes - large_from >= LARGE
    memory = mmap.mmap(-1, max(1, nbytes) + (LARGE if large else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE if large else 0
    if large_from is not None and large:
        first = start + -(-large_from // LARGE) * LARGE
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE, first, start + nbytes - first)
    return whole[start : start + nbytes]
