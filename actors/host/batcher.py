"""Decide which pieces form one step of a host, and in which order. This module knows no links and no sessions."""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import torch

from ranvier.transport.format.header import Row
from ranvier.transport.links.link_state import Received

from ..component.actor import Batch
from ..component.devices import here
from ..protocol.host_spec import PortSpec


class Work(msgspec.Struct, frozen=True, eq=False):
    """Describe one step, or a piece of one: rows with complete inputs, and the messages that brought them.

    `pieces` are the pieces that form a batched step. They are empty if the step is one piece.
    """

    batch: Batch
    sources: tuple[Received, ...]
    pieces: tuple[Work, ...] = ()


class Rank(enum.IntEnum):
    """Order the waiting pieces: a step takes a lower rank first, and pieces of the same rank by position and age."""

    PASSED_OVER = 0
    """The oldest prompt chunk, if steps went before it already: it is passed over at most once."""
    DECODING = 1
    """A row of one token. It waits at most for the running step and for one chunk."""
    OLDEST_CHUNK = 2
    """The prompt chunk that has waited longest."""
    CHUNK = 3
    """Other prompt chunks, by position: a short prompt does not wait for a long one."""


Order = tuple[Rank, int]
"""A rank, and the position among chunks."""


class Batcher:
    """Keep the pieces that wait, and make steps of them.

    Args:
        inputs: the actor's input ports by name.
        batch_tokens: the maximum number of tokens of a batched step. A single piece may hold more.
        current: removes the rows of a piece that are no longer wanted; returns None if no row is left. It is called
            for each piece when a step takes it.
        on_split: called with a piece of which only the first rows were taken. The rest waits on.
    """

    def __init__(
        self,
        inputs: Mapping[str, PortSpec],
        batch_tokens: int,
        current: Callable[[Work], Work | None],
        on_split: Callable[[Work], None],
    ) -> None:
        self._by_tokens = {name for name, port in inputs.items() if port.tensor.shape[:1] == ("tokens",)}
        self._stacks = all(port.stacks for port in inputs.values())
        self._alike = all(isinstance(size, int) for port in inputs.values() for size in port.tensor.shape[1:])
        self._batch_tokens = batch_tokens
        self._current = current
        self._on_split = on_split
        self.waiting: deque[Work] = deque()
        """The pieces that no step has taken yet, the oldest first, or in the order of their ranks."""
        self._passed: Row | None = None
        self._taken: list[Work] = []
        self.add = self.waiting.append

    def take(self, most_rows: int) -> Work | None:
        """Return the next step: waiting pieces by `Rank`, one row per session, within the token budget.

        Args:
            most_rows: the maximum number of rows of the step, at least 1.

        Returns:
            The step; None if nothing waits, or if no row of what waits is wanted.
        """
        ready = self.waiting
        if len(ready) > 1 and self._stacks:
            self._put_in_order()
        if len(ready) == 1 and len(ready[0].batch.rows) == 1:
            current = self._current(ready[0])
            ready.popleft()
            return current
        self._taken = []
        work = self._together(most_rows)
        self._taken = []
        return work

    def abandon(self) -> list[Work]:
        """Drop the pieces that the last, failed `take` was batching, and return them."""
        taken, self._taken = self._taken or ([self.waiting.popleft()] if self.waiting else []), []
        return taken

    def _put_in_order(self) -> None:
        """Sort the waiting pieces by rank. A piece never goes before an earlier piece of the same session."""
        chunks = [piece for piece in self.waiting if all(row.tokens > 1 for row in piece.batch.rows)]
        if not chunks:
            return
        oldest = chunks[0]
        lead = oldest.batch.rows[0]
        of_sessions: dict[int, Order] = {}
        ranked: list[tuple[Order, Work]] = []
        for piece in self.waiting:
            rows = piece.batch.rows
            before = max((of_sessions[row.session] for row in rows if row.session in of_sessions), default=None)
            order: Order
            if piece is oldest:
                order = (Rank.PASSED_OVER if lead == self._passed else Rank.OLDEST_CHUNK, 0)
            elif before is None and any(row.tokens <= 1 for row in rows):
                order = (Rank.DECODING, 0)
            else:
                order = (Rank.CHUNK, max(row.position for row in rows))
            order = max(order, before or order)
            of_sessions.update((row.session, order) for row in rows)
            ranked.append((order, piece))
        ranked.sort(key=lambda one: one[0])
        self.waiting.clear()
        self.waiting.extend(piece for _, piece in ranked)
        self._passed = lead

    def _together(self, most_rows: int) -> Work | None:
        if len(self.waiting) == 1:
            return self._next_current(most_rows)
        pieces: list[Work] = []
        sessions: set[int] = set()
        tokens = 0
        while self.waiting:
            piece = self.waiting[0]
            if pieces and not self._fits(piece, pieces[0], tokens, len(sessions), most_rows):
                break
            if not sessions.isdisjoint(row.session for row in piece.batch.rows):
                break  # a session's next step depends on the one before
            size = piece.batch.tokens
            current = self._next_current(most_rows)
            if current is not None:
                pieces.append(current)
                tokens += size
                sessions.update(row.session for row in current.batch.rows)
        return _laid_together(pieces) if pieces else None

    def _fits(self, piece: Work, first: Work, tokens: int, rows: int, most_rows: int) -> bool:
        """Return whether a piece can join a step that begins with `first` and has this many tokens and rows."""
        if not self._stacks or tokens + piece.batch.tokens > self._batch_tokens:
            return False
        if rows + len(piece.batch.rows) > most_rows:
            return False
        if piece.batch.tensors.keys() != first.batch.tensors.keys():
            return False  # the join completed it with other ports
        return self._alike or _widths(piece) == _widths(first)

    def _next_current(self, most_rows: int) -> Work | None:
        current = self._current(self._next(most_rows))
        if current is None:
            self._taken.pop()  # `self._current` has dropped the piece
        return current

    def _next(self, most_rows: int) -> Work:
        """Take the first piece, or only its first `most_rows` rows if it has more."""
        piece = self.waiting.popleft()
        self._taken.append(piece)
        count = len(piece.batch.rows)
        if count <= most_rows:
            return piece
        first, rest = (
            self.part(piece, [(index < most_rows) == leading for index in range(count)]) for leading in (True, False)
        )
        self._on_split(piece)
        self.waiting.appendleft(rest)
        self._taken[-1] = first
        return first

    def split(self, port: str, rows: Sequence[Row], tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the part of each row of a port's tensor."""
        if len(rows) == 1:
            return [tensor]
        by_tokens = port in self._by_tokens
        return list(torch.split(tensor, [row.tokens if by_tokens else 1 for row in rows]))

    def part(self, piece: Work, keep: Sequence[bool]) -> Work:
        """Return a piece with only the rows that are marked in `keep`, at least one."""
        rows = piece.batch.rows
        tensors = {
            port: torch.cat(list(itertools.compress(self.split(port, rows, tensor), keep)))
            for port, tensor in piece.batch.tensors.items()
        }
        return Work(Batch(tuple(itertools.compress(rows, keep)), tensors), piece.sources)

    def alone(self, work: Work) -> list[Work]:
        """Make a step of each row of a step, to find the sessions that make it fail. These steps have no sources."""
        if work.pieces:
            return [single for piece in work.pieces for single in self.alone(piece)]
        batch = work.batch
        if len(batch.rows) == 1:
            return [Work(batch, ())]
        parts = {port: self.split(port, batch.rows, tensor) for port, tensor in batch.tensors.items()}
        return [
            Work(Batch((row,), {port: split[index] for port, split in parts.items()}), ())
            for index, row in enumerate(batch.rows)
        ]


def _widths(piece: Work) -> list[torch.Size]:
    """Return the shapes of a piece's tensors without their first dimension. All pieces of a step must agree in them."""
    return [tensor.shape[1:] for tensor in piece.batch.tensors.values()]


def _laid_together(pieces: Sequence[Work]) -> Work:
    """Combine at least one piece into a step. All pieces must have the same ports and widths."""
    if len(pieces) == 1:
        return pieces[0]
    return Work(
        Batch(
            tuple(row for piece in pieces for row in piece.batch.rows),
            {port: _joined([piece.batch[port] for piece in pieces]) for port in pieces[0].batch.tensors},
            _own_rows(pieces),
        ),
        tuple(source for piece in pieces for source in piece.sources),
        tuple(pieces),
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join tensors by rows. If some are on a GPU and some are not, the result is in this machine's memory."""
    first = parts[0].is_cpu
    if any(part.is_cpu != first for part in parts):
        parts = [here(part) for part in parts]
    return torch.cat(parts)


def _own_rows(pieces: Iterable[Work]) -> dict[str, tuple[Row, ...]]:
    ports = {port for piece in pieces for port in piece.batch.own_rows}
    return {port: tuple(row for piece in pieces for row in piece.batch.rows_of(port)) for port in ports}
