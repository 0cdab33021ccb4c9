"""The trace file of one process: JSON lines.

First an object that names the actor, its clock and the columns; then an array a record, whose first column says which
kind it is. An array costs the control thread 0.5 µs a record; an object through a logger took 20.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

SENT = "sent"
SENT_COLUMNS = (
    "kind",
    "edge",
    "sequence",
    "bytes",
    "ready_ns",
    "credit_ns",
    "sent_ns",
    "codec",
    "rows",
    "coding",
    "target",
)
"""At the sending end: ready (the actor had it), credit (the link let it go), sent (handed to the wire).
`coding`, where the codec is not raw: [bytes before, nanoseconds, largest relative error or null]. `target`: the identity
at the other end."""

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

UNSENT = "unsent"
UNSENT_COLUMNS = ("kind", "edge", "bytes", "ready_ns", "given_up_ns", "rows", "target")
"""At the sending end: waited for credit that `target` never gave, until its sessions, or the run, were over."""

DROPPED = "dropped"
DROPPED_COLUMNS = ("kind", "records")
"""The ring was full or the disk was: so many records are missing before this line."""

_to_lines = msgspec.json.Encoder().encode_lines


class TraceFile:
    """`trace/<actor>.<replica>.jsonl` of the run folder, or `<name>.jsonl`. A disk that is full costs records, counted, never a
    step."""

    def __init__(self, run_dir: Path, label: str, name: str | None = None) -> None:
        self._path = run_dir / "trace" / f"{name or label}.jsonl"
        self._dropped = 0
        self._lost = 0
        head = {"actor": label, "clock": "CLOCK_MONOTONIC", "pid": os.getpid(),
                "columns": {SENT: SENT_COLUMNS, DONE: DONE_COLUMNS, UNSENT: UNSENT_COLUMNS,
                            DROPPED: DROPPED_COLUMNS}}  # fmt: skip
        self._file: BinaryIO = self._path.open("wb")
        self._file.write(_to_lines([head]))
        self._file.flush()

    def write(self, records: list[tuple[Any, ...]], dropped: int) -> int:
        """Append records; returns how many there were."""
        if not records and dropped == self._dropped:
            return 0
        lines: list[tuple[Any, ...]] = [*records]
        if dropped + self._lost > self._dropped:
            lines.append((DROPPED, dropped + self._lost - self._dropped))
        try:
            self._file.write(_to_lines(lines))
            self._file.flush()
            self._dropped = dropped + self._lost
        except OSError:
            self._lost += len(records)
        return len(records)

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
