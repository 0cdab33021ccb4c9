"""Keep what a session reads by position, and refuse what does not fit."""

from __future__ import annotations

import struct

import pytest
import torch

from ranvier.actors.component.inside import Place, Read
from ranvier.graph.sessions.readings import Readings
from ranvier.transport.format.header import Row

ROW = Row(1, 1, 0, 0)
READS = (Read(Place("hidden", 3), ((0, None),), (2,)), Read(Place("layer", 1), ((1, 2), (4, 6)), (1, 2)))


def piece(index: int, first: int, values: list[float], count: int | None = None, width: int = 2) -> bytes:
    size = len(values) // width if count is None else count
    return struct.pack("3i", index, first, size) + struct.pack(f"{len(values)}f", *values)


def test_what_comes_again_replaces_itself() -> None:
    """Know which positions are complete, whatever order the reads come in, and after a position came twice."""
    readings = Readings(READS, 8)
    assert (readings.known, readings.complete(0), readings.complete(1)) == (0, True, False)
    readings.take_pieces(ROW, piece(0, 0, [1, 2, 3, 4]) + piece(1, 1, [9, 9]))
    assert (readings.known, readings.complete(2), readings.complete(3)) == (2, True, False)
    readings.take_pieces(ROW, piece(0, 2, [5, 6, 7, 8, 9, 10]))
    assert (readings.known, readings.complete(4), readings.complete(5)) == (4, True, False)
    readings.take_pieces(ROW, piece(1, 4, [7, 7]) + piece(0, 1, [30, 40, 50, 60]))
    assert (readings.known, readings.complete(5)) == (5, True)
    assert readings.at(1) == {"hidden 3": struct.pack("2f", 30, 40), "layer 1 layer": struct.pack("2f", 9, 9)}
    tensors = readings.tensors(5)
    assert tensors["hidden 3"].tolist() == [[1, 2], [30, 40], [50, 60], [7, 8], [9, 10]]
    torch.testing.assert_close(tensors["layer 1 layer"], torch.tensor([[[9.0, 9.0]], [[7.0, 7.0]]]))


@pytest.mark.parametrize(
    "data",
    [
        b"1234", piece(2, 0, [1, 2]), piece(-1, 0, [1, 2]), piece(0, 8, [1, 2]), piece(0, -1, [1, 2]), piece(1, 0, [1, 2]),
        piece(0, 0, [1, 2], count=2), piece(0, 0, [1, 2], count=-1), piece(0, 0, [], count=0), piece(0, 7, [1, 2, 3, 4]),
        piece(0, 0, [1, 2], count=2**31 - 1),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(data: bytes) -> None:
    """Raise an error that the gateway turns into the end of the session, for pieces that no actor would send."""
    readings = Readings(READS, 8)
    with pytest.raises(ValueError, match=r"expected reads from 0 to 1|are not read|expected \d+ bytes"):
        readings.take_pieces(ROW, data)
    assert readings.known == 0
