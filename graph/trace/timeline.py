"""Turn a run into tracks over time: slices for steps and sends, arrows, and counters.

An arrow leads from each send to the step that its message went into. perfetto.py writes the result in two formats.
Times are nanoseconds of the machine's monotonic clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.transport.format.host_id import host_id, replica_id

from .summary import Message, Trace, done_key, sent_key
from .trace_lines import DoneLine

STEPS, SENDS = "step", "send"
QUEUE, BATCH, KV = "messages in queue", "tokens in batch", "positions in KV cache"


@dataclass(frozen=True, slots=True)
class Slice:
    """Represent one interval on a track.

    `leaves` and `arrives` are the arrows that begin and end here, each identified by its message.
    """

    actor: str
    track: str
    name: str
    start_ns: int
    end_ns: int
    args: Mapping[str, Any]
    leaves: tuple[Message, ...] = ()
    arrives: tuple[Message, ...] = ()


@dataclass(slots=True)
class Timeline:
    """Hold the slices and counters of a run.

    `counters` holds, by actor and name, pairs of a time and the value from then on, in order of time.
    """

    actors: list[str]
    slices: list[Slice]
    edges: list[str]
    counters: dict[tuple[str, str], list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def begin_ns(self) -> int:
        """Return when the first slice begins."""
        return min((one.start_ns for one in self.slices), default=0)


def timeline(trace: Trace) -> Timeline:
    """Return the timeline of a whole trace."""
    actors = sorted({*trace.sent, *trace.done})
    arrived = {done_key(actor, record) for actor, records in trace.done.items() for record in records}
    made = Timeline(actors, [], trace.edges)
    for actor in actors:
        made.slices += [*_steps(trace, actor), *_commands(trace, actor)]
        for sent in trace.sent.get(actor, ()):
            key = sent_key(actor, sent)
            name = trace.edge(sent.edge)
            args = {
                "edge": name, "sequence": sent.sequence, "bytes": sent.nbytes, "rows": str([list(row) for row in sent.rows]),
                "ready_to_credit_us": (sent.credit_ns - sent.ready_ns) / 1e3,
            }  # fmt: skip
            leaves = (key,) if key in arrived else ()
            made.slices.append(Slice(actor, SENDS, f"send {name}", sent.credit_ns, sent.sent_ns, args, leaves))
    _count(made, trace)
    return made


def _steps(trace: Trace, actor: str) -> Iterable[Slice]:
    """Yield one slice per step, with all its messages, and one per message that went into no step."""
    steps: dict[tuple[int, int, bool], list[DoneLine]] = defaultdict(list)
    ends: dict[tuple[int, int, bool], list[Message]] = defaultdict(list)
    for record in trace.in_steps(actor):
        steps[record.started_ns, record.finished_ns, True].append(record)
    for record in trace.done.get(actor, ()):
        key = record.started_ns, record.finished_ns, record.batch > 0
        if not record.batch:
            steps[key].append(record)
        ends[key].append(done_key(actor, record))
    for (started_ns, finished_ns, used), records in steps.items():
        rows = [row for record in records for row in record.rows]
        args = {
            "messages": records[0].batch,
            "tokens": sum(row[3] for row in rows),
            "rows": str([list(row) for row in rows]),
        }
        name = "step" if used else "went into no step"
        arrives = tuple(ends[started_ns, finished_ns, used])
        yield Slice(actor, STEPS, name, started_ns, finished_ns, args, (), arrives)


def _commands(trace: Trace, actor: str) -> Iterable[Slice]:
    """Yield one slice per command of the supervisor. An actor carries out commands between two steps."""
    for command in trace.commands.get(actor, ()):
        name = f"{command.verb} {command.session}" if command.session else command.verb
        args = {"epoch": command.epoch, "sent_to_started_us": (command.started_ns - command.sent_ns) / 1e3}
        yield Slice(actor, STEPS, name, command.started_ns, command.finished_ns, args)


def _count(made: Timeline, trace: Trace) -> None:
    planned = {edge["name"]: edge for edge in trace.plan["edges"]}
    caches = {host["actor"] for host in trace.plan["hosts"] if host["cache_bytes_per_token"]}
    used_ns = {
        # a feedback edge returns credit when the message is received
        done_key(actor, done): done.received_ns if planned[trace.edge(done.edge)]["feedback"] else done.finished_ns
        for actor, records in trace.done.items() for done in records
    }  # fmt: skip
    changes: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for actor, records in trace.done.items():
        for done in records:
            changes[actor, QUEUE] += [(done.received_ns, 1), (done.started_ns, -1)]
        if replica_id(actor).actor in caches:
            made.counters[actor, KV] = _positions(trace, actor)
    for one in made.slices:
        if one.track == STEPS and one.name == "step":
            changes[one.actor, BATCH] += [(one.start_ns, one.args["tokens"]), (one.end_ns, -one.args["tokens"])]
    for actor, sent_records in trace.sent.items():
        for sent in sent_records:
            key = actor, f"credits left: {trace.edge(sent.edge)} to {host_id(sent.target).file}"
            if key not in changes:
                changes[key].append((sent.credit_ns, planned[trace.edge(sent.edge)]["credits_messages"]))
            changes[key].append((sent.credit_ns, -1))
            end_ns = used_ns.get(sent_key(actor, sent))
            if end_ns is not None:
                changes[key].append((end_ns, 1))
    made.counters.update({key: _summed(each) for key, each in changes.items()})


def _positions(trace: Trace, actor: str) -> list[tuple[int, int]]:
    """Return how many positions the open sessions hold in an actor with layers, over time.

    A session is over when the gateway has finished its last message.
    """
    over: dict[int, int] = {}
    for other, records in trace.done.items():
        if replica_id(other).actor == GATEWAY:
            for record in records:
                for row in record.rows:
                    over[row[0]] = max(over.get(row[0], 0), record.finished_ns)
    held: dict[int, int] = {}
    changes = [(record.finished_ns, row[0], row[2] + row[3]) for record in trace.in_steps(actor) for row in record.rows]
    changes += [(at_ns, session, 0) for session, at_ns in over.items()]
    made = []
    for at_ns, session, length in sorted(changes):
        held[session] = length
        made.append((at_ns, sum(held.values())))
    return made


def _summed(changes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sum up changes: return pairs of a time and the value from then on."""
    by_time: dict[int, int] = defaultdict(int)
    for at_ns, change in changes:
        by_time[at_ns] += change
    value, made = 0, []
    for at_ns in sorted(by_time):
        value += by_time[at_ns]
        made.append((at_ns, value))
    return made
