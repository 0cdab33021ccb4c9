"""A trace as Chrome's trace-event JSON, which Perfetto opens: a track an actor, an arrow from each send to its receive.

Format: the "Trace Event Format" document; complete events (X), flow events (s, f) and metadata (M). Times are
microseconds of the machine's monotonic clock, counted from the first record.
"""

from __future__ import annotations

from typing import Any

from .trace import Message, Trace, done_key, sent_key


def events(trace: Trace) -> dict[str, Any]:
    """The JSON object: `traceEvents` with a process an actor."""
    times = [r.ready_ns for records in trace.sent.values() for r in records]
    times += [r.received_ns for records in trace.done.values() for r in records]
    begin = min(times, default=0)
    made: list[dict[str, Any]] = []
    actors = sorted({*trace.sent, *trace.done})
    arrived = {done_key(actor, r) for actor, records in trace.done.items() for r in records}
    args: dict[str, Any]
    for pid, actor in enumerate(actors, 1):
        made.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 1, "args": {"name": actor}})
        made.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": 1, "args": {"name": "step"}})
        steps: set[tuple[int, int]] = set()
        unused = [record for record in trace.done.get(actor, ()) if not record.batch]
        for done in (*trace.in_steps(actor), *unused):
            if (done.started_ns, done.finished_ns) not in steps:  # a step may hold several messages
                steps.add((done.started_ns, done.finished_ns))
                args = {"messages": done.batch, "tokens": sum(row[3] for row in done.rows)}
                name = "step" if done.batch else "went into no step"
                made.append(_slice(pid, name, done.started_ns, done.finished_ns, begin, args))
        for done in trace.done.get(actor, ()):
            made.append(_flow("f", pid, done_key(actor, done), done.started_ns, begin, trace))
        for sent in trace.sent.get(actor, ()):
            args = {
                "edge": trace.edges[sent.edge],
                "sequence": sent.sequence,
                "bytes": sent.nbytes,
                "rows": [list(row) for row in sent.rows],
                "credit_wait_us": (sent.credit_ns - sent.ready_ns) / 1e3,
            }
            made.append(_slice(pid, f"send {trace.edges[sent.edge]}", sent.credit_ns, sent.sent_ns, begin, args))
            if sent_key(actor, sent) in arrived:
                made.append(_flow("s", pid, sent_key(actor, sent), sent.credit_ns, begin, trace))
    return {"traceEvents": made, "displayTimeUnit": "ns"}


def _slice(pid: int, name: str, start_ns: int, end_ns: int, begin: int, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": "ranvier", "pid": pid, "tid": 1,
        "ts": (start_ns - begin) / 1e3, "dur": max(end_ns - start_ns, 1) / 1e3, "args": args,
    }  # fmt: skip


def _flow(phase: str, pid: int, message: Message, at_ns: int, begin: int, trace: Trace) -> dict[str, Any]:
    # an arrow's ends lie inside a slice of their track and are tied by the id
    event = {
        "ph": phase, "name": trace.edges[message[0]], "cat": "message", "id": ".".join(map(str, message)), "pid": pid, "tid": 1,
        "ts": (at_ns - begin) / 1e3,
    }  # fmt: skip
    return {**event, "bp": "e"} if phase == "f" else event
