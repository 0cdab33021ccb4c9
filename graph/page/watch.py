"""Watch the trace of a run while it is written: figures of the last seconds, histograms, and the path of a token.

Each record is looked at once. Figures of the window are sums over slots of time, and an edge's parts are counted in histograms,
so a look at a busy run costs little (benchmarks/page.py). The newest records are kept as they are, for the paths of tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from ranvier.actors.trace.trace_file import DONE, PART, SENT

from ..trace.critical_path import CAUSES, ME, Causes, described
from ..trace.summary import PARTS, Trace, done_key, percentiles, read
from ..trace.trace_lines import DoneLine, Lines, SentLine, TraceError, read_plan
from .histogram import bucket, percentile

WINDOW_NS = 4_000_000_000
"""Rates and percentiles cover this time before the newest record."""
SLOT_NS = 250_000_000
AT_FIRST = 1 << 20
"""Bytes at the end of each file that the first look covers."""
MOST_RECORDS = 40_000
MOST_ROWS = 100_000
"""Records, and rows in them, that are kept for the paths of tokens: those of some minutes, up to 50 MB."""
MOST_BYTES = 32 << 20
"""A trace up to this size is read again as a whole for the path of an older token."""
BLOCK = 512
"""Most records that are kept and dropped together."""
LATE_NS = 3_000_000_000
"""A record is read at most this long after another one of its time: each process writes its records when it likes."""
STEPS_SHOWN = 60
SETTLED_NS = 700_000_000
"""After this time all processes have written their records of a token."""
MOST_ANSWERS = 4096
"""Tokens among which the newest settled one is looked for: those of SETTLED_NS."""


class NotYet(TraceError):
    """Report that the records of a token are not all written."""


Kept = tuple[int, str, str, Any]
"""When it ended, actor, kind and record."""


@dataclass(slots=True)
class _Slot:
    """Hold what happened in one slot of time."""

    nbytes: Counter[int] = field(default_factory=Counter)
    waited: Counter[int] = field(default_factory=Counter)
    """Messages that waited for credit, by edge."""
    wires: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Nanoseconds on the wire of each message, by edge."""
    busy_ns: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)


class Watch:
    """Hold what the trace of a run in a folder says. Call `look` now and then. `now_ns` is the clock of the run.

    Raises:
        TraceError: the folder is no run's.
    """

    def __init__(self, run_dir: Path, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._run_dir, self._now_ns = run_dir, now_ns
        self._edges = [edge["name"] for edge in read_plan(run_dir)["edges"]]
        self._lines = Lines(run_dir, AT_FIRST)
        self._slots: dict[int, _Slot] = {}
        self._oldest = 0
        """Number of the window's first slot."""
        self._parts: dict[Any, set[tuple[int, ...]]] = {}
        """Rows of messages that went into earlier steps."""
        self._durations: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
        """Nanoseconds of the messages of this look, by edge and part."""
        self._histograms: dict[int, dict[str, Counter[int]]] = {}
        self._kept: deque[list[Kept]] = deque()
        """The records of each look, in order of time, in blocks."""
        self._records = self._rows = 0
        self._steps: dict[str, deque[tuple[int, int, int, int]]] = {}
        self._open_step: dict[str, list[tuple[str, DoneLine]]] = {}
        self._token: dict[str, Any] | None = None
        self._answers: deque[tuple[int, int, int]] = deque(maxlen=MOST_ANSWERS)
        self._newest_ns = 0
        self._first_ns = 0
        """When the first step began: a run that is younger than the window has its figures over its own time."""

    def look(self) -> None:
        """Read what was written since the last call.

        Raises:
            TraceError: the trace is damaged.
        """
        # each file has the records of one process in order; together they are put in order of time
        read = self._lines.read((DONE, PART, SENT))
        new = [(_ended_ns(kind, record), actor, kind, record) for actor, kind, record in read]
        new.sort(key=itemgetter(0))
        self._keep(new)
        for _, actor, kind, record in new:
            if kind == SENT:
                self._take_sent(record)
            else:
                self._take_done(actor, kind, record)
        self._count()
        # records are some 0.5 s late; once a run rests, its figures sink to zero
        self._oldest = max(self._newest_ns, self._now_ns() - SETTLED_NS) // SLOT_NS - WINDOW_NS // SLOT_NS
        for number in [number for number in self._slots if number < self._oldest]:
            del self._slots[number]

    def _keep(self, new: list[Kept]) -> None:
        for at in range(0, len(new), BLOCK):
            block = new[at : at + BLOCK]
            self._kept.append(block)
            self._records += len(block)
            self._rows += _rows(block)
        while self._records > MOST_RECORDS or self._rows > MOST_ROWS:
            gone = self._kept.popleft()
            self._records -= len(gone)
            self._rows -= _rows(gone)

    def _slot(self, at_ns: int) -> _Slot | None:
        """Return the slot of a time, or None if it is before the window."""
        number = at_ns // SLOT_NS
        slot = self._slots.get(number)
        if slot is None and number >= self._oldest:
            slot = self._slots[number] = _Slot()
        return slot

    def _take_sent(self, record: SentLine) -> None:
        edge = record.edge
        self._durations[edge, "serialise"].append(record.sent_ns - record.credit_ns)
        self._durations[edge, "credit"].append(record.credit_ns - record.ready_ns)
        if record.credit_ns > record.ready_ns:
            slot = self._slot(record.sent_ns)
            if slot is not None:
                slot.waited[edge] += 1

    def _take_done(self, actor: str, kind: str, record: DoneLine) -> None:
        self._newest_ns = max(self._newest_ns, record.finished_ns)
        self._first_ns = min(self._first_ns or record.started_ns, record.started_ns)
        slot = self._slot(record.finished_ns)
        if kind == DONE:
            wire_ns = record.received_ns - record.sent_ns
            self._durations[record.edge, "wire"].append(wire_ns)
            if slot is not None:
                slot.nbytes[record.edge] += record.nbytes
                slot.wires[record.edge].append(wire_ns)
        if actor == ME:
            self._note_answer(record)
        if not record.batch:
            return
        record = self._own_rows(actor, kind, record)
        step = self._open_step.setdefault(actor, [])
        if step and step[0][1].started_ns != record.started_ns:
            self._end_step(actor, step)
            self._open_step[actor] = step = []
        step.append((kind, record))
        if len(step) == record.batch:
            self._end_step(actor, step)
            self._open_step[actor] = []

    def _own_rows(self, actor: str, kind: str, record: DoneLine) -> DoneLine:
        """Return a record with the rows that went into its own step, without those that earlier steps took."""
        if kind != PART and not self._parts:
            return record
        key = done_key(actor, record)
        if kind == PART:
            if len(self._parts) >= MOST_RECORDS:  # their last steps were lost
                self._parts.clear()
            self._parts.setdefault(key, set()).update(record.rows)
            return record
        gone = self._parts.pop(key, None)
        return record if gone is None else record._replace(rows=tuple(row for row in record.rows if row not in gone))

    def _note_answer(self, record: DoneLine) -> None:
        session, _, position, _ = record.rows[-1]
        self._answers.append((session, position, record.finished_ns))

    def _end_step(self, actor: str, step: Sequence[tuple[str, DoneLine]]) -> None:
        """Count a step, and the parts of the messages whose last rows went into it."""
        complete_ns: dict[tuple[int, ...], int] = {}
        if len(step) > 1:
            for _, record in step:
                for row in record.rows:
                    complete_ns[row[:3]] = max(complete_ns.get(row[:3], 0), record.received_ns)
        durations, tokens = self._durations, 0
        for kind, record in step:
            received_ns = joined_ns = record.received_ns
            for row in record.rows:
                tokens += row[3]
                if complete_ns and complete_ns[row[:3]] > joined_ns:
                    joined_ns = complete_ns[row[:3]]
            if kind == PART:
                continue
            durations[record.edge, "join"].append(joined_ns - received_ns)
            durations[record.edge, "queue"].append(record.started_ns - joined_ns)
            durations[record.edge, "compute"].append(record.finished_ns - record.started_ns)
        _, first = step[0]
        spent_ns = first.finished_ns - first.started_ns
        own = self._steps.setdefault(actor, deque(maxlen=STEPS_SHOWN))
        own.append((first.started_ns, spent_ns, tokens, len(complete_ns) or len(first.rows)))
        slot = self._slot(first.finished_ns)
        if slot is not None:
            slot.busy_ns[actor] += spent_ns
            slot.steps[actor] += 1
            slot.tokens[actor] += tokens

    def _count(self) -> None:
        """Put the durations of a look into the histograms."""
        for (edge, part), durations in self._durations.items():
            if edge not in self._histograms:
                self._histograms[edge] = {part: Counter() for part in PARTS}
            self._histograms[edge][part].update(map(bucket, durations))
        self._durations.clear()

    # -- what is shown ----------------------------------------------------------------------------------------------

    def frame(self) -> dict[str, Any]:
        """Return the rates of the window for actors and edges, and the way of the newest token that is written down whole.

        Durations are in microseconds.
        """
        span_s = min(WINDOW_NS, max(self._newest_ns, self._now_ns() - SETTLED_NS) - self._first_ns) / 1e9 or 1.0
        actors, edges = self._steps.keys(), sorted(self._histograms)
        return {
            "actors": {name: self._actor(name, span_s) for name in actors},
            "edges": [self._edge(edge, span_s) for edge in edges],
            "token": self._newest_token(),
            "sample": min((h["sample"] for h in self._lines.heads.values()), default=1.0),
        }

    def _actor(self, name: str, span_s: float) -> dict[str, Any]:
        steps = sum(slot.steps[name] for slot in self._slots.values())
        tokens = sum(slot.tokens[name] for slot in self._slots.values())
        busy_s = sum(slot.busy_ns[name] for slot in self._slots.values()) / 1e9
        return {
            "steps_s": steps / span_s, "tokens_s": tokens / span_s, "batch": tokens / steps if steps else 0.0,
            "busy": min(1.0, busy_s / span_s),
        }  # fmt: skip

    def _edge(self, edge: int, span_s: float) -> dict[str, Any]:
        slots = self._slots.values()
        wires_ns = list(chain.from_iterable(slot.wires.get(edge, ()) for slot in slots))
        shares_ns = percentiles(wires_ns)
        return {
            "edge": edge, "name": self._name(edge), "messages_s": len(wires_ns) / span_s,
            "bytes_s": sum(slot.nbytes.get(edge, 0) for slot in slots) / span_s,
            "p50_us": _microseconds(shares_ns["p50"]), "p99_us": _microseconds(shares_ns["p99"]),
            "waited": min(1.0, sum(slot.waited.get(edge, 0) for slot in slots) / max(1, len(wires_ns))),
        }  # fmt: skip

    def _name(self, edge: int) -> str:
        return self._edges[edge] if edge < len(self._edges) else f"link {edge}"

    def _newest_token(self) -> dict[str, Any] | None:
        settled_ns = self._now_ns() - SETTLED_NS
        while len(self._answers) > 1 and self._answers[1][2] <= settled_ns:
            self._answers.popleft()
        if not self._answers or self._answers[0][2] > settled_ns:
            return self._token
        session, position, _ = self._answers[0]
        if self._token is None or (self._token["session"], self._token["position"]) != (session, position):
            with contextlib.suppress(TraceError):  # the gateway's record alone is there
                self._token = self.path([session], position, again=False)
        return self._token

    def edge(self, edge: int) -> dict[str, Any]:
        """Return the histograms of an edge's parts since the first look: [bucket's microseconds, messages]."""
        parts = self._histograms.get(edge, {})
        return {
            "edge": edge, "name": self._name(edge),
            "parts": {
                part: {
                    "messages": counts.total(), "p50_us": percentile(counts, 0.5), "p95_us": percentile(counts, 0.95),
                    "p99_us": percentile(counts, 0.99), "buckets": sorted(counts.items()),
                }
                for part, counts in parts.items()
            },
        }  # fmt: skip

    def steps(self, actor: str) -> list[dict[str, Any]]:
        """Return the last steps of an actor (`name.replica`), the newest last."""
        return [
            {"ms_ago": (self._newest_ns - started_ns) / 1e6, "ms": spent_ns / 1e6, "tokens": tokens, "rows": rows}
            for started_ns, spent_ns, tokens, rows in self._steps.get(actor, ())
        ]

    def path(self, sessions: Sequence[int], position: int, *, again: bool = True) -> dict[str, Any]:
        """Return the critical path of a token of one of the sessions, as `ranvier trace --why SESSION --position N` does.

        Args:
            sessions: the sessions that have worked on the request, which are more than one if its client came back.
            position: the position of the token.
            again: read the trace again if the token's records are not kept any more.

        Raises:
            TraceError: no record of this token is there.
        """
        trace, session = self._around(sessions, position)
        if session is None and again and self._answers and self._answers[-1][:2] < (max(sessions), position):
            raise NotYet("the trace has no record of this token yet")
        if session is None and again:
            size = sum(file.stat().st_size for file in (self._run_dir / "trace").glob("*.jsonl"))
            if size > MOST_BYTES:
                raise TraceError(
                    f"the token is too old, and the trace has {size >> 20} MiB; "
                    f"try `ranvier trace RUN --why {sessions[-1]} --position {position}`"
                )
            trace = read(self._run_dir)
            session = next((each for each in reversed(sessions) if _has(trace.done.get(ME, ()), each, position)), None)
        if session is None:
            raise NotYet("the trace has no record of this token yet")
        stretches = Causes(trace).critical_path(session, position)
        fresh = bool(stretches) and stretches[-1].ended_ns > self._now_ns() - SETTLED_NS
        if fresh and any(each.cause == "unknown" for each in stretches):
            raise NotYet("the records of this token are not all written yet")
        found = described(stretches)
        causes = [{**each, "words": CAUSES[each["cause"]]} for each in found["causes"]]
        return {"session": session, "position": position, **found, "causes": causes}

    def _around(self, sessions: Sequence[int], position: int) -> tuple[Trace, int | None]:
        """Return the kept records around a token, and its session; None if they are not kept."""
        trace = Trace(self._run_dir, self._edges)
        found = self._found(sessions, position)
        if found is None:
            return trace, None
        session, began_ns, ended_ns = found
        near = list(self._since(began_ns))
        sent_ns = min((record.sent_ns for _, _, kind, record in near if kind != SENT), default=began_ns)
        for at_ns, actor, kind, record in near if sent_ns >= began_ns else self._since(sent_ns):
            if kind == SENT:
                if at_ns <= ended_ns:
                    trace.sent.setdefault(actor, []).append(record)
            elif record.started_ns <= ended_ns:
                (trace.done if kind == DONE else trace.parts).setdefault(actor, []).append(record)
        for actor in trace.sent.keys() | trace.parts.keys():
            trace.done.setdefault(actor, [])
        return trace, session

    def _found(self, sessions: Sequence[int], position: int) -> tuple[int, int, int] | None:
        """Return a token's session, and when its path began and ended."""
        ended = None
        for block in reversed(self._kept):
            for at_ns, actor, kind, record in reversed(block):
                if actor != ME:
                    continue
                for session, _, at, _ in record.rows:
                    if session not in sessions:
                        continue
                    if ended is None and kind != SENT and at == position:
                        ended = session, at_ns
                    elif ended is not None and session == ended[0] and at < position:
                        return session, at_ns if kind != SENT else record.ready_ns, ended[1]
        return None

    def _since(self, from_ns: int) -> Iterator[Kept]:
        """Yield the kept records that ended at this time or later, the newest of each block first."""
        for block in reversed(self._kept):
            if block[-1][0] < from_ns - LATE_NS:
                return
            for kept in reversed(block):
                if kept[0] < from_ns:
                    break
                yield kept


def _ended_ns(kind: str, record: Any) -> int:
    ended_ns: int = record.sent_ns if kind == SENT else record.finished_ns
    return ended_ns


def _rows(block: Sequence[Kept]) -> int:
    return sum([len(record.rows) for _, _, _, record in block])


def _has(records: Sequence[DoneLine], session: int, position: int) -> bool:
    return any(row[0] == session and row[2] == position for record in records for row in record.rows)


def _microseconds(ns: float | None) -> float | None:
    return ns / 1e3 if ns is not None else None
