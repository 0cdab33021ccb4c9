"""The lines of a run's trace as they are read, once or while it goes on: each record with the actor that wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ranvier.actors.clocks import Correction, Estimate, is_another
from ranvier.actors.spec import SUPERVISOR
from ranvier.actors.trace_file import COLUMNS, COMMAND, CONTROL, DONE, DROPPED, PART, SENT, SPAN, TAP, UNSENT
from ranvier.transport.errors import RanvierError


class TraceError(RanvierError):
    """The folder holds no trace that can be read."""


class Sent(NamedTuple):
    """See `trace_file.SENT_COLUMNS`."""

    edge: int
    sequence: int
    nbytes: int
    ready_ns: int
    credit_ns: int
    sent_ns: int
    rows: Sequence[Sequence[int]]
    coding: Sequence[float | None] | None
    target: str
    tensors: Sequence[Sequence[Any]] = ()
    checksum: int = 0

    @property
    def codec(self) -> int:
        """Its number (transport/codec.py)."""
        return int(self.tensors[0][3]) if self.tensors else 0


class Done(NamedTuple):
    """See `trace_file.DONE_COLUMNS`."""

    edge: int
    sequence: int
    nbytes: int
    sent_ns: int
    received_ns: int
    started_ns: int
    finished_ns: int
    batch: int
    rows: Sequence[Sequence[int]]
    source: str


class Unsent(NamedTuple):
    """See `trace_file.UNSENT_COLUMNS`."""

    edge: int
    nbytes: int
    ready_ns: int
    given_up_ns: int
    rows: Sequence[Sequence[int]]
    target: str


class Tapped(NamedTuple):
    """See `trace_file.TAP_COLUMNS`."""

    edge: int
    at_ns: int
    norm: float
    mean: float
    largest: float
    not_finite: float
    rows: Sequence[Sequence[int]]


class Controlled(NamedTuple):
    """See `trace_file.CONTROL_COLUMNS`."""

    edge: int
    verb: str
    at_ns: int
    peer: str
    sent: bool
    arguments: Sequence[Any]


class Commanded(NamedTuple):
    """See `trace_file.COMMAND_COLUMNS`."""

    verb: str
    sent_ns: int
    received_ns: int
    started_ns: int
    finished_ns: int
    session: int
    epoch: int

    @property
    def source(self) -> str:
        """Who sent it, by the run's own clock."""
        return SUPERVISOR


class Spanned(NamedTuple):
    """See `trace_file.SPAN_COLUMNS`."""

    started_ns: int
    finished_ns: int
    row: Sequence[int]
    trace: str
    span: str
    parent: str
    links: Sequence[str]
    batch: int
    error: str


class Dropped(NamedTuple):
    """See `trace_file.DROPPED_COLUMNS`."""

    records: int


Record = Sent | Done | Unsent | Tapped | Controlled | Commanded | Spanned | Dropped
_FORMS: Mapping[str, type[Any]] = {
    SENT: Sent, DONE: Done, PART: Done, UNSENT: Unsent, TAP: Tapped, CONTROL: Controlled, COMMAND: Commanded, SPAN: Spanned,
    DROPPED: Dropped,
}  # fmt: skip


_of_line = msgspec.json.Decoder(list[Any]).decode


class Lines:
    """All trace files of a run folder, read from where the last reading ended. Times of hosts whose clock is another than the
    run's are given in the run's. `last_bytes`: what was in a file before, when it is first seen, is left out."""

    def __init__(self, run_dir: Path, last_bytes: int | None = None) -> None:
        self._last_bytes = last_bytes
        self._folder = run_dir / "trace"
        self._offsets: dict[Path, int] = {}
        self._clocks = run_dir / "clocks.json"
        self._corrections: Mapping[str, Correction] = {}
        self.clocks: Mapping[str, Sequence[Estimate]] = {}
        """Those that are not the run's, by the host's identity: what is known of them (clocks.py)."""
        self.heads: dict[Path, Mapping[str, Any]] = {}
        """The first line of each file."""

    def read(self, kinds: Iterable[str] | None = None) -> Iterator[tuple[str, str, Any]]:
        """Actor, kind and record of every line that is new, or of those of some kinds. One that is not whole yet is left for
        the next time.

        Raises:
            TraceError: a file does not begin as a trace does.
        """
        self._read_clocks()
        beginnings = tuple(f'["{kind}",'.encode() for kind in kinds or ())
        for path in sorted(self._folder.glob("*.jsonl")):
            lines = self._new_lines(path)
            if not lines:
                continue
            actor, host = self.heads[path]["actor"], _identity(path)
            for line in lines:
                if kinds is not None and not line.startswith(beginnings):
                    continue
                kind, *values = _of_line(line)
                record = _FORMS[kind](*values)
                yield actor, kind, self._in_the_runs_time(host, record) if self._corrections else record

    def _new_lines(self, path: Path) -> Sequence[bytes]:
        """The whole lines of a file since the last time; its head is taken in."""
        with path.open("rb") as file:
            if path not in self.heads:
                before = head = file.readline()
                size = path.stat().st_size
                if self._last_bytes is not None and size - self._last_bytes > len(head):
                    file.seek(size - self._last_bytes - 1)
                    before = file.readline()  # of which the beginning is left out, or all but its end
                if not before.endswith(b"\n"):
                    return ()
                self.heads[path], self._offsets[path] = _head(path, head), file.tell()
            file.seek(self._offsets[path])
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offsets[path] += len(whole)
        return whole.splitlines()

    def _read_clocks(self) -> None:
        try:
            told = json.loads(self._clocks.read_text())
            known = {host: [Estimate(*each) for each in estimates] for host, estimates in told.items()}
        except (OSError, ValueError, TypeError):
            return  # an older run, or one of another version: on one machine
        self.clocks = {host: estimates for host, estimates in known.items() if is_another(estimates)}
        self._corrections = {host: Correction(estimates) for host, estimates in self.clocks.items()}

    def _in_the_runs_time(self, host: str, record: Any) -> Any:
        times = {name: self._corrected(host, getattr(record, name)) for name in record._fields if name.endswith("_ns")}
        if isinstance(record, Done | Commanded):  # when it was sent is by the sender's clock
            times["sent_ns"] = self._corrected(record.source, record.sent_ns)
        return record._replace(**times)

    def _corrected(self, host: str, time_ns: int) -> int:
        own = self._corrections.get(host)
        return time_ns - own.ahead_ns(time_ns) if own is not None else time_ns


def _identity(path: Path) -> str:
    """Of the host that writes the file: the first in its place is named without its epoch (`file_name`)."""
    return path.stem if path.stem.count(".") > 1 else f"{path.stem}.1"


def _head(path: Path, line: bytes) -> Mapping[str, Any]:
    try:
        head: Mapping[str, Any] = json.loads(line)
        head["actor"]
        columns = head.get("columns", COLUMNS)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TraceError(f"{path}: expected a first line that names the actor") from None
    if any(list(columns.get(kind, own)) != list(own) for kind, own in COLUMNS.items()):
        raise TraceError(f"{path}: was written by another version of ranvier, whose records have other columns")
    return head
