"""Write a timeline in the two formats that Perfetto opens: its own protobuf, and Chrome's JSON.

The `perfetto` package writes the protobuf. Specifications: Perfetto's TracePacket and TrackEvent
(protos/perfetto/trace), and the "Trace Event Format" document: complete events (X), flow events (s, f), counters (C)
and metadata (M). In JSON, times are microseconds since the first slice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..file.errors import RequestError
from .summary import Message
from .timeline import SENDS, STEPS, Slice, Timeline

SEQUENCE = 1
"""Sequence id of all packets: there is only one writer."""


def write(file: Path, timeline: Timeline) -> None:
    """Write JSON if the file name ends in .json, else protobuf.

    Raises:
        RequestError: the `perfetto` package is not installed.
    """
    if file.suffix == ".json":
        file.write_text(json.dumps(chrome(timeline)))
    else:
        file.write_bytes(protobuf(timeline))


def _numbers(timeline: Timeline) -> dict[Message, int]:
    """Assign a number to each message. Both ends of an arrow carry the number of its message."""
    messages = dict.fromkeys(message for one in timeline.slices for message in (*one.leaves, *one.arrives))
    return {message: number for number, message in enumerate(messages, 1)}


# -- protobuf -----------------------------------------------------------------------------------------------------


def protobuf(timeline: Timeline) -> bytes:
    """Return the timeline as Perfetto's protobuf.

    Raises:
        RequestError: the `perfetto` package is not installed.
    """
    try:
        from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TracePacket, TrackEvent
        from perfetto.trace_builder.proto_builder import TraceProtoBuilder
    except ImportError:
        raise RequestError(
            "Perfetto's protobuf needs the perfetto package; pip install 'ranvier[perfetto]', or name a .json file"
        ) from None
    builder: Any = TraceProtoBuilder()
    tracks = _tracks(builder, timeline)
    numbers = _numbers(timeline)

    def event(at_ns: int, kind: int, actor: str, track: str) -> Any:
        packet = builder.add_packet()
        packet.timestamp, packet.trusted_packet_sequence_id = at_ns, SEQUENCE
        packet.track_event.type, packet.track_event.track_uuid = kind, tracks[actor, track]
        return packet.track_event

    for kind, at_ns, one in _ordered(timeline):
        if kind == "end":
            event(at_ns, TrackEvent.TYPE_SLICE_END, one.actor, one.track)
            continue
        begun = event(at_ns, TrackEvent.TYPE_SLICE_BEGIN, one.actor, one.track)
        begun.name = one.name
        begun.categories.append("ranvier")
        begun.flow_ids.extend(numbers[message] for message in one.leaves)
        begun.terminating_flow_ids.extend(numbers[message] for message in one.arrives)
        for key, value in one.args.items():
            annotation = begun.debug_annotations.add()
            annotation.name = key
            setattr(annotation, {int: "int_value", float: "double_value", str: "string_value"}[type(value)], value)
    for (actor, name), values in timeline.counters.items():
        for at_ns, value in values:
            event(at_ns, TrackEvent.TYPE_COUNTER, actor, name).counter_value = value
    if builder.trace.packet:
        builder.trace.packet[0].sequence_flags = TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
    made: bytes = builder.serialize()
    return made


def _tracks(builder: Any, timeline: Timeline) -> dict[tuple[str, str], int]:
    """Describe a process for each actor, with its tracks. Return the number of each track, by actor and name."""
    tracks: dict[tuple[str, str], int] = {}
    for number, actor in enumerate(timeline.actors, 1):
        process = _described(builder, number << 16)
        process.process.pid, process.process.process_name = number, actor
        names = [STEPS, SENDS, *(name for owner, name in timeline.counters if owner == actor)]
        for index, name in enumerate(names, 1):
            tracks[actor, name] = (number << 16) + index
            track = _described(builder, tracks[actor, name])
            track.parent_uuid, track.name = number << 16, name
            if name not in (STEPS, SENDS):
                track.counter.unit_name = name
    return tracks


def _described(builder: Any, uuid: int) -> Any:
    packet = builder.add_packet()
    packet.trusted_packet_sequence_id = SEQUENCE
    packet.track_descriptor.uuid = uuid
    return packet.track_descriptor


def _ordered(timeline: Timeline) -> Iterator[tuple[str, int, Slice]]:
    """Yield begins and ends in order of time, so that the slices of a track nest.

    At the same time, ends come before begins. Of slices that begin together, the longest comes first.
    """
    made: list[tuple[tuple[int, int, int], str, Slice]] = []
    for one in timeline.slices:
        end_ns = max(one.end_ns, one.start_ns + 1)
        made.append(((one.start_ns, 1, -end_ns), "begin", one))
        made.append(((end_ns, 0, -one.start_ns), "end", one))
    made.sort(key=lambda each: each[0])
    for (at_ns, _, _), kind, one in made:
        yield kind, at_ns, one


# -- JSON ---------------------------------------------------------------------------------------------------------


def chrome(timeline: Timeline) -> dict[str, Any]:
    """Return the JSON object: `traceEvents`, with one process per actor."""
    begin_ns, numbers = timeline.begin_ns, _numbers(timeline)
    pids = {actor: pid for pid, actor in enumerate(timeline.actors, 1)}
    tids = {STEPS: 1, SENDS: 2}
    made: list[dict[str, Any]] = []
    for actor, pid in pids.items():
        made.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 1, "args": {"name": actor}})
        for track, tid in tids.items():
            made.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}})
    for one in timeline.slices:
        at = {"pid": pids[one.actor], "tid": tids[one.track], "ts": (one.start_ns - begin_ns) / 1e3}
        duration_us = max(one.end_ns - one.start_ns, 1) / 1e3
        made.append({"ph": "X", "name": one.name, "cat": "ranvier", "dur": duration_us, "args": dict(one.args), **at})
        # both ends of an arrow lie inside a slice of their track, and share an id
        for message in one.leaves:
            made.append(_arrow("s", message, numbers, timeline) | at)
        for message in one.arrives:
            made.append(_arrow("f", message, numbers, timeline) | at | {"bp": "e"})
    for (actor, name), values in timeline.counters.items():
        for at_ns, value in values:
            made.append({
                "ph": "C", "name": name, "pid": pids[actor], "tid": 1, "ts": (at_ns - begin_ns) / 1e3, "args": {"value": value}
            })  # fmt: skip
    return {"traceEvents": made, "displayTimeUnit": "ns"}


def _arrow(phase: str, message: Message, numbers: dict[Message, int], timeline: Timeline) -> dict[str, Any]:
    return {"ph": phase, "name": timeline.edges[message[0]], "cat": "message", "id": numbers[message]}
