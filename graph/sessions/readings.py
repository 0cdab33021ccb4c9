"""Keep what a session reads inside the model, by position: a position that comes again replaces itself."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ranvier.actors.component.inside import PATTERN, Read, within
from ranvier.transport.format.header import Row, TensorMeta
from ranvier.transport.format.message import Buffer

if TYPE_CHECKING:
    import torch

ABOUT = 3
"""Whole numbers at the beginning of each piece: the index of the read, the first position, the count of positions."""


class Readings:
    """Hold the values of the reads of one session.

    Args:
        reads: what is read, in the order of `SessionInfo.reads`.
        positions: the largest number of positions of the session.
    """

    def __init__(self, reads: Sequence[Read], positions: int) -> None:
        self.reads = reads
        self._parts = [list(within(read.spans, 0, positions)) for read in reads]
        self._values = [bytearray(4 * read.width * read.count(positions)) for read in reads]
        self._known = [0] * len(reads)
        """The positions before these have come, as far as they are read."""

    def take(self, row: Row, buffer: Buffer) -> None:
        """Take the numbers of one row, as `Inside.around` has written them.

        Raises:
            ValueError: they do not fit.
        """
        data, at = memoryview(buffer).cast("B"), 0
        while at < len(data):
            about = data[at : at + 4 * ABOUT].cast("i")
            if len(about) < ABOUT or not 0 <= about[0] < len(self.reads):
                raise ValueError(f"expected reads from 0 to {len(self.reads) - 1}, got {list(about)}")
            index, first, count = about
            at += 4 * ABOUT
            size = 4 * count * self.reads[index].width
            place = self._place(index, first)
            if place is None or count < 1 or len(data) < at + size or place + size > len(self._values[index]):
                raise ValueError(f"{self.reads[index].place.name}: positions {first} to {first + count} are not read")
            self._values[index][place : place + size] = data[at : at + size]
            self._known[index] = max(self._known[index], first + count)  # a slower replica may send it again
            at += size

    def take_edge(self, name: str, row: Row, meta: TensorMeta, buffer: Buffer) -> None:
        """Take the rows [tokens, …] of an edge that goes to the client.

        Raises:
            ValueError: they do not fit.
        """
        from ranvier.transport.format.tensors import from_buffer

        for index, read in enumerate(self.reads):
            if read.place.name == name:
                values = from_buffer(meta, buffer).float()
                for start, end in within(read.spans, row.position, row.position + row.tokens):
                    some = values[start - row.position : end - row.position].contiguous()
                    about = array("i", (index, start, end - start)).tobytes()
                    self.take(row, about + some.numpy().tobytes())

    def _place(self, index: int, position: int) -> int | None:
        """Return where the values of a position begin, in bytes; None if it is not read."""
        before = 0
        for start, end in self._parts[index]:
            if start <= position < end:
                return 4 * self.reads[index].width * (before + position - start)
            before += end - start
        return None

    def complete(self, positions: int) -> bool:
        """Return whether all that is read of the first so many positions has come."""
        return all(
            min(end, positions) <= known
            for parts, known in zip(self._parts, self._known, strict=True)
            for start, end in parts
            if start < positions
        )

    @property
    def known(self) -> int:
        """Return the number of positions of which everything has come."""
        return min(map(self._first_missing, range(len(self.reads))), default=1 << 62)

    def _first_missing(self, index: int) -> int:
        known = self._known[index]
        return next((max(start, known) for start, end in self._parts[index] if end > known), 1 << 62)

    def at(self, position: int) -> dict[str, bytes]:
        """Return the values of one position as float32 bytes, by place."""
        found = {}
        for index, read in enumerate(self.reads):
            place = self._place(index, position)
            if place is not None:
                found[read.place.name] = bytes(self._values[index][place : place + 4 * self.reads[index].width])
        return found

    def tensors(self, positions: int) -> Mapping[str, torch.Tensor]:
        """Return the values of the first so many positions, float32 [positions that are read, …], by place."""
        import torch

        made = {}
        for index, read in enumerate(self.reads):
            values = (
                torch.frombuffer(self._values[index], dtype=torch.float32) if self._values[index] else torch.empty(0)
            )
            values = values.view(-1, *read.shape)[: read.count(positions)]
            if read.place.tensor == PATTERN:
                values = values[..., :positions]
            made[read.place.name] = values.clone()
        return made
