"""Keep what a session reads inside the model, by position: a position that comes again replaces itself."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ranvier.actors.component.inside import PATTERN, READS, Read, within
from ranvier.transport.format.header import Row, TensorMeta
from ranvier.transport.format.message import Buffer

if TYPE_CHECKING:
    import torch

ABOUT = struct.Struct("3i")
"""The beginning of each piece: the index of the read, the first position, the count of positions."""
EVERYTHING = 1 << 62


class _Kept:
    """Hold the values of one read, in the order of its spans."""

    def __init__(self, read: Read, positions: int) -> None:
        self.read = read
        self.nbytes = 4 * read.width
        """Bytes of one position."""
        spans = list(within(read.spans, 0, positions))
        places, before = [], 0
        for start, end in spans:
            places.append((start, end, before))
            before += end - start
        self._spans = sorted(places)
        self._starts = [start for start, _, _ in self._spans]
        self._next = 0
        """The number of spans of which everything has come."""
        self.values = bytearray(self.nbytes * before)
        self.known = 0
        """The positions before this one have come, as far as they are read."""

    def place(self, position: int) -> int | None:
        """Return which of the positions that are read this is; None: it is not read."""
        index = bisect.bisect_right(self._starts, position) - 1
        if index < 0:
            return None
        start, end, before = self._spans[index]
        return before + position - start if position < end else None

    def put(self, first: int, count: int, data: memoryview) -> None:
        """Take the values of some positions in a row.

        Raises:
            ValueError: they are not read.
        """
        place, last = self.place(first), self.place(first + count - 1)
        if place is None or count < 1 or last != place + count - 1:
            raise ValueError(f"{self.read.place.name}: positions {first} to {first + count} are not read")
        self.values[place * self.nbytes : (place + count) * self.nbytes] = data
        self.known = max(self.known, first + count)  # a slower replica may send it again
        while self._next < len(self._spans) and self._spans[self._next][1] <= self.known:
            self._next += 1

    @property
    def missing(self) -> int:
        """Return the first position that is read and has not come."""
        return max(self.known, self._starts[self._next]) if self._next < len(self._spans) else EVERYTHING

    def tensor(self, positions: int) -> torch.Tensor:
        """Return the values at the first so many positions, float32 [positions that are read, …], in the order of the spans."""
        import torch

        values = torch.frombuffer(self.values, dtype=torch.float32) if self.values else torch.empty(0)
        values = values.view(-1, *self.read.shape)
        there = sorted((before, min(end, positions) - start) for start, end, before in self._spans if start < positions)
        made = torch.cat([values[:0], *(values[before : before + count] for before, count in there)])
        return made[..., :positions] if self.read.place.tensor == PATTERN else made


class Readings:
    """Hold the values of the reads of one session.

    Args:
        reads: what is read, in the order of `SessionInfo.reads`.
        positions: the largest number of positions of the session.
    """

    def __init__(self, reads: Sequence[Read], positions: int) -> None:
        self._kept = [_Kept(read, positions) for read in reads]

    def take(self, port: str, row: Row, meta: TensorMeta, buffer: Buffer) -> None:
        """Take one row that came to a port of the gateway.

        Raises:
            ValueError, ProtocolError: it does not fit.
        """
        if port == READS:
            self.take_pieces(row, buffer)
        else:
            self._take_edge(port, row, meta, buffer)

    def take_pieces(self, row: Row, buffer: Buffer) -> None:
        """Take the numbers of one row, as `Inside.around` has written them.

        Raises:
            ValueError: they do not fit.
        """
        data, at = memoryview(buffer).cast("B"), 0
        while at < len(data):
            if len(data) - at < ABOUT.size:
                raise ValueError(
                    f"session {row.session}: expected {ABOUT.size} bytes before the values, got {len(data) - at}"
                )
            index, first, count = ABOUT.unpack_from(data, at)
            at += ABOUT.size
            if not 0 <= index < len(self._kept):
                raise ValueError(f"session {row.session}: expected reads from 0 to {len(self._kept) - 1}, got {index}")
            kept = self._kept[index]
            size = kept.nbytes * max(0, count)
            if len(data) - at < size:
                raise ValueError(f"{kept.read.place.name}: expected {size} bytes, got {len(data) - at}")
            kept.put(first, count, data[at : at + size])
            at += size

    def _take_edge(self, name: str, row: Row, meta: TensorMeta, buffer: Buffer) -> None:
        """Take the values [tokens, …] of an edge that goes to the client."""
        from ranvier.transport.format.tensors import from_buffer

        for kept in self._kept:
            if kept.read.place.name == name:
                values = from_buffer(meta, buffer).float()
                for start, end in within(kept.read.spans, row.position, row.position + row.tokens):
                    some = values[start - row.position : end - row.position].contiguous()
                    kept.put(start, end - start, memoryview(some.numpy().tobytes()))

    def complete(self, positions: int) -> bool:
        """Return whether all that is read of the first so many positions has come."""
        return self.known >= positions

    @property
    def known(self) -> int:
        """Return the number of positions of which everything has come."""
        return min((kept.missing for kept in self._kept), default=EVERYTHING)

    def at(self, position: int) -> dict[str, bytes]:
        """Return the values of one position as float32 bytes, by place."""
        found = {}
        for kept in self._kept:
            place = kept.place(position)
            if place is not None:
                found[kept.read.place.name] = bytes(kept.values[place * kept.nbytes : (place + 1) * kept.nbytes])
        return found

    def tensors(self, positions: int) -> Mapping[str, torch.Tensor]:
        """Return the values of the first so many positions, float32 [positions that are read, …], by place."""
        return {kept.read.place.name: kept.tensor(positions) for kept in self._kept}
