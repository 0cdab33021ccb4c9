"""A `Slot` is one tensor as an actor holds it, put together of one or more tensors of the checkpoint. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Need = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of an actor: `parts` (name, rows) lie one below the other; `columns` is None for a vector.

    `transposed`: the checkpoint keeps it as [columns, rows] (gpt2's Conv1D).
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
