"""Check which pieces form a step, and in which order, without links: only rows and tensors."""

from __future__ import annotations

import pytest
import torch

from ranvier.actors.component.actor import Batch
from ranvier.actors.host.batcher import Batcher, Work
from ranvier.actors.protocol.host_spec import PortSpec
from ranvier.transport.format.header import Row
from ranvier.transport.format.tensor_spec import TensorSpec

PORT = PortSpec("x", TensorSpec("float32", ("tokens", 2)))


class Bench:
    """Hold a batcher of one port, and note what it splits."""

    def __init__(self, batch_tokens: int = 16, port: PortSpec = PORT) -> None:
        self.closed: set[int] = set()
        self.splits: list[Work] = []
        self.batcher = Batcher({port.name: port}, batch_tokens, self.current, self.splits.append)

    def current(self, piece: Work) -> Work | None:
        """Remove the rows of closed sessions."""
        keep = [row.session not in self.closed for row in piece.batch.rows]
        return self.batcher.part(piece, keep) if any(keep) else None

    def add(self, *rows: tuple[int, int, int], width: int = 2) -> None:
        """Add a piece of rows (session, position, tokens). Each number of its tensor is its session."""
        made = tuple(Row(session, 1, position, tokens) for session, position, tokens in rows)
        tensor = torch.cat([torch.full((row.tokens, width), float(row.session)) for row in made])
        self.batcher.add(Work(Batch(made, {"x": tensor}), ()))

    def take(self, most_rows: int = 64) -> list[tuple[int, int]] | None:
        """Take a step; return session and position of its rows. Check that each row has its own numbers."""
        work = self.batcher.take(most_rows)
        if work is None:
            return None
        rows = work.batch.rows
        expected = [row.session for row in rows for _ in range(row.tokens)]
        assert work.batch["x"][:, 0].tolist() == expected
        return [(row.session, row.position) for row in rows]


def steps(bench: Bench, most_rows: int = 64) -> list[list[tuple[int, int]]]:
    """Take steps until nothing waits."""
    return list(iter(lambda: bench.take(most_rows), None))  # type: ignore[arg-type]


def test_decoding_goes_first_then_the_oldest_chunk_then_the_others_by_position() -> None:
    """Take the ranks in their order, each in a step of its own because of the budget."""
    bench = Bench(batch_tokens=4)
    bench.add((1, 40, 4))
    bench.add((2, 80, 4))
    bench.add((3, 0, 4))
    bench.add((4, 9, 1))
    assert steps(bench) == [[(4, 9)], [(1, 40)], [(3, 0)], [(2, 80)]]


def test_the_oldest_chunk_is_passed_over_once() -> None:
    """Let decoding rows go before the oldest chunk once; then the chunk goes first."""
    bench = Bench(batch_tokens=4)
    bench.add((1, 0, 4))
    taken = []
    for step in range(2):
        bench.add((2, step, 1))
        taken.append(bench.take())
    assert taken == [[(2, 0)], [(1, 0)]]
    assert bench.take() == [(2, 1)]


def test_a_session_keeps_its_own_order() -> None:
    """Never take a decoding row before an earlier chunk of the same session, and never both in one step."""
    bench = Bench()
    bench.add((1, 0, 3))
    bench.add((1, 3, 1))
    bench.add((2, 7, 1))
    assert steps(bench) == [[(2, 7), (1, 0)], [(1, 3)]]


def test_a_step_has_at_most_so_many_rows() -> None:
    """Split a piece with more rows, and say so: its message then goes into two steps."""
    bench = Bench()
    bench.add(*[(session, 5, 1) for session in range(1, 6)])
    assert bench.take(2) == [(1, 5), (2, 5)]
    assert [len(piece.batch.rows) for piece in bench.splits] == [5]
    assert steps(bench, 2) == [[(3, 5), (4, 5)], [(5, 5)]]
    assert [len(piece.batch.rows) for piece in bench.splits] == [5, 3]


def test_rows_that_are_no_longer_wanted_are_not_taken() -> None:
    """Remove the rows of a closed session, and go on with the next piece."""
    bench = Bench()
    bench.add((1, 0, 1))
    bench.add((2, 0, 1), (1, 1, 1), (3, 0, 1))
    bench.closed = {1}
    assert steps(bench) == [[(2, 0), (3, 0)]]
    bench.add((1, 2, 1))
    assert bench.take() is None
    assert not bench.batcher.waiting


def test_pieces_of_unequal_width_do_not_share_a_step() -> None:
    """Compare the free dimensions of a port, because tensors of different widths cannot be stacked."""
    bench = Bench(port=PortSpec("x", TensorSpec("float32", ("tokens", "width"))))
    bench.add((1, 0, 1), width=2)
    bench.add((2, 0, 1), width=3)
    bench.add((3, 0, 1), width=3)
    assert steps(bench) == [[(1, 0)], [(2, 0), (3, 0)]]


def test_a_failed_step_gives_back_all_that_it_took() -> None:
    """Return the pieces of a step that could not be stacked, so that their credit can be given back."""
    bench = Bench()
    bench.add((1, 0, 1), width=2)
    bench.add((2, 0, 1), width=3)  # not what the port declares
    bench.add((3, 0, 1), width=2)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        bench.batcher.take(64)
    dropped = bench.batcher.abandon()
    assert [row.session for piece in dropped for row in piece.batch.rows] == [1, 2, 3]
    assert bench.batcher.abandon() == []
