"""Check life cycle, supervision, control messages and the trace's ring, without I/O and with times set by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranvier.actors.component.session import Sampling, SessionInfo
from ranvier.actors.errors import Cause
from ranvier.actors.protocol.control_protocol import (
    Alarm,
    Answer,
    AskStatus,
    AskTime,
    AskWhy,
    Close,
    Connect,
    Counters,
    Done,
    Explain,
    Failed,
    Heartbeat,
    Hold,
    HostMessage,
    Link,
    Linked,
    Message,
    Open,
    Progress,
    Ready,
    Refused,
    Request,
    Saved,
    Scale,
    SessionFailed,
    Situation,
    StateChanged,
    StepCommand,
    Stop,
    Time,
    Unlink,
    Wrong,
    decode,
    encode,
    for_client,
    for_host,
    for_supervisor,
)
from ranvier.actors.protocol.host_spec import Deadlines, HostLink, HostSpec, PortSpec
from ranvier.actors.protocol.lifecycle import IllegalTransition, Lifecycle, State
from ranvier.actors.protocol.training_spec import TrainingLink
from ranvier.actors.supervise.supervision import Supervision
from ranvier.actors.trace.ring import Ring
from ranvier.actors.trace.trace_file import DROPPED, TraceFile
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.host_id import host_id
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links.link import LinkSpec


def test_a_life_goes_forward_and_tells_its_story() -> None:
    """Refuse a transition back, and list all states so far in the error."""
    life = Lifecycle("lower.0")
    for state in (State.LOADING, State.READY, State.RUNNING):
        life.to(state)
    with pytest.raises(IllegalTransition) as caught:
        life.to(State.LOADING)
    assert str(caught.value) == (
        "lower.0: starting -> loading -> ready -> running -> loading: may only be draining, failed, stopped next"
    )
    life.to(State.FAILED, "signal 9")
    assert life.over
    with pytest.raises(IllegalTransition, match=r"failed \(signal 9\) -> running: may only be nothing next"):
        life.to(State.RUNNING)


@given(st.lists(st.sampled_from(State), max_size=12))
def test_no_sequence_leads_out_of_an_end(states: list[State]) -> None:
    """Never leave a final state, and reach running only from ready, whatever transitions are tried."""
    life = Lifecycle("x")
    for state in states:
        try:
            life.to(state)
        except IllegalTransition:
            continue
    reached = [state for state, _ in life.story]
    if State.RUNNING in reached:
        assert reached[: reached.index(State.RUNNING)] == [State.STARTING, State.LOADING, State.READY]
    assert all(state not in (State.STOPPED, State.FAILED) for state in reached[:-1])


def spec(actor: str, **deadlines: float) -> HostSpec:
    """Return the spec of a small host with these deadlines."""
    tensor = TensorSpec("float32", ("tokens", 4))
    link = LinkSpec(0, "a.x -> b.x", host_id("a.0.1"), host_id("b.0.1"), (("x", tensor),), 8, 1000)
    return HostSpec(
        actor=actor, replica=0, epoch=1, graph_hash="g", implementation="m:C", folder=None, args={"k": 1}, model=None,
        dtype="float32", layers=(0, 3), cache_tokens=5, threads=1, device="cpu", inputs=(PortSpec("x", tensor),),
        outputs=(), links=(HostLink("x", link, outgoing=actor == "a"),), endpoint="ipc:///a", control="ipc:///b",
        supervisor="ipc:///c", run_dir="/r", max_frame_bytes=10, batch_tokens=8, supervision=Deadlines(**deadlines),
    )  # fmt: skip


def test_a_host_spec_survives_and_wrong_types_are_refused() -> None:
    """Restore an equal HostSpec from JSON."""
    made = spec("a")
    plain = msgpack.unpackb(msgpack.packb(msgspec.to_builtins(made)))
    assert msgspec.convert(plain, HostSpec) == made
    assert msgspec.json.decode(msgspec.json.encode(made), type=HostSpec) == made
    for name, value in (("layers", [0, "three"]), ("cache_tokens", "many"), ("links", [{"port": "x"}])):
        with pytest.raises(msgspec.ValidationError, match=name):
            msgspec.convert({**plain, name: value}, HostSpec)


def running(*specs: HostSpec) -> Supervision:
    """Return a supervision whose hosts have all reported that they are ready and running."""
    supervision = Supervision(specs, 0.0)
    for each in specs:
        for state in ("loading", "ready", "running"):
            supervision.on_message(each.identity, StateChanged(state), 1.0)
        supervision.on_message(each.identity, Ready(f"ipc:///{each.actor}", 7, 3, "nothing"), 1.0)
    return supervision


def beat(supervision: Supervision, key: str, now_s: float, stepping_s: float = 0.0) -> None:
    """Send a heartbeat of the host `key` to the supervision."""
    supervision.on_message(key, Heartbeat(1, stepping_s, 0, {}), now_s)


def test_everyone_ready_then_running() -> None:
    """Report when all hosts are loaded and running, their capacity, and their neighbours' addresses."""
    supervision = running(spec("a"), spec("b"))
    assert supervision.all_loaded
    assert supervision.all_running
    assert supervision.capacity_tokens == 7
    assert supervision.neighbours(spec("a").links, "gateway.0.1", "ipc:///g") == {"b.0.1": "ipc:///b"}


def test_silence_is_failure_and_a_slow_host_is_not() -> None:
    """Keep a host that sends heartbeats, however slow it is.

    Fail a host that sends none at its deadline, and not before."""
    supervision = running(spec("a", heartbeat_deadline_s=5.0), spec("b", heartbeat_deadline_s=5.0))
    for now_s in range(2, 20):
        beat(supervision, "a.0.1", float(now_s), stepping_s=now_s - 1.0)
        if now_s <= 10:
            beat(supervision, "b.0.1", float(now_s))
        supervision.on_tick(float(now_s))
        assert (supervision.failure is not None) == (now_s > 15)
    assert "actor b.0: no heartbeat for 6.0 s (limit 5.0 s)" in str(supervision.failure)


def test_one_step_over_the_deadline_is_a_hang() -> None:
    """Report that a host hangs once one step takes longer than its progress deadline."""
    supervision = running(spec("a", progress_deadline_s=3.0))
    beat(supervision, "a.0.1", 2.0, stepping_s=2.9)
    supervision.on_tick(2.0)
    assert supervision.failure is None
    beat(supervision, "a.0.1", 3.0, stepping_s=3.1)
    supervision.on_tick(3.0)
    assert "actor a.0: in one step for 3.1 s (limit 3.0 s): hung" in str(supervision.failure)


def test_a_state_that_cannot_be_is_refused() -> None:
    """Refuse an unknown or impossible state of a host, without failing the run."""
    supervision = running(spec("a"))
    for state, words in (("flying", "'flying' is not a valid State"), ("loading", "running -> loading")):
        with pytest.raises(ProtocolError, match=words):
            supervision.on_message("a.0.1", StateChanged(state), 2.0)
    assert supervision.failure is None


def test_the_first_failure_is_the_reason() -> None:
    """Name the host that failed first. When one host dies, its neighbours follow."""
    supervision = running(spec("a"), spec("b"))
    supervision.on_exit("b.0.1", -9, "", 2.0)
    supervision.on_exit("a.0.1", 1, "Traceback", 2.0)
    assert str(supervision.failure) == "actor b.0: its process was ended by signal 9 while running"


def test_an_end_that_was_asked_for_is_no_failure() -> None:
    """Report no failure while the run stops its hosts."""
    supervision = running(spec("a"))
    supervision.stopping = True
    supervision.on_exit("a.0.1", -9, "", 2.0)
    supervision.on_tick(1e6)
    assert supervision.failure is None


SIDES = {"supervisor": for_supervisor, "host": for_host, "client": for_client}
LINK = LinkSpec(
    0, "a.x -> b.x", host_id("a.0.1"), host_id("b.0.1"), (("x", TensorSpec("float32", ("tokens", 4))),), 4, 1 << 20
)
GOOD: dict[str, list[Message]] = {
    "supervisor": [
        StateChanged("ready", "because"), Progress(0.5), Ready("ipc:///a", None, 3, "nothing"), Heartbeat(1, 0.5, 0, {"gap": 2}),
        Counters({"gap": 1}), Linked("b.0.1"), SessionFailed(1, 2, "E", "T", Cause.LATE), Refused("what"),
        Alarm("a.x -> b.x", 1, 2, 0.5, 7), Saved(3), Failed("E", "T"), Situation(1, {"steps": 2}), Time(1, 2, 3),
        Scale("a", 2), AskWhy(), AskStatus(),
    ],
    "host": [
        Connect({"b.0.1": "ipc:///b"}, (HostLink("x", LINK, outgoing=True),), (TrainingLink("output", "x", LINK, True),), "a.0"),
        Open(SessionInfo(1, 1, 9, log=(3, 4), sampling=Sampling(temperature=0.5), replicas={"a": (0, 1)})), Hold(1), Close(1),
        Link("b.1.1", "ipc:///b", (HostLink("x", LINK, outgoing=False),)), Unlink("b.1.1"), Stop(), Explain(4), AskTime(),
    ],
    "client": [Done("what"), Wrong("why")],
}  # fmt: skip


@pytest.mark.parametrize("side", GOOD)
def test_control_messages_come_back_and_only_their_side_takes_them(side: str) -> None:
    """Give every message back as it was; the other sides refuse it. The msgpack package reads the same bytes."""
    for message in GOOD[side]:
        data = encode(message)
        assert decode(data, SIDES[side]) == message
        assert msgpack.unpackb(data)["kind"] == message.kind
        for other in SIDES.keys() - {side}:
            with pytest.raises(ProtocolError, match="expected a message of this side"):
                decode(data, SIDES[other])


def test_every_kind_of_message_is_tested() -> None:
    kinds = {
        each for union in (HostMessage, Request, StepCommand | Explain | AskTime, Answer) for each in get_args(union)
    }
    assert kinds == {type(message) for messages in GOOD.values() for message in messages}


@given(st.binary(max_size=200), st.sampled_from(sorted(SIDES)))
def test_no_bytes_break_the_control_protocol(data: bytes, side: str) -> None:
    with pytest.raises(ProtocolError):
        decode(data + b"\xc1", SIDES[side])  # 0xc1 is never valid, so this never is


@given(
    st.sampled_from(sorted({message.kind for messages in GOOD.values() for message in messages})),
    st.dictionaries(st.sampled_from(["session", "epoch", "x"]), st.none() | st.text(), min_size=1, max_size=3),
)
def test_ill_typed_and_unknown_fields_are_refused(kind: str, fields: dict[str, Any]) -> None:
    for decoder in SIDES.values():
        with pytest.raises(ProtocolError):
            decode(msgpack.packb({"kind": kind, **fields}), decoder)


def test_the_ring_drops_and_counts_when_it_is_full() -> None:
    """Drop and count new records while the ring is full, and accept only powers of two as its size."""
    ring = Ring(4)
    for number in range(6):
        ring.put((number,))
    assert ring.dropped == 2
    assert ring.take(3) == [(0,), (1,), (2,)]
    ring.put((9,))
    assert ring.take(10) == [(3,), (9,)]
    assert ring.take(10) == []
    with pytest.raises(ValueError, match="power of two"):
        Ring(5)


def test_a_trace_that_cannot_be_written_costs_records_and_nothing_else_case_49(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lose only records while the disk is full (case 49).

    Once there is room again, the trace file says how many were lost."""
    (tmp_path / "trace").mkdir()
    with TraceFile(tmp_path, "a.0") as file:
        file.write([("sent", 1)], 0)

        class Full:
            """Stand in for a file on a disk that takes `room` more bytes and is then full."""

            def __init__(self, real: Any, room: int) -> None:
                self.real, self.room = real, room

            def write(self, data: bytes) -> int:
                if not self.room:
                    raise OSError(28, "No space left on device")
                took, self.room = data[: self.room], 0
                return int(self.real.write(took))

            def __getattr__(self, name: str) -> Any:
                return getattr(self.real, name)

        real, file._file = file._file, Full(file._file, 7)  # type: ignore[assignment]
        assert file.write([("sent", 2)], 0) == 1
        assert file.write([("sent", 3)], 0) == 1
        file._file = real
        file.write([("sent", 4)], 1)
    lines = [json.loads(line) for line in (tmp_path / "trace" / "a.0.jsonl").read_text().splitlines()]
    assert lines[1:] == [["sent", 1], ["sent", 4], [DROPPED, 3]]
