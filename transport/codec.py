"""How a tensor's bytes are written on an edge. A codec travels as its number in this table, which grows at its end."""

from __future__ import annotations

CODECS: tuple[str, ...] = ("raw",)
"""`raw`: the tensor's own bytes, row-major, in the machine's byte order (little-endian is checked at import)."""

RAW = 0
