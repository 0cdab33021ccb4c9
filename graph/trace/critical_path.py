"""Explain why a request took as long as it did, and why an actor was idle: each microsecond gets one cause.

Both answers come from one walk backwards in time. A step began when its last input arrived. Before that, the input was
on the wire; before that, it was at its sender, which made it in a step. Each interval on this way has one cause. The
parts add up to the whole because each begins where the one before it ends. A request is walked from its last message to
its first. An idle time is walked from the step that ended it back to the previous step.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ranvier.actors.protocol.host_spec import GATEWAY

from .summary import Trace, done_key, sent_key
from .trace_lines import DoneLine, TraceError

CAUSES = {
    "compute": "the actor computed on it",
    "busy": "it had been sent, and the actor computed on other messages",
    "sending": "it had been sent, and the actor tapped, encoded and sent earlier results",
    "handling": "it had arrived, and the actor handled messages, or let a batch fill",
    "wire": "it was on the wire",
    "serialise": "it was tapped, encoded and handed to the wire",
    "credit": "it was ready, and the receiver had given no credit for it",
    "output": "its step was over, and it was not yet ready to be sent",
    "gateway": "the gateway had the previous answer, and had not sent the next input",
    "recovery": "an actor was lost, and its session was being recovered",
    "client": "the client had not asked for it yet",
    "unknown": "a record is missing",
}
"""The causes that an interval of time can have, with the explanation that the tables print."""
ME = f"{GATEWAY}.0"


class Stretch(NamedTuple):
    """Represent an interval of time and its cause. `where` is an actor's `name.replica`, or the name of an edge."""

    cause: str
    where: str
    began_ns: int
    ended_ns: int

    @property
    def ns(self) -> int:
        """Return the length in nanoseconds."""
        return self.ended_ns - self.began_ns


@dataclass(slots=True)
class TracedStep:
    """Represent one step of one actor and the messages that went into it."""

    started_ns: int
    finished_ns: int
    inputs: list[DoneLine] = field(default_factory=list)

    def last_input(self, session: int | None) -> DoneLine:
        """Return the input that the step waited for: the one that completed a row.

        Only the session's rows count; without a session, all rows. Of several rows, the one that was complete first
        counts.
        """
        needed: dict[tuple[int, ...], DoneLine] = {}
        for record in self.inputs:
            for row in record.rows:
                if session is None or row[0] == session:
                    key = tuple(row[:3])
                    if key not in needed or record.received_ns > needed[key].received_ns:
                        needed[key] = record
        return min(needed.values() or self.inputs, key=lambda record: record.received_ns)


class Causes:
    """Walk backwards through one trace and name the cause of each interval."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._sent = {sent_key(actor, record): (actor, record) for actor, own in trace.sent.items() for record in own}
        self.steps = {actor: _steps(trace.in_steps(actor)) for actor in trace.done}
        """The steps of each actor, in the order in which they ended."""
        self._ends = {actor: [step.finished_ns for step in own] for actor, own in self.steps.items()}
        self._occupied = {actor: list(self._occupations(actor)) for actor in self.steps}
        """The intervals in which each actor received nothing, and what it did meanwhile. They are in order of time and
        do not overlap."""
        self._begins = {actor: [began_ns for began_ns, _, _ in own] for actor, own in self._occupied.items()}

    def _occupations(self, actor: str) -> Iterator[tuple[int, int, str]]:
        both = [(step.started_ns, step.finished_ns, "busy") for step in self.steps[actor]]
        both += [(record.credit_ns, record.sent_ns, "sending") for record in self._trace.sent.get(actor, ())]
        until_ns = 0
        for began_ns, ended_ns, cause in sorted(both):
            if ended_ns > until_ns:
                yield max(began_ns, until_ns), ended_ns, cause
                until_ns = ended_ns

    @property
    def sessions(self) -> list[int]:
        """Return the sessions for which the gateway has sent messages."""
        return sorted({row[0] for record in self._trace.sent.get(ME, ()) for row in record.rows})

    def critical_path(self, session: int, position: int | None = None) -> list[Stretch]:
        """Return the stretches from the session's first message to its last, in order of time.

        With a position, return those of the token at that position (`Token.position`): from the moment when the gateway
        had the token before it, or from the session's first message. The paths of all tokens add up to the whole.

        Raises:
            TraceError: there is no such session, or it got no answer at this position.
        """
        asked = [record for record in self._trace.sent.get(ME, ()) if any(row[0] == session for row in record.rows)]
        answered = [record for record in self._trace.done.get(ME, ()) if any(row[0] == session for row in record.rows)]
        if not answered or not (asked or position is not None):
            known = ", ".join(map(str, self.sessions)) or "none"
            what = "got no answer" if asked else f"is not in this trace; there are {known}"
            raise TraceError(f"{self._trace.run_dir}: session {session} {what}")
        last = max(answered, key=lambda record: record.finished_ns)
        began_ns = min((record.ready_ns for record in asked), default=0)
        if position is not None:
            last = self._answer_at(session, position, answered)
            before = (r.finished_ns for r in answered for row in r.rows if row[0] == session and row[2] < position)
            began_ns = max(before, default=began_ns)
        path = [Stretch("compute", ME, last.started_ns, last.finished_ns)]
        path += self._back(ME, last, began_ns, session)
        return [stretch for stretch in reversed(path) if stretch.ns]

    def _answer_at(self, session: int, position: int, answered: Sequence[DoneLine]) -> DoneLine:
        """Return the last answer for a position. There are several if logits or log-probabilities come, too."""
        own = [(row[2], record) for record in answered for row in record.rows if row[0] == session]
        there = [record for at, record in own if at == position]
        if not there:
            known = sorted(at for at, _ in own)
            raise TraceError(
                f"{self._trace.run_dir}: session {session} has no token at position {position}; "
                f"its tokens are at {known[0]} to {known[-1]}"
            )
        return max(there, key=lambda record: record.finished_ns)

    def idle(self, actor: str) -> list[Stretch]:
        """Return what an actor waited for between its steps, in order of time."""
        made: list[Stretch] = []
        ended_ns: int | None = None
        for step in self.steps[actor]:
            if ended_ns is not None and step.started_ns > ended_ns:
                made += reversed(list(self._back(actor, step.last_input(None), ended_ns, None)))
            ended_ns = max(ended_ns or 0, step.finished_ns)
        return [stretch for stretch in made if stretch.ns]

    # -- the walk -------------------------------------------------------------------------------------------------

    def _back(self, actor: str, record: DoneLine, until_ns: int, session: int | None) -> Iterator[Stretch]:
        """Yield the stretches from the beginning of a message's step back to a point in time."""
        at_ns = record.started_ns
        for cause, where, began_ns, _ in self._endless(actor, record, until_ns, session):
            yield Stretch(cause, where, max(began_ns, until_ns), at_ns)
            at_ns = began_ns
            if at_ns <= until_ns:
                return

    def _endless(self, actor: str, record: DoneLine, until_ns: int, session: int | None) -> Iterator[Stretch]:
        """Yield the stretches of `_back` without stopping at `until_ns`.

        Raises:
            TraceError: the trace is damaged: according to its records, a step waits for itself.
        """
        seen: set[tuple[str, int]] = set()
        while True:
            if (actor, record.started_ns) in seen:
                raise TraceError(f"{actor}: damaged: a step that began at {record.started_ns} waits for itself")
            seen.add((actor, record.started_ns))
            yield from self._queued(actor, record)
            edge = self._trace.edge(record.edge)
            found = self._sent.get(done_key(actor, record))
            if found is None:
                yield Stretch("unknown", edge, until_ns, record.received_ns)
                return
            sender, sent = found
            yield from self._on_its_way(actor, edge, sent.sent_ns, record.received_ns)
            yield Stretch("serialise", edge, sent.credit_ns, sent.sent_ns)
            yield Stretch("credit", edge, sent.ready_ns, sent.credit_ns)
            of = session if session is not None else sent.rows[0][0]
            before = self._made_by(sender, sent.ready_ns, of)
            if before is None:
                yield Stretch("client" if sender == ME else "unknown", sender, until_ns, sent.ready_ns)
                return
            cause = "output"
            if sender == ME:
                again = before.inputs[0].rows[0][1] != sent.rows[0][1]
                cause = "recovery" if again else "gateway"
            yield Stretch(cause, sender, before.finished_ns, sent.ready_ns)
            yield Stretch("compute", sender, before.started_ns, before.finished_ns)
            actor, record = sender, before.last_input(session)

    def _made_by(self, actor: str, ready_ns: int, session: int) -> TracedStep | None:
        """Return the last step that ended by `ready_ns`. At the gateway, only steps that involved the session count."""
        index = bisect.bisect_right(self._ends.get(actor, []), ready_ns) - 1
        while index >= 0:
            step = self.steps[actor][index]
            if actor != ME or any(row[0] == session for record in step.inputs for row in record.rows):
                return step
            index -= 1
        return None

    def _queued(self, actor: str, record: DoneLine) -> Iterator[Stretch]:
        """Yield the stretches from the beginning of a message's step back to the receipt of the message."""
        return self._beside_steps(actor, "handling", actor, record.received_ns, record.started_ns)

    def _on_its_way(self, actor: str, edge: str, sent_ns: int, received_ns: int) -> Iterator[Stretch]:
        """Yield the stretches from the receipt of a message back to its sending.

        An actor receives nothing while it computes or sends; meanwhile messages wait in the socket.
        """
        if received_ns < sent_ns:  # the clocks of two machines differ
            return iter([Stretch("wire", edge, sent_ns, received_ns)])
        return self._beside_steps(actor, "wire", edge, sent_ns, received_ns)

    def _beside_steps(self, actor: str, cause: str, where: str, from_ns: int, at_ns: int) -> Iterator[Stretch]:
        """Yield the stretches from `at_ns` back to `from_ns`.

        Their cause is `busy` while the actor took steps, `sending` while it sent, and `cause` otherwise.
        """
        index = bisect.bisect_left(self._begins.get(actor, []), at_ns) - 1
        while index >= 0:
            began_ns, ended_ns, did = self._occupied[actor][index]
            if ended_ns <= from_ns:
                break
            if ended_ns < at_ns:
                yield Stretch(cause, where, ended_ns, at_ns)
            yield Stretch(did, actor, max(began_ns, from_ns), min(ended_ns, at_ns))
            at_ns = max(began_ns, from_ns)
            index -= 1
        yield Stretch(cause, where, from_ns, at_ns)


def _steps(records: Iterable[DoneLine]) -> list[TracedStep]:
    found: dict[tuple[int, int], TracedStep] = {}
    for record in records:
        key = record.started_ns, record.finished_ns
        found.setdefault(key, TracedStep(*key)).inputs.append(record)
    return sorted(found.values(), key=lambda step: step.finished_ns)


def totals(stretches: Sequence[Stretch]) -> list[dict[str, Any]]:
    """Sum the stretches by cause and location: milliseconds, share, count, longest. The largest sum comes first."""
    whole = sum(stretch.ns for stretch in stretches)
    by: dict[tuple[str, str], list[int]] = defaultdict(list)
    for stretch in stretches:
        by[stretch.cause, stretch.where].append(stretch.ns)
    made = [
        {
            "cause": cause, "where": where, "ms": sum(own) / 1e6, "share": sum(own) / whole if whole else 0.0,
            "times": len(own), "longest_ms": max(own) / 1e6,
        }
        for (cause, where), own in by.items()
    ]  # fmt: skip
    return sorted(made, key=lambda each: -each["ms"])


def why(trace: Trace, session: int, position: int | None = None) -> dict[str, Any]:
    """Return the critical path of one request as plain data, or that of its token at a position."""
    return {
        "run_dir": str(trace.run_dir),
        "session": session,
        **({"position": position} if position is not None else {}),
        **described(Causes(trace).critical_path(session, position)),
    }


def described(path: Sequence[Stretch]) -> dict[str, Any]:
    """Return the stretches of a path as plain data: its length, the sums by cause, and each stretch."""
    began_ns = path[0].began_ns if path else 0
    return {
        "ms": sum(stretch.ns for stretch in path) / 1e6,
        "causes": totals(path),
        "path": [
            {"cause": each.cause, "where": each.where, "at_ms": (each.began_ns - began_ns) / 1e6, "ms": each.ns / 1e6}
            for each in path
        ],
    }


def idle(trace: Trace) -> dict[str, Any]:
    """Return what every actor waited for between its first step and its last, as plain data.

    Raises:
        TraceError: the trace holds records of only some sessions.
    """
    if trace.sample < 1:
        raise TraceError(
            f"{trace.run_dir}: has records of {trace.sample:.2%} of the sessions; idle times need all (trace: true)"
        )
    causes = Causes(trace)
    actors = []
    for actor, steps in causes.steps.items():
        if actor == ME or not steps:
            continue
        stretches = causes.idle(actor)
        idle_ns = sum(stretch.ns for stretch in stretches)
        known_ns = sum(stretch.ns for stretch in stretches if stretch.cause != "unknown")
        span_ns = steps[-1].finished_ns - min(step.started_ns for step in steps)
        actors.append({
            "actor": actor, "ms": span_ns / 1e6, "idle_ms": idle_ns / 1e6, "known": known_ns / idle_ns if idle_ns else 1.0,
            "causes": totals(stretches),
        })  # fmt: skip
    return {"run_dir": str(trace.run_dir), "actors": actors}
