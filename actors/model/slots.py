"""Define `Slot`: one tensor of an actor, assembled from one or more tensors of the checkpoint.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Need = tuple[str, tuple[int, ...]]
"""Name and shape of a tensor in the checkpoint."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Describe a tensor of an actor: its `parts` (name, rows) are stacked by rows; `columns` is None for a vector.

    If `transposed`, the checkpoint stores each part as [columns, rows] (gpt2's Conv1D).
    """

    name: str
    parts: tuple[tuple[str, int], ...]
    columns: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(rows for _, rows in self.parts)
        return (rows,) if self.columns is None else (rows, self.columns)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def needs(self) -> Iterator[Need]:
        for name, rows in self.parts:
            if self.columns is None:
                yield name, (rows,)
            else:
                yield name, (self.columns, rows) if self.transposed else (rows, self.columns)
