"""Summarise the records of a run: how long messages took, per edge and per actor.

The parts of a message's way are:

    serialise   its credit was there → handed to the wire
    credit      the actor had made it → its credit was there
    wire        handed to the wire → received at the other end
    join        received → the last input that its step needed was received, too
    queue       all inputs were received → its step began
    compute     the step
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ranvier.actors.protocol.clocks import Estimate
from ranvier.actors.trace.trace_file import COMMAND, CONTROL, DONE, DROPPED, PART, SENT, TAP, UNSENT
from ranvier.transport.format.codec import CODECS
from ranvier.transport.format.host_id import host_id

from .trace_lines import (
    Commanded,
    Controlled,
    DoneLine,
    Lines,
    Name,
    SentLine,
    Tapped,
    TraceError,
    UnsentLine,
    read_json,
    read_plan,
)

PARTS = ("serialise", "credit", "wire", "join", "queue", "compute")
PERCENTILES = (50, 95, 99)


Message = tuple[int, int, str, str, int]
"""Key that the two records of a message share: edge, sequence, the `actor.replica` at either end, and when it was sent.
The time is part of it because the links of a restarted host count from 1 again."""


def sent_key(actor: str, record: SentLine) -> Message:
    """Return the key of a message from its record at the sending end."""
    return record.edge, record.sequence, actor, host_id(record.target).label, record.sent_ns


def done_key(actor: str, record: DoneLine) -> Message:
    """Return the key of a message from its record at the receiving end."""
    return record.edge, record.sequence, host_id(record.source).label, actor, record.sent_ns


@dataclass(slots=True)
class Trace:
    """Hold all records of a run by actor, its plan, and the names of its edges."""

    run_dir: Path
    edges: list[str]
    plan: Mapping[str, Any] = field(default_factory=dict)
    sent: dict[str, list[SentLine]] = field(default_factory=dict)
    done: dict[str, list[DoneLine]] = field(default_factory=dict)
    parts: dict[str, list[DoneLine]] = field(default_factory=dict)
    """Steps that took only some rows of a message. The step that finished the message is in `done`."""
    unsent: dict[str, list[UnsentLine]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    taps: dict[str, list[Tapped]] = field(default_factory=dict)
    control: dict[str, list[Controlled]] = field(default_factory=dict)
    commands: dict[str, list[Commanded]] = field(default_factory=dict)
    """The supervisor's commands that each host carried out."""
    clocks: Mapping[str, Sequence[Estimate]] = field(default_factory=dict)
    """For hosts whose clock is not the run's: how far it was ahead at which time, and the error of that estimate."""
    sample: float = 1.0
    """Share of the sessions that left records."""

    def edge(self, number: int) -> str:
        """Return the name of an edge, or `link N` for a link that training adds to the edges of the plan."""
        return self.edges[number] if number < len(self.edges) else f"link {number}"

    def wire(self, number: int) -> str:
        """Return the wire of an edge: ipc, local or tcp. A link that training adds uses the same wire as the edges."""
        edges = self.plan.get("edges", ())
        return str(edges[min(number, len(edges) - 1)].get("wire", "-")) if edges else "-"

    def in_steps(self, actor: str) -> list[DoneLine]:
        """Return what went into each step of an actor.

        A message that went into several steps appears once per step, with the rows that this step took.
        """
        parts = self.parts.get(actor, [])
        before: dict[Message, set[tuple[int, ...]]] = defaultdict(set)
        for part in parts:
            before[done_key(actor, part)].update(tuple(row) for row in part.rows)
        made = [*parts]
        for record in self.done.get(actor, ()):
            if record.batch:
                gone = before.get(done_key(actor, record))
                made.append(
                    record._replace(rows=tuple(row for row in record.rows if row not in gone)) if gone else record
                )
        return made


class _Outcome(msgspec.Struct):
    """Describe the part of `run.json` that is read."""

    counters: dict[Name, dict[Name, float]] = {}


def read(run_dir: Path) -> Trace:
    """Read the trace of a run folder. Ignore a last line that was only partly written.

    Raises:
        TraceError: there is no such folder, it holds no trace, or a file in it is not a trace file.
    """
    file, folder = run_dir / "plan.json", run_dir / "trace"
    if not file.is_file() or not folder.is_dir():
        raise TraceError(f"{run_dir}: no run folder; expected plan.json and trace/ in it")
    plan = read_plan(run_dir)
    trace = Trace(run_dir, [edge["name"] for edge in plan["edges"]], plan)
    lines = Lines(run_dir)
    by_kind: Mapping[str, dict[str, list[Any]]] = {
        SENT: trace.sent, DONE: trace.done, PART: trace.parts, TAP: trace.taps, UNSENT: trace.unsent, CONTROL: trace.control,
        COMMAND: trace.commands,
    }  # fmt: skip
    for actor, kind, record in lines.read():
        if kind == DROPPED:
            trace.dropped[actor] += record.records
        elif kind in by_kind:  # spans are for the exporter
            by_kind[kind].setdefault(actor, []).append(record)
    trace.clocks = lines.clocks
    for head in lines.heads.values():
        trace.sample = head.get("sample", 1.0)
        for records in (trace.sent, trace.done):
            records.setdefault(head["actor"], [])
    outcome = run_dir / "run.json"
    if outcome.is_file():  # written at the end of the run
        trace.counters = read_json(outcome, _Outcome).get("counters", {})
    if not trace.done:
        raise TraceError(f"{folder}: holds no records; was the run made with trace: false?")
    return trace


def summary(trace: Trace) -> dict[str, Any]:
    """Return, per edge and per actor, p50, p95 and p99 of each part in microseconds, messages, bytes and batch sizes."""
    times: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    nbytes: Counter[int] = Counter()
    unused: Counter[int] = Counter()
    never_done = Counter(record.edge for records in trace.sent.values() for record in records)
    coded: dict[int, list[SentLine]] = defaultdict(list)
    for sender, record, parts in messages(trace):
        for part, spent_ns in parts.items():
            times[record.edge][part].append(spent_ns / 1e3)
        nbytes[record.edge] += record.nbytes
        unused[record.edge] += not record.batch
        if sender is not None:
            never_done[record.edge] -= 1
            if sender.coding is not None:
                coded[record.edge].append(sender)
    edges = [
        {
            "edge": trace.edge(edge),
            "wire": trace.wire(edge),
            "messages": len(times[edge]["wire"]),
            "bytes": nbytes[edge],
            "unused": unused[edge],
            "not_taken": never_done[edge],
            "microseconds": {part: percentiles(times[edge][part]) for part in PARTS},
            **({"codec": _codec(coded[edge])} if edge in coded else {}),
        }
        for edge in sorted(times.keys() | never_done.keys())
    ]
    return {
        "run_dir": str(trace.run_dir),
        "edges": edges,
        "actors": [
            _actor(actor, trace.in_steps(actor), records)
            for actor, records in trace.done.items()
            if any(record.batch for record in records)
        ],
        "taps": taps(trace),
        "waits": waits(trace),
        "counters": {actor: {name: n for name, n in own.items() if n} for actor, own in trace.counters.items()},
        "records_dropped": dict(trace.dropped),
        "clocks": {host: _clock(estimates) for host, estimates in trace.clocks.items()},
        "control": control(trace),
        "commands": commands(trace),
        "sample": trace.sample,
    }


def messages(trace: Trace) -> Iterator[tuple[SentLine | None, DoneLine, dict[str, int]]]:
    """Yield for each message its record at the sending end (or None), its record at the receiving end, and its parts.

    The parts are in nanoseconds. If there are both records and the message went into a step, they add up to the time
    from ready to finished.
    """
    sent_at = {sent_key(actor, record): record for actor, records in trace.sent.items() for record in records}
    for actor, records in trace.done.items():
        complete_ns = _complete(trace.in_steps(actor))
        for record in records:
            sender = sent_at.get(done_key(actor, record))
            parts = {}
            if sender is not None:
                parts["serialise"] = sender.sent_ns - sender.credit_ns
                parts["credit"] = sender.credit_ns - sender.ready_ns
            parts["wire"] = record.received_ns - record.sent_ns
            if record.batch:
                whole_ns = (complete_ns.get((record.started_ns, *row[:3]), 0) for row in record.rows)
                joined_ns = max(record.received_ns, *whole_ns)
                parts["join"] = joined_ns - record.received_ns
                parts["queue"] = record.started_ns - joined_ns
                parts["compute"] = record.finished_ns - record.started_ns
            yield sender, record, parts


def _complete(records: Iterable[DoneLine]) -> dict[tuple[int, ...], int]:
    """Return when the last input of each row was received, by the beginning of the step and the row."""
    found: dict[tuple[int, ...], int] = {}
    for record in records:
        for row in record.rows:
            key = (record.started_ns, *row[:3])
            found[key] = max(found.get(key, 0), record.received_ns)
    return found


def _number(value: float | None) -> float:
    """Return infinity for None, which records hold in its place because JSON has no infinity."""
    return math.inf if value is None else value


def taps(trace: Trace) -> list[dict[str, Any]]:
    """Return for each edge with a tap: messages, norm, largest magnitude, and the first message with NaN or infinity."""
    made = []
    for actor, own in trace.taps.items():
        for edge in sorted({tapped.edge for tapped in own}):
            records = [tapped for tapped in own if tapped.edge == edge]
            bad = min(
                (tapped for tapped in records if tapped.not_finite), key=lambda tapped: tapped.at_ns, default=None
            )
            made.append({
                "edge": trace.edge(edge), "actor": actor, "messages": len(records),
                "norm": percentiles(_number(t.norm) for t in records),
                "largest": max(_number(t.largest) for t in records),
                "not_finite": sum(_number(t.not_finite) > 0 for t in records),
                "first_not_finite": list(bad.rows[0]) if bad is not None else None,
                "first_not_finite_ns": bad.at_ns if bad is not None else None,
            })  # fmt: skip
    return made


def control(trace: Trace) -> list[dict[str, Any]]:
    """Count the control messages that each link sent, by verb (transport/format/header.py)."""
    counted: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for actor, records in trace.control.items():
        for record in records:
            if record.sent:
                counted[record.edge, f"{actor} to {host_id(record.peer).label}"][record.verb] += 1
    return [
        {"edge": trace.edge(edge), "way": way, "messages": dict(verbs)}
        for (edge, way), verbs in sorted(counted.items())
    ]


def commands(trace: Trace) -> list[dict[str, Any]]:
    """Count the supervisor's commands that each host carried out, by verb.

    Also return how many microseconds they were on the wire, waited at the host, and took.
    """
    obeyed: dict[tuple[str, str], list[Commanded]] = defaultdict(list)
    for actor, records in trace.commands.items():
        for record in records:
            obeyed[actor, record.verb].append(record)
    return [
        {
            "actor": actor, "command": verb, "number": len(records),
            "microseconds": {
                "wire": percentiles((one.received_ns - one.sent_ns) / 1e3 for one in records),
                "queue": percentiles((one.started_ns - one.received_ns) / 1e3 for one in records),
                "obey": percentiles((one.finished_ns - one.started_ns) / 1e3 for one in records),
            },
        }
        for (actor, verb), records in sorted(obeyed.items())
    ]  # fmt: skip


def _clock(estimates: Sequence[Estimate]) -> dict[str, int]:
    """Return a clock's last offset, the largest error of its estimates, and its drift since the first estimate."""
    first, last = estimates[0], estimates[-1]
    return {
        "offset_ns": last.offset_ns, "error_ns": max(known.error_ns for known in estimates),
        "drift_ns": last.offset_ns - first.offset_ns,
    }  # fmt: skip


def waits(trace: Trace) -> list[dict[str, Any]]:
    """Return who waited for whom: for each sender and the receiver whose credit it lacked, the messages and the time.

    Also count the messages that were never sent. The longest total time comes first.
    """
    found: dict[tuple[int, str, str], list[tuple[int, bool]]] = defaultdict(list)
    for actor, sent in trace.sent.items():
        for record in sent:
            if record.credit_ns > record.ready_ns:
                key = record.edge, actor, host_id(record.target).label
                found[key].append((record.credit_ns - record.ready_ns, True))
    for actor, unsent in trace.unsent.items():
        for lost in unsent:
            key = lost.edge, actor, host_id(lost.target).label
            found[key].append((lost.given_up_ns - lost.ready_ns, False))
    waits = [
        {
            "edge": trace.edge(edge), "waiting": actor, "for": target, "messages": len(waited),
            "never_sent": sum(not went for _, went in waited), "total_ms": sum(ns for ns, _ in waited) / 1e6,
            "longest_ms": max(ns for ns, _ in waited) / 1e6,
        }
        for (edge, actor, target), waited in found.items()
    ]  # fmt: skip
    return sorted(waits, key=lambda wait: -wait["total_ms"])


def _codec(records: list[SentLine]) -> dict[str, Any]:
    """Return what a codec cost, saved and lost on one edge."""
    codings = [record.coding for record in records if record.coding is not None]
    before = sum(coding[0] or 0 for coding in codings)
    errors = [coding[2] for coding in codings if coding[2] is not None]
    return {
        "name": ", ".join(name for name, _ in Counter(CODECS[record.codec] for record in records).most_common()),
        "messages": len(records),
        "bytes_before": before,
        "ratio": before / max(1, sum(record.nbytes for record in records)),
        "microseconds": percentiles([(coding[1] or 0) / 1e3 for coding in codings]),
        "largest_relative_error": max(errors, default=None),
    }


def _actor(actor: str, records: list[DoneLine], done: list[DoneLine]) -> dict[str, Any]:
    steps = {(record.started_ns, record.finished_ns): record for record in records}
    tokens: Counter[tuple[int, int]] = Counter()
    for record in records:
        tokens[record.started_ns, record.finished_ns] += sum(row[3] for row in record.rows)
    computing_ns = sum(finished - started for started, finished in steps)
    span_ns = max(r.finished_ns for r in records) - min(r.started_ns for r in records)
    return {
        "actor": actor,
        "steps": len(steps),
        "messages": sum(record.batch > 0 for record in done),
        "busy": computing_ns / span_ns if span_ns else 1.0,
        "compute_microseconds": percentiles([(finished - started) / 1e3 for started, finished in steps]),
        "messages_a_step": percentiles([record.batch for record in steps.values()]),
        "tokens_a_step": percentiles(list(tokens.values())),
    }


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """Return p50, p95 and p99 by nearest rank; each is None if there are no values."""
    ordered = sorted(values)
    return {
        f"p{share}": ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else None
        for share in PERCENTILES
    }
