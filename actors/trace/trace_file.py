"""Write the trace file of one process, as JSON lines.

The first line is an object that names the actor, its clock and the columns. Each further line is an array that holds
one record; its first column is the kind of the record. An array costs the control thread 0.5 µs per record, an object
through a logger cost 20 µs.
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
"""A message at its sending end.

- `ready_ns`: when the actor had it; `credit_ns`: when the link had credit; `sent_ns`: when the wire got it.
- `coding`: [bytes before, nanoseconds, largest relative error or null], if the codec is not raw.
- `target`: the identity of the receiver.
- `tensors`: [name, dtype, shape, codec, bytes] of each; dtype and codec are numbers of the header's tables.
- `checksum`: CRC-32 of the bytes, 0 within one machine.
"""

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
"""A message at its receiving end.

- `received_ns`: when it was taken from the wire; `started_ns`, `finished_ns`: the step that it went into.
- `batch`: the number of messages in that step, 0 if it went into none.
- `rows`: [session, epoch, position, tokens] of each.
"""

PART = "part"
PART_COLUMNS = DONE_COLUMNS
"""A step that took only some rows of a message, at its receiving end. The other rows wait for a later step. `rows`
holds the message's rows that went into this step."""

UNSENT = "unsent"
UNSENT_COLUMNS = ("kind", "edge", "bytes", "ready_ns", "given_up_ns", "rows", "target")
"""A message at its sending end that waited for credit of `target` until its sessions, or the run, ended."""

TAP = "tap"
TAP_COLUMNS = ("kind", "edge", "at_ns", "norm", "mean", "largest", "not_finite", "rows")
"""A message at the sending end of an edge with a tap: Euclidean norm, mean and largest magnitude of the finite
elements, and the share of NaN and infinities."""

CONTROL = "control"
CONTROL_COLUMNS = ("kind", "edge", "verb", "at_ns", "peer", "sent", "arguments")
"""A control message of a link, at both ends: offers, acknowledgements, requests to send again
(transport/format/header.py)."""

COMMAND = "command"
COMMAND_COLUMNS = ("kind", "verb", "sent_ns", "received_ns", "started_ns", "finished_ns", "session", "epoch")
"""A command of the supervisor that the host obeyed.

- `sent_ns`: when the supervisor sent it, by the run's clock.
- `received_ns`: when the control thread received it; `started_ns`, `finished_ns`: when the step thread obeyed it.
- `session`, `epoch`: 0 if the command names none.
"""

SPAN = "span"
SPAN_COLUMNS = ("kind", "started_ns", "finished_ns", "row", "trace", "span", "parent", "links", "batch", "error")
"""A step that took a row of a traced request (spans.py). `links`: the spans that made its inputs."""

DROPPED = "dropped"
DROPPED_COLUMNS = ("kind", "records")
"""The number of records missing before this line, because the ring, the disk or the file was full."""

COLUMNS = {
    SENT: SENT_COLUMNS, DONE: DONE_COLUMNS, PART: PART_COLUMNS, UNSENT: UNSENT_COLUMNS, TAP: TAP_COLUMNS,
    CONTROL: CONTROL_COLUMNS, COMMAND: COMMAND_COLUMNS, SPAN: SPAN_COLUMNS, DROPPED: DROPPED_COLUMNS,
}  # fmt: skip
_to_lines = msgspec.json.Encoder().encode_lines


class TraceFile:
    """Write `trace/<actor>.<replica>.jsonl` of the run folder, or `<name>.jsonl`.

    When the disk is full, or the file has `most_bytes` (0: no limit), records are lost and counted. That never fails a
    step. `sample` is the recorded share of the sessions. It is written to the first line, for the reader of the file.
    """

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
        with contextlib.suppress(OSError):  # without a file all records are lost, and counted
            self._file = self._path.open("wb", buffering=0)
        self._head = _to_lines([head])
        self._bytes = 0
        self.write([], 0)

    def write(self, records: list[tuple[Any, ...]], dropped: int) -> int:
        """Append records, and return how many were given. `dropped` is what the ring has dropped in total."""
        self._not_put = dropped
        if not records and dropped == self._dropped and not self._head:
            return 0
        if self._most_bytes and self._bytes >= self._most_bytes:  # `__exit__` records their number
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
        """Write all of `data`, or nothing: part of a line must not remain. Return whether it was written."""
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
        uncounted = self._not_put + self._lost - self._dropped
        if uncounted:
            self._append(_to_lines([(DROPPED, uncounted)]))
        if self._file is not None:
            self._file.close()
