"""Keep the keys and values of an actor's sessions on a GPU, in pages that the kernels find through a table per session.

Shape suffixes: t tokens of one row, K key-value heads, P positions, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kv_cache import Reserved
from .shapes import Pages, Shape

PAGE = 64
"""Positions per page."""
FIRST_POSITIONS = 8192
"""Positions for which memory is taken at once; more is taken when sessions need it."""


class PagePool:
    """Hold the pages of all sessions, and know which are free.

    Args:
        shape: the sizes of the layers.
        tokens: the number of positions of all sessions together.
        dtype: of keys and values.
        device: where they are.
        moves: called before the pages move to other memory, where there are more of them.
    """

    def __init__(
        self, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, moves: Callable[[], None]
    ) -> None:
        self._moves = moves
        self._most = -(-tokens // PAGE)
        self.pages = Pages.empty(shape, -(-min(tokens, FIRST_POSITIONS) // PAGE), PAGE, dtype, device)
        self._free = list(range(self.pages.count))

    def take(self, positions: int) -> list[int]:
        """Return free pages for so many positions.

        If too few are free, there are twice as many pages afterwards, up to `tokens` positions. Each session's last page may
        be partly empty, so many short sessions can need more pages than that, and get them.
        """
        count = -(-positions // PAGE)
        if count > len(self._free):
            before = self.pages.count
            self._grow(max(count, min(before, self._most - before), before // 8))
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _grow(self, more: int) -> None:
        self._moves()
        before = self.pages.count
        for held in (self.pages.keys, self.pages.values):
            for index, layer in enumerate(held):  # one after the other, so that little memory is taken twice
                held[index] = torch.cat((layer, layer.new_empty(more, *layer.shape[1:])))
        self._free.extend(range(before, before + more))

    def give_back(self, pages: list[int]) -> None:
        """Let other sessions have these pages."""
        self._free.extend(pages)


class PagedCache(Reserved):
    """Hold one session's pages."""

    def __init__(self, pool: PagePool, capacity: int, device: torch.device) -> None:
        super().__init__(capacity)
        self._pool = pool
        self.pages = pool.take(capacity)
        try:
            self._table = torch.tensor(self.pages, device=device)
        except BaseException:
            self.free()
            raise
        self._places: tuple[tuple[int, int], torch.Tensor, torch.Tensor] | None = None

    def free(self) -> None:
        self._pool.give_back(self.pages)

    def put(self, index: int, position: int, keys_tKD: torch.Tensor, values_tKD: torch.Tensor) -> None:
        """Write the keys and values of one layer, from `position` on."""
        asked = (position, keys_tKD.shape[0])
        if self._places is None or self._places[0] != asked:  # the same for all layers of a step
            at_t = torch.arange(position, position + asked[1], device=self._table.device)
            self._places = asked, self._table[at_t // PAGE], at_t % PAGE
        _, pages, slots = self._places
        self._pool.pages.keys[index][pages, :, slots] = keys_tKD
        self._pool.pages.values[index][pages, :, slots] = values_tKD

    def seen(self, index: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of one layer for the positions from `start` to before `end`, each [K, P, D]."""
        first = start // PAGE
        pages = self._table[first : -(-end // PAGE)]

        def gathered(held: torch.Tensor) -> torch.Tensor:
            together_KPD = held[pages].transpose(0, 1).flatten(1, 2)
            return together_KPD[:, start - first * PAGE : end - first * PAGE]

        return gathered(self._pool.pages.keys[index]), gathered(self._pool.pages.values[index])
