"""Change tensors inside an actor for the sessions that ask for it, and collect what they read.

Shape suffixes: T tokens of the batch, t tokens of one row, W width of a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from ranvier.transport.format.header import Row

from ..component.actor import Batch, RowsFailed
from ..component.devices import here
from ..component.inside import HIDDEN, IN_LAYER, PATTERN, READS, Edit, Place, Read, within
from ..component.session import SessionInfo

Outputs = Mapping[str, torch.Tensor | Batch]


class Inside:
    """Hold what the open sessions read and change at the places of one actor.

    Args:
        places: the places that the actor offers.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        self._places = frozenset(places)
        self._edits: dict[int, dict[Place, list[_Change]]] = {}
        self._reads: dict[int, dict[Place, list[tuple[int, Read]]]] = {}
        self._made: dict[Row, list[torch.Tensor]] = {}
        self._deep: set[int] = set()
        self.sessions: set[int] = set()
        """The sessions that read or change something here."""

    def open(self, info: SessionInfo) -> None:
        """Take note of what a session reads and changes."""
        self.close(info.session)
        edits: dict[Place, list[_Change]] = {}
        reads: dict[Place, list[tuple[int, Read]]] = {}
        for edit in info.edits:
            if edit.place in self._places:
                edits.setdefault(edit.place, []).append(_Change.of(edit))
        for index, read in enumerate(info.reads):
            if read.place in self._places:
                reads.setdefault(read.place, []).append((index, read))
        if edits or reads:
            self.sessions.add(info.session)
            self._edits[info.session], self._reads[info.session] = edits, reads
            if any(place.tensor in IN_LAYER for place in (*edits, *reads)):
                self._deep.add(info.session)

    def close(self, session: int) -> None:
        """Forget a session."""
        self.sessions.discard(session)
        self._deep.discard(session)
        self._edits.pop(session, None)
        self._reads.pop(session, None)

    def wants(self, rows: Iterable[Row]) -> bool:
        """Return whether one of these rows reads or changes something here."""
        return bool(self.sessions) and any(row.session in self.sessions for row in rows)

    def deep(self, session: int) -> bool:
        """Return whether a session reads or changes something inside a layer."""
        return session in self._deep

    def at(self, place: Place, row: Row) -> bool:
        """Return whether a row reads or changes something at a place."""
        session = row.session
        return session in self.sessions and (place in self._edits[session] or place in self._reads[session])

    def layers(self, rows: Iterable[Row]) -> set[int]:
        """Return the layers whose input, or that of the layer after the last, is read or changed in these rows."""
        return {
            place.layer
            for row in rows
            if row.session in self.sessions
            for place in (*self._edits[row.session], *self._reads[row.session])
            if place.tensor == HIDDEN and place.layer is not None
        }

    def read_here(self, place: Place, row: Row) -> list[tuple[int, int]]:
        """Return the first and the end position of each part of a row that is read at a place."""
        if row.session not in self.sessions:
            return []
        reads = self._reads[row.session].get(place, ())
        return [part for _, read in reads for part in within(read.spans, row.position, row.position + row.tokens)]

    def touch(self, place: Place, rows: Sequence[Row], tensor_TW: torch.Tensor) -> torch.Tensor:
        """Change a tensor in place, then keep what is read of it. Return the tensor."""
        if not self.sessions:
            return tensor_TW
        end = 0
        for row in rows:
            start, end = end, end + row.tokens
            if row.session not in self.sessions:
                continue
            part_tW = tensor_TW[start:end]
            for change in self._edits[row.session].get(place, ()):
                change.make(row, part_tW)
            for index, read in self._reads[row.session].get(place, ()):
                self._keep(index, read, row, part_tW)
        return tensor_TW

    def _keep(self, index: int, read: Read, row: Row, part_tW: torch.Tensor) -> None:
        for start, end in within(read.spans, row.position, row.position + row.tokens):
            values = here(part_tW[start - row.position : end - row.position]).float()
            if read.place.tensor == PATTERN:  # positions that do not exist yet are 0
                values = _padded(values, read.shape)
            values = values.flatten()
            about = torch.tensor([index, start, end - start], dtype=torch.int32).view(torch.float32)
            self._made.setdefault(row, []).append(torch.cat((about, values)))

    def around(self, rows: Sequence[Row], compute: Callable[[], Outputs]) -> Outputs:
        """Run a step, and add what was read in it to its outputs, as the port `reads`.

        The port's tensor is float32 [numbers]. Each row has pieces, each of which begins with three whole numbers (int32): the
        index of the read in `SessionInfo.reads`, the first position, and the count of positions. After them come the values.
        """
        if not self.wants(rows):
            return compute()
        self._made.clear()  # of a step that failed
        try:
            outputs = compute()
        except RowsFailed as failed:
            failed.outputs = {**failed.outputs, **self._taken()}
            raise
        return {**outputs, **self._taken()}

    def _taken(self) -> Outputs:
        if not self._made:
            return {}
        pieces = [(row, torch.cat(parts)) for row, parts in self._made.items()]
        self._made.clear()
        rows = tuple(Row(row.session, row.epoch, row.position, len(values)) for row, values in pieces)
        return {READS: Batch(rows, {READS: torch.cat([values for _, values in pieces])})}


def _padded(pattern_tW: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a pattern with the heads and positions of `shape`, [t, N · P]."""
    heads, positions = shape
    held_tNP = pattern_tW.view(len(pattern_tW), heads, -1)
    whole_tNP = torch.zeros(len(pattern_tW), heads, positions)
    whole_tNP[:, :, : held_tNP.shape[2]] = held_tNP
    return whole_tNP.flatten(1)


class _Change(NamedTuple):
    """Hold an edit, with its vectors [rows, W] as a tensor."""

    edit: Edit
    vectors: torch.Tensor

    @classmethod
    def of(cls, edit: Edit) -> _Change:
        held = torch.frombuffer(bytearray(edit.values), dtype=torch.float32) if edit.values else torch.empty(0)
        return cls(edit, held.view(max(1, edit.rows), -1))

    def make(self, row: Row, part_tW: torch.Tensor) -> None:
        """Make the edit in the tokens of one row, in place. It is computed in float32."""
        edit, taken = self.edit, 0
        columns = edit.columns if edit.place.tensor != PATTERN else _of_pattern(edit.columns, part_tW.shape[1])
        for start, end in edit.spans:
            for low, high in within(((start, end),), row.position, row.position + row.tokens):
                part = part_tW[low - row.position : high - row.position]
                first = taken + low - start if edit.rows > 1 else 0
                vectors = self.vectors[first : first + (high - low if edit.rows > 1 else 1)].to(part.device)
                for left, right in columns or ((0, part.shape[1]),):
                    part[:, left:right] = _changed(edit, part[:, left:right].float(), vectors)
            taken += 0 if end is None else end - start


def _of_pattern(columns: tuple[tuple[int, int], ...], width: int) -> tuple[tuple[int, int], ...]:
    """Return the columns of a pattern [N · P], given as the number of heads and then the heads that are changed."""
    if not columns:
        return ()
    (heads, _), *chosen = columns
    return tuple((head * (width // heads), end * (width // heads)) for head, end in chosen)


def _changed(edit: Edit, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if edit.operation == "zero":
        return torch.zeros_like(x)
    if edit.operation == "scale":
        return x * edit.number
    if edit.operation == "add":
        return x + edit.number * v
    if edit.operation == "set":
        return v.expand_as(x)
    unit: torch.Tensor = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    along: torch.Tensor = (x * unit).sum(-1, keepdim=True)
    if edit.operation == "project_out":
        return x - along * unit
    assert edit.operation == "clamp"
    return x + (along.clamp(edit.least, edit.most) - along) * unit
