"""Decide which pieces form one step of a host, and in which order. Knows no links and no sessions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import msgspec
import torch

from ranvier.transport.format.header import Row
from ranvier.transport.links.link_state import Received

from ..component.actor import Batch


class Work(msgspec.Struct, frozen=True, eq=False):
    """Describe one step, or a piece of one: rows with complete inputs, and the messages that brought them.

    `pieces` are the pieces that form a batched step. They are empty if the step is one piece.
    """

    batch: Batch
    sources: tuple[Received, ...]
    pieces: tuple[Work, ...] = ()


def in_order(ready: deque[Work], passed: Row | None) -> tuple[deque[Work], Row | None]:
    """Sort the waiting pieces into the order in which steps take them (see `HostCore.take`).

    A piece never goes before an earlier piece of the same session.

    Args:
        ready: the waiting pieces, the oldest first.
        passed: the first row of the prompt chunk that was the oldest at the last call. If that chunk still waits, it
            was passed over, and now goes first.

    Returns:
        The sorted pieces, and the first row of the prompt chunk that is the oldest now.
    """
    parts = [piece for piece in ready if all(row.tokens > 1 for row in piece.batch.rows)]
    if not parts:
        return ready, passed
    oldest = parts[0]
    lead = oldest.batch.rows[0]
    of_sessions: dict[int, tuple[int, int]] = {}
    ranked: list[tuple[tuple[int, int], Work]] = []
    for piece in ready:
        rows = piece.batch.rows
        before = max((of_sessions[row.session] for row in rows if row.session in of_sessions), default=None)
        if piece is oldest:
            rank = (0 if lead == passed else 2, 0)
        elif before is None and any(row.tokens <= 1 for row in rows):
            rank = (1, 0)
        else:
            rank = (3, max(row.position for row in rows))
        rank = max(rank, before or rank)
        of_sessions.update((row.session, rank) for row in rows)
        ranked.append((rank, piece))
    ranked.sort(key=lambda one: one[0])
    return deque(piece for _, piece in ranked), lead


def widths(piece: Work) -> list[torch.Size]:
    """Return the shapes of a piece's tensors without their first dimension. All pieces of a step must agree in them."""
    return [tensor.shape[1:] for tensor in piece.batch.tensors.values()]


def laid_together(pieces: Sequence[Work]) -> Work:
    """Combine at least one piece into a step. All pieces must have the same ports and widths."""
    if len(pieces) == 1:
        return pieces[0]
    return Work(
        Batch(
            tuple(row for piece in pieces for row in piece.batch.rows),
            {port: torch.cat([piece.batch[port] for piece in pieces]) for port in pieces[0].batch.tensors},
            _own_rows(pieces),
        ),
        tuple(source for piece in pieces for source in piece.sources),
        tuple(pieces),
    )


def _own_rows(pieces: Iterable[Work]) -> dict[str, tuple[Row, ...]]:
    ports = {port for piece in pieces for port in piece.batch.own_rows}
    return {port: tuple(row for piece in pieces for row in piece.batch.rows_of(port)) for port in ports}
