"""The trace file of one process: JSON lines.

First an object that names the actor, its clock and the columns; then an array a record, whose first column says which
kind it is. An array costs the control thread 0.5 µs a record; an object through a logger took 20.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

SENT = "sent"
SENT_COLUMNS = (
    "kind", "edge", "sequence", "bytes", "ready_ns", "credit_ns", "sent_ns", "rows", "coding", "target", "tensors", "checksum",
)  # fmt: skip
"""At the sending end: ready (the actor had it), credit (the link let it go), sent (handed to the wire).
`coding`, where the codec is not raw: [bytes before, nanoseconds, largest relative error or null]. `target`: the identity
at the other end. `tensors`: [name, dtype, shape, codec, bytes] of each, with the numbers of the header's tables. `checksum`:
CRC-32 of the bytes, 0 within one machine."""

DONE = "done"
DONE_COLUMNS = (
    "kind",
    "edge",
    "sequence",
    "bytes",
    "sent_ns",
    "received_ns",
    "started_ns",
    "finished_ns",
    "batch",
    "rows",
    "source",
)
"""At the receiving end: received (taken from the wire), started and finished (the step it went into); `batch` is the
number of messages of that step, 0 if it went into none. Rows are [session, epoch, position, tokens]."""

PART = "part"
PART_COLUMNS = DONE_COLUMNS
"""At the receiving end: a step that some rows of a message went into, others of which wait for a later one; the rows are
those of the step."""

UNSENT = "unsent"
UNSENT_COLUMNS = ("kind", "edge", "bytes", "ready_ns", "given_up_ns", "rows", "target")
"""At the sending end: waited for credit that `target` never gave, until its sessions, or the run, were over."""

TAP = "tap"
TAP_COLUMNS = ("kind", "edge", "at_ns", "norm", "mean", "largest", "not_finite", "rows")
"""At the sending end of an edge with a tap: of the finite elements Euclidean norm, mean, largest magnitude; the share of the
others."""

CONTROL = "control"
CONTROL_COLUMNS = ("kind", "edge", "verb", "at_ns", "peer", "sent", "arguments")
"""A control message of a link, at both ends: offers, acknowledgements, what is asked for again (transport/format/header.py)."""

COMMAND = "command"
COMMAND_COLUMNS = ("kind", "verb", "sent_ns", "received_ns", "started_ns", "finished_ns", "session", "epoch")
"""A command of the supervisor's that the host obeyed: sent by the run's clock, received by the host's control thread,
started and finished by its step thread; 0 for what it does not name."""

SPAN = "span"
SPAN_COLUMNS = ("kind", "started_ns", "finished_ns", "row", "trace", "span", "parent", "links", "batch", "error")
"""A step that a row of a traced request went into (spans.py); `links`: the spans that made what it was given."""

DROPPED = "dropped"
DROPPED_COLUMNS = ("kind", "records")
"""The ring was full or the disk was: so many records are missing before this line."""

COLUMNS = {
    SENT: SENT_COLUMNS, DONE: DONE_COLUMNS, PART: PART_COLUMNS, UNSENT: UNSENT_COLUMNS, TAP: TAP_COLUMNS,
    CONTROL: CONTROL_COLUMNS, COMMAND: COMMAND_COLUMNS, SPAN: SPAN_COLUMNS, DROPPED: DROPPED_COLUMNS,
}  # fmt: skip
_to_lines = msgspec.json.Encoder().encode_lines


class TraceFile:
    """`trace/<actor>.<replica>.jsonl` of the run folder, or `<name>.jsonl`. A disk that is full costs records, counted, never a
    step; so does a file that has `most_bytes` (0: any). `sample` is what its reader should know of the records."""

    def __init__(
        self, run_dir: Path, label: str, name: str | None = None, *, sample: float = 1.0, most_bytes: int = 0
    ) -> None:
        self._path = run_dir / "trace" / f"{name or label}.jsonl"
        self._dropped = 0
        self._lost = 0
        self._not_put = 0
        self._most_bytes = most_bytes
        head = {"actor": label, "clock": "CLOCK_MONOTONIC", "pid": os.getpid(), "sample": sample,
                "columns": COLUMNS}  # fmt: skip
        self._file: BinaryIO | None = None
        with contextlib.suppress(OSError):  # no disk: all that would be in it is lost, and counted
            self._file = self._path.open("wb", buffering=0)
        self._head = _to_lines([head])
        self._bytes = 0
        self.write([], 0)

    def write(self, records: list[tuple[Any, ...]], dropped: int) -> int:
        """Append records; returns how many there were."""
        self._not_put = dropped
        if not records and dropped == self._dropped and not self._head:
            return 0
        if self._most_bytes and self._bytes >= self._most_bytes:  # `__exit__` says how many there were
            self._lost += len(records)
            return len(records)
        lines: list[tuple[Any, ...]] = [*records]
        if dropped + self._lost > self._dropped:
            lines.append((DROPPED, dropped + self._lost - self._dropped))
        if self._append(self._head + _to_lines(lines)):
            self._head, self._dropped = b"", dropped + self._lost
        else:
            self._lost += len(records)
        return len(records)

    def _append(self, data: bytes) -> bool:
        """Write all of it, or nothing: the beginning of a line must not stay."""
        if self._file is None:
            return False
        with contextlib.suppress(OSError):  # the disk is full; `write` counts what is lost
            if self._file.write(data) == len(data):
                self._bytes += len(data)
                return True
        with contextlib.suppress(OSError):
            self._file.truncate(self._bytes)
            self._file.seek(self._bytes)
        return False

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *_: object) -> None:
        untold = self._not_put + self._lost - self._dropped
        if untold:
            self._append(_to_lines([(DROPPED, untold)]))
        if self._file is not None:
            self._file.close()
