"""Keep the KV cache of one blocks actor: for each session, the keys and values of the actor's layers by position.

An entry is a function of (session, epoch, position). A session opens with an empty cache of its whole capacity. A
step may only write where the cache ends, and the length grows only after the step has passed every layer. So a step
cannot take effect twice, and a step that fails half-way leaves nothing behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from ..checkpoint.config import ModelConfig
from ..component.devices import CPU
from .kernels.packed import HELD
from .kernels.pages import fresh


class Reserved:
    """Hold what an actor keeps for a session of up to `capacity` positions; the first `length` are valid."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0

    def free(self) -> None:
        """Give back what the sessions of the actor share. Memory of this session alone is freed with the object."""


class SessionCache(Reserved):
    """Hold keys and values in one piece, [layers, kv heads, capacity, head width]."""

    def __init__(self, config: ModelConfig, layers: int, capacity: int, dtype: torch.dtype, device: str = CPU) -> None:
        super().__init__(capacity)
        shape = (2, layers, config.kv_heads, capacity, config.head_dim)
        size = math.prod(shape) * dtype.itemsize
        both = fresh(size) if device == CPU else torch.empty(size, dtype=torch.uint8, device=device)
        both = both.view(dtype).view(shape)
        self.keys_LKPD, self.values_LKPD = both

    def put(self, index: int, position: int, keys_tKD: torch.Tensor, values_tKD: torch.Tensor) -> None:
        """Write the keys and values of one layer, from `position` on."""
        end = position + keys_tKD.shape[0]
        self.keys_LKPD[index, :, position:end] = keys_tKD.transpose(0, 1)
        self.values_LKPD[index, :, position:end] = values_tKD.transpose(0, 1)

    def seen(self, index: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of one layer for the positions from `start` to before `end`, each [K, P, D]."""
        return self.keys_LKPD[index, :, start:end], self.values_LKPD[index, :, start:end]


class BlockCache(Reserved):
    """Hold a session's keys and values for the kernels, bfloat16 in blocks of HELD positions (`Row` of attend.c).

    Blocks after the first are in large pages: each token reads all of them. The first one is not, because of the many
    sessions that stay short.
    """

    def __init__(self, config: ModelConfig, layers: int, capacity: int) -> None:
        super().__init__(capacity)
        block_bytes = layers * config.kv_heads * 2 * HELD * config.head_dim * 2
        self.blocks = fresh(-(-capacity // HELD) * block_bytes, large_from=block_bytes)
        self.address = self.blocks.data_ptr()


C = TypeVar("C", bound=Reserved)


class KVCache(Generic[C]):
    """Hold the caches of an actor's sessions, at most `tokens` positions in all; `make` builds one by capacity."""

    def __init__(self, tokens: int, make: Callable[[int], C]) -> None:
        self._make = make
        self.tokens = tokens
        self.reserved = 0
        self.sessions: dict[int, C] = {}

    def open(self, session: int, capacity: int, make: Callable[[int], C] | None = None) -> None:
        """Reserve `capacity` positions for a session; one that is already open starts again, empty.

        `make` builds its cache, instead of the function that builds the others.

        Raises:
            MemoryError: the positions do not fit beside the other sessions (the gateway should have refused the session).
        """
        self.close(session)
        if self.reserved + capacity > self.tokens:
            raise MemoryError(
                f"KV cache: session {session} needs {capacity} tokens, {self.tokens - self.reserved} of {self.tokens} are free"
            )
        self.sessions[session] = (make or self._make)(capacity)
        self.reserved += capacity

    def close(self, session: int) -> None:
        cache = self.sessions.pop(session, None)
        if cache is not None:
            self.reserved -= cache.capacity
            cache.free()

    def rewind(self, session: int, length: int) -> None:
        """Keep only the first `length` positions of a session.

        Raises:
            ValueError: the cache has fewer positions.
        """
        cache = self.sessions[session]
        if length > cache.length:
            raise ValueError(f"session {session}: expected at least {length} cached positions, got {cache.length}")
        cache.length = length

    def at(self, session: int, position: int, tokens: int) -> C:
        """Return the cache for a step that writes `tokens` entries from `position` on.

        Raises:
            ValueError: the step does not begin where the cache ends, or exceeds the session's capacity.
        """
        cache = self.sessions[session]
        if position != cache.length:
            raise ValueError(f"session {session}: expected position {cache.length}, got {position}")
        if position + tokens > cache.capacity:
            raise ValueError(f"session {session}: position {position + tokens} is over its capacity {cache.capacity}")
        return cache
