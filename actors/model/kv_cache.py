"""The KV cache of one blocks actor: for each session, keys and values of its own layers by position.

An entry is a function of (session, epoch, position): a session opens with an empty cache of its whole capacity, a step
may only write where the cache ends, and its length grows once the step has gone through every layer. So a step cannot
take effect twice, and one that failed half-way leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from ..checkpoint.config import ModelConfig
from .kernels import TILE


class SessionCache:
    """One session: `keys` and `values` are [layers, kv heads, capacity, head width]; the first `length` are valid."""

    def __init__(self, config: ModelConfig, layers: int, capacity: int, dtype: torch.dtype) -> None:
        # whole tiles of positions, which is how the kernels keep keys
        shape = (layers, config.kv_heads, -(-capacity // TILE) * TILE, config.head_dim)
        # pages are taken from the system when first written, so capacity that is never reached costs nothing
        self.keys_LKPD = torch.empty(shape, dtype=dtype)
        self.values_LKPD = torch.empty(shape, dtype=dtype)
        self.capacity = capacity
        self.length = 0


class Bounded(Protocol):
    """What a cache of one session has in any case."""

    capacity: int
    length: int


C = TypeVar("C", bound=Bounded)


class KVCache(Generic[C]):
    """All sessions of one actor, at most `tokens` positions together. `make` gives the cache of one, by its capacity."""

    def __init__(self, tokens: int, make: Callable[[int], C]) -> None:
        self._make = make
        self.tokens = tokens
        self.reserved = 0
        self.sessions: dict[int, C] = {}

    def open(self, session: int, capacity: int) -> None:
        """Reserve `capacity` positions. A session that is open starts anew.

        Raises:
            MemoryError: they do not fit beside the other sessions (the gateway should have turned it away).
        """
        self.close(session)
        if self.reserved + capacity > self.tokens:
            raise MemoryError(
                f"KV cache: session {session} needs {capacity} tokens, {self.tokens - self.reserved} of {self.tokens} are free"
            )
        self.sessions[session] = self._make(capacity)
        self.reserved += capacity

    def close(self, session: int) -> None:
        cache = self.sessions.pop(session, None)
        if cache is not None:
            self.reserved -= cache.capacity

    def rewind(self, session: int, length: int) -> None:
        """Forget what is behind the first `length` positions.

        Raises:
            ValueError: there are not so many.
        """
        cache = self.sessions[session]
        if length > cache.length:
            raise ValueError(f"session {session}: expected {length} positions in its cache, there are {cache.length}")
        cache.length = length

    def at(self, session: int, position: int, tokens: int) -> C:
        """The cache for a step that writes `tokens` entries from `position` on.

        Raises:
            ValueError: the step is not the one that comes next, or goes over the session's capacity.
        """
        cache = self.sessions[session]
        if position != cache.length:
            raise ValueError(f"session {session}: expected position {cache.length}, got {position}")
        if position + tokens > cache.capacity:
            raise ValueError(f"session {session}: position {position + tokens} is over its capacity {cache.capacity}")
        return cache
