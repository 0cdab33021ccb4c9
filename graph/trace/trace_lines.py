"""Read the lines of a run's trace, once or while the run writes it: each record with the actor that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, BinaryIO, NamedTuple, get_type_hints

import msgspec
from msgspec import Meta

from ranvier.actors.protocol.clocks import Correction, Estimate, is_another
from ranvier.actors.protocol.host_spec import SUPERVISOR
from ranvier.actors.trace.trace_file import COLUMNS, COMMAND, CONTROL, DONE, DROPPED, PART, SENT, SPAN, TAP, UNSENT
from ranvier.transport.files import read_bounded, regular
from ranvier.transport.format.codec import CODECS
from ranvier.transport.format.errors import RanvierError


class TraceError(RanvierError):
    """Report that a folder holds no readable trace."""


Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Name = Annotated[str, Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Label = Annotated[str, Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f.]+\.[0-9]{1,9}$")]
"""`actor.replica`."""
Identity = Annotated[str, Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f.]+\.[0-9]{1,9}\.[0-9]{1,9}$")]
"""`actor.replica.epoch`."""
Codec = Annotated[int, Meta(ge=0, lt=len(CODECS))]
RowOf = tuple[Count, Count, Count, Count]
"""Session, epoch, position, tokens."""
Rows = Annotated[tuple[RowOf, ...], Meta(min_length=1)]
MOST_BYTES = 16 << 20
"""Largest JSON file of a run folder that is read, in bytes."""
MOST_LINE_BYTES = 16 << 20
"""Longest first line of a trace file that is read, in bytes."""


class _Head(msgspec.Struct, frozen=True):
    """Describe the first line of a trace file."""

    actor: Label
    sample: Annotated[float, Meta(gt=0, le=1)] = 1.0
    columns: dict[str, tuple[str, ...]] | None = None


class _PlannedEdge(msgspec.Struct, frozen=True):
    name: Annotated[str, Meta(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
    feedback: bool = False
    credits_messages: Count = 0
    wire: str = "-"


class _PlannedHost(msgspec.Struct, frozen=True):
    actor: Name
    kind: str = ""
    cache_bytes_per_token: Count = 0


class _Planned(msgspec.Struct, frozen=True):
    edges: Annotated[tuple[_PlannedEdge, ...], Meta(max_length=1 << 20)]
    hosts: tuple[_PlannedHost, ...] = ()


def read_json(file: Path, kind: Any = Any) -> Any:
    """Return the contents of a JSON file of a run folder.

    Raises:
        TraceError: the file cannot be read, or its contents do not have the form `kind`.
    """
    try:
        content = msgspec.json.decode(read_bounded(file, MOST_BYTES))
        msgspec.convert(content, kind)
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError(f"{file}: {error}") from None


def read_plan(run_dir: Path) -> dict[str, Any]:
    """Return the plan of a run, after checking the form of its edges and hosts. Raises the errors of `read_json`."""
    plan: dict[str, Any] = read_json(run_dir / "plan.json", _Planned)
    return plan


class SentLine(NamedTuple):
    """Represent a message at its sending end, as `trace_file.SENT_COLUMNS` describes it."""

    edge: Count
    sequence: Count
    nbytes: Count
    ready_ns: Count
    credit_ns: Count
    sent_ns: Count
    rows: Rows
    coding: tuple[Count, Count, float | None] | None
    target: Identity
    tensors: tuple[tuple[Name, Count, tuple[Count, ...], Codec, Count], ...] = ()
    checksum: Count = 0

    @property
    def codec(self) -> int:
        """Return the number of the codec (transport/format/codec.py)."""
        return self.tensors[0][3] if self.tensors else 0


class DoneLine(NamedTuple):
    """Represent a message at its receiving end, as `trace_file.DONE_COLUMNS` describes it."""

    edge: Count
    sequence: Count
    nbytes: Count
    sent_ns: Count
    received_ns: Count
    started_ns: Count
    finished_ns: Count
    batch: Count
    rows: Rows
    source: str


class UnsentLine(NamedTuple):
    """Represent a message that was never sent, as `trace_file.UNSENT_COLUMNS` describes it."""

    edge: Count
    nbytes: Count
    ready_ns: Count
    given_up_ns: Count
    rows: Rows
    target: Identity


class Tapped(NamedTuple):
    """Represent what a tap saw of a message, as `trace_file.TAP_COLUMNS` describes it."""

    edge: Count
    at_ns: Count
    norm: float | None
    mean: float | None
    largest: float | None
    not_finite: float | None
    rows: Rows


class Controlled(NamedTuple):
    """Represent a control message of a link, as `trace_file.CONTROL_COLUMNS` describes it."""

    edge: Count
    verb: Name
    at_ns: Count
    peer: Identity
    sent: bool
    arguments: Sequence[Any]


class Commanded(NamedTuple):
    """Represent a command of the supervisor, as `trace_file.COMMAND_COLUMNS` describes it."""

    verb: Name
    sent_ns: Count
    received_ns: Count
    started_ns: Count
    finished_ns: Count
    session: Count
    epoch: Count

    @property
    def source(self) -> str:
        """Return the sender: the supervisor, whose clock is the run's."""
        return SUPERVISOR


class Spanned(NamedTuple):
    """Represent a span of a request, as `trace_file.SPAN_COLUMNS` describes it."""

    started_ns: Count
    finished_ns: Count
    row: RowOf
    trace: str
    span: str
    parent: str
    links: Sequence[str]
    batch: Count
    error: str


class Dropped(NamedTuple):
    """Represent the number of dropped records, as `trace_file.DROPPED_COLUMNS` describes it."""

    records: Count


Record = SentLine | DoneLine | UnsentLine | Tapped | Controlled | Commanded | Spanned | Dropped
_FORMS: Mapping[str, type[Any]] = {
    SENT: SentLine, DONE: DoneLine, PART: DoneLine, UNSENT: UnsentLine, TAP: Tapped, CONTROL: Controlled,
    COMMAND: Commanded, SPAN: Spanned, DROPPED: Dropped,
}  # fmt: skip


Estimated = tuple[Count, Annotated[int, Meta(gt=-(1 << 62), lt=1 << 62)], Count]
_of_line = msgspec.json.Decoder(list[Any]).decode


def _typed(form: Any) -> Callable[[bytes], tuple[Any, ...]]:
    """Return a decoder of a whole line of this form: in one pass, in half the time of a decoder of any line."""
    hints = get_type_hints(form, include_extras=True)
    return msgspec.json.Decoder(GenericAlias(tuple, (str, *(hints[name] for name in form._fields)))).decode


_DECODERS = {kind: _typed(form) for kind, form in _FORMS.items()}
_KINDS = {f'["{kind}",'.encode(): kind for kind in _FORMS}
_head_of = msgspec.json.Decoder(_Head).decode


class Lines:
    """Read all trace files of a run folder, each from where the last read ended.

    Times of a host whose clock is not the run's are converted to the run's clock. With `last_bytes`, the first read of
    a file skips all records that begin before its last `last_bytes` bytes.
    """

    def __init__(self, run_dir: Path, last_bytes: int | None = None) -> None:
        self._last_bytes = last_bytes
        self._folder = run_dir / "trace"
        self._offsets: dict[Path, int] = {}
        self._clocks = run_dir / "clocks.json"
        self._clocks_of_ns = 0
        """When the estimates that are known were written."""
        self._corrections: Mapping[str, Correction] = {}
        self.clocks: Mapping[str, Sequence[Estimate]] = {}
        """Estimates of the clocks that are not the run's, by the host's identity (clocks.py)."""
        self.heads: dict[Path, Mapping[str, Any]] = {}
        """The first line of each file."""

    def read(self, kinds: Iterable[str] | None = None) -> Iterator[tuple[str, str, Any]]:
        """Yield actor, kind and record of every new line, or only of the given kinds.

        A line that is not complete yet is left for the next call.

        Raises:
            TraceError: a file does not begin as a trace does, or is damaged.
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
                kind, record = _record(path, line)
                yield actor, kind, self._in_the_runs_time(host, record) if self._corrections else record

    def _new_lines(self, path: Path) -> Sequence[bytes]:
        """Return the complete lines of a file since the last call. Read its head at the first call."""
        with _opened(path) as file:
            if path not in self.heads:
                before = head = file.readline(MOST_LINE_BYTES)
                size = path.stat().st_size
                if self._last_bytes is not None and size - self._last_bytes > len(head):
                    file.seek(size - self._last_bytes - 1)
                    before = file.readline(MOST_LINE_BYTES)  # skip the line that begins earlier
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
            written_ns = self._clocks.stat().st_mtime_ns
        except OSError:
            return  # the run is on one machine
        if written_ns == self._clocks_of_ns:
            return
        self._clocks_of_ns = written_ns
        content = read_json(self._clocks, dict[Name, tuple[Estimated, ...]])
        known = {host: [Estimate(*each) for each in estimates] for host, estimates in content.items()}
        self.clocks = {host: estimates for host, estimates in known.items() if is_another(estimates)}
        self._corrections = {host: Correction(estimates) for host, estimates in self.clocks.items()}

    def _in_the_runs_time(self, host: str, record: Any) -> Any:
        times = {name: self._corrected(host, getattr(record, name)) for name in record._fields if name.endswith("_ns")}
        if isinstance(record, DoneLine | Commanded):  # `sent_ns` is by the sender's clock
            times["sent_ns"] = self._corrected(record.source, record.sent_ns)
        return record._replace(**times)

    def _corrected(self, host: str, time_ns: int) -> int:
        own = self._corrections.get(host)
        return time_ns - own.ahead_ns(time_ns) if own is not None else time_ns


def _identity(path: Path) -> str:
    """Return the identity of the host that writes a file. The file of an epoch 1 host is named without the epoch."""
    return path.stem if path.stem.count(".") > 1 else f"{path.stem}.1"


def _opened(path: Path) -> BinaryIO:
    try:
        return regular(path).open("rb")
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None


def _head(path: Path, line: bytes) -> Mapping[str, Any]:
    try:
        head = _head_of(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: expected a first line that names the actor: {error}") from None
    columns = head.columns or {}
    if any(list(columns.get(kind, own)) != list(own) for kind, own in COLUMNS.items()):
        raise TraceError(f"{path}: was written by another version of ranvier, whose records have other columns")
    return {"actor": head.actor, "sample": head.sample}


def _record(path: Path, line: bytes) -> tuple[str, Any]:
    known = _KINDS.get(line[: line.find(b",") + 1])
    if known is not None:
        try:
            return known, _FORMS[known]._make(_DECODERS[known](line)[1:])
        except (ValueError, RecursionError):  # it may lack its last columns; what follows says what else is wrong
            pass
    try:
        kind, *values = _of_line(line)
        return kind, msgspec.convert(values, _FORMS[kind])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TraceError(f"{path}: damaged: {error}: {line[:80]!r}") from None
