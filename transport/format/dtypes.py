"""Define the fixed table of element types that may cross a process border.

A dtype travels as its number in this table, never as a name that is looked up. So no byte from a socket can reach a type that
is not listed here. The table only grows at its end: the numbers are part of the wire version (`header.VERSION`).
"""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """Describe one row of the table: the `number` on the wire, torch's `name`, and the `itemsize` in bytes per element."""

    number: int
    name: str
    itemsize: int

    @property
    def floats(self) -> bool:
        """Return whether the elements are floating-point numbers."""
        return "float" in self.name


TABLE: tuple[DType, ...] = (
    DType(0, "bool", 1),
    DType(1, "uint8", 1),
    DType(2, "int8", 1),
    DType(3, "int16", 2),
    DType(4, "int32", 4),
    DType(5, "int64", 8),
    DType(6, "float16", 2),
    DType(7, "bfloat16", 2),
    DType(8, "float32", 4),
    DType(9, "float64", 8),
)

BY_NAME: dict[str, DType] = {row.name: row for row in TABLE}
