"""Check life cycle, supervision, control messages and the trace's ring, without I/O and with times set by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranvier.actors.protocol.control_protocol import FIELDS, decode, encode
from ranvier.actors.protocol.host_spec import Deadlines, HostLink, HostSpec, PortSpec
from ranvier.actors.protocol.lifecycle import IllegalTransition, Lifecycle, State
from ranvier.actors.supervise.supervision import Supervision
from ranvier.actors.trace.ring import Ring
from ranvier.actors.trace.trace_file import DROPPED, TraceFile
from ranvier.transport.format.errors import ProtocolError
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
    link = LinkSpec(0, "a.x -> b.x", "a.0.1", "b.0.1", (("x", tensor),), 8, 1000)
    return HostSpec(
        actor=actor, replica=0, epoch=1, graph_hash="g", implementation="m:C", folder=None, args={"k": 1}, model=None,
        dtype="float32", layers=(0, 3), cache_tokens=5, threads=1, device="cpu", inputs=(PortSpec("x", tensor),),
        outputs=(), links=(HostLink("x", link, outgoing=actor == "a"),), endpoint="ipc:///a", control="ipc:///b",
        supervisor="ipc:///c", run_dir="/r", max_frame_bytes=10, batch_tokens=8, supervision=Deadlines(**deadlines),
    )  # fmt: skip


def test_a_host_spec_survives_json() -> None:
    """Restore an equal HostSpec from JSON."""
    assert HostSpec.from_plain(json.loads(json.dumps(spec("a").to_plain()))) == spec("a")


def running(*specs: HostSpec) -> Supervision:
    """Return a supervision whose hosts have all reported that they are ready and running."""
    supervision = Supervision(specs, 0.0)
    for each in specs:
        for state in ("loading", "ready", "running"):
            supervision.on_message(each.identity, "state", {"state": state, "why": ""}, 1.0)
        supervision.on_message(
            each.identity,
            "ready",
            {"address": f"ipc:///{each.actor}", "capacity_tokens": 7, "held_bytes": 3, "keeps": "nothing"},
            1.0,
        )
    return supervision


def beat(supervision: Supervision, key: str, now_s: float, stepping_s: float = 0.0) -> None:
    """Send a heartbeat of the host `key` to the supervision."""
    fields = {"steps": 1, "stepping_s": stepping_s, "queued": 0, "counters": {}}
    supervision.on_message(key, "heartbeat", fields, now_s)


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
            supervision.on_message("a.0.1", "state", {"state": state, "why": ""}, 2.0)
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


GOOD: dict[str, dict[str, Any]] = {
    "heartbeat": {"steps": 1, "stepping_s": 0.5, "queued": 0, "counters": {"gap": 2}},
    "stop": {"sent_ns": 5},
}


@pytest.mark.parametrize("kind", GOOD)
def test_control_messages_come_back(kind: str) -> None:
    """Decode a control message to what was encoded."""
    assert decode(encode(kind, GOOD[kind])) == (kind, GOOD[kind])


@given(st.binary(max_size=200))
def test_no_bytes_break_the_control_protocol(data: bytes) -> None:
    """Raise ProtocolError, and nothing else, for any invalid bytes."""
    with pytest.raises(ProtocolError):
        decode(data + b"\xc1")  # MessagePack never uses 0xc1, so no such message is valid


@given(
    st.sampled_from(sorted(FIELDS)),
    st.dictionaries(st.sampled_from(["session", "epoch", "x"]), st.none() | st.text(), max_size=3),
)
def test_ill_typed_fields_are_refused(kind: str, fields: dict[str, Any]) -> None:
    """Refuse a control message with missing, unknown or ill-typed fields."""
    if kind in ("why", "status") and not fields:
        return
    with pytest.raises(ProtocolError):
        decode(msgpack.packb([kind, fields]))


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
