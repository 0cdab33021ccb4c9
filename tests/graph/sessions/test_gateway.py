"""Check the gateway without a process: admission, order, no repetition, exactly one end, and everything returned."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from ranvier.actors.component.session import SessionInfo
from ranvier.actors.errors import ActorFailed, Cause, Overloaded
from ranvier.actors.protocol.control_protocol import Open, SessionFailed
from ranvier.actors.protocol.host_spec import HostLink
from ranvier.graph.sessions.gateway import Gateway
from ranvier.graph.sessions.placement import Placement
from ranvier.graph.sessions.stream import Delivered, Stream
from ranvier.graph.sessions.wire_rows import token_tensor
from ranvier.transport.format.header import Header, Row, TensorMeta
from ranvier.transport.format.host_id import host_id
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.links.link_state import Received

ME, EMBED, HEAD = "gateway.0.1", "embed.0.1", "head.0.1"
LINKS = [
    LinkSpec(0, "in", host_id(ME), host_id(EMBED), (("token", TensorSpec("int64", ("tokens",))),), 8, 1 << 20),
    LinkSpec(1, "out", host_id(HEAD), host_id(ME), (("sampled", TensorSpec("int64", ("rows",))),), 8, 1 << 20),
    LinkSpec(2, "logits", host_id(HEAD), host_id(ME), (("logits", TensorSpec("float32", ("rows", 2))),), 8, 1 << 20),
]


class Bench:
    """Hold a gateway between two actors that are never started."""

    def __init__(self, capacity: int | None = 100, chunk: int = 4) -> None:
        self.exchange = Exchange(ME, "g", LINKS, lambda: 0)
        for link in self.exchange.sending.values():
            link.open = True
            link.window.grant(1000, 1 << 30)
        placement = Placement()
        for actor in ("embed", "head"):
            placement.join(actor, 0, capacity)
        links = [HostLink(link.tensors[0][0], link, outgoing=str(link.source) == ME) for link in LINKS]
        self.gateway = Gateway(self.exchange, links, placement, chunk)

    def submit(self, prompt: int = 3, tokens: int = 2, **options: Any) -> Stream:
        """Submit a session with a prompt of `prompt` tokens."""
        info = SessionInfo(0, 0, prompt + tokens, tuple(range(prompt)), tokens, **options)
        return self.gateway.submit(info)

    def told(self, rows: list[Row], tokens: list[int]) -> None:
        """Deliver a message with sampled tokens from the head."""
        self.message(1, rows, TensorMeta("sampled", 5, (len(rows),), 0, 8 * len(rows)), array("q", tokens).tobytes())

    def message(self, edge: int, rows: list[Row], meta: TensorMeta, data: bytes) -> None:
        """Deliver a message from the head on this edge."""
        link = self.exchange.receiving[edge, HEAD]
        header = Header(1, 0, edge, link.window.received + 1, tuple(rows), (meta,), 0, 0, 0)
        link.window.received += 1
        self.gateway.on_message(Received(link, header, (data,), len(data), 0))


def row_of(stream: Stream) -> Row:
    """Return a row of the stream's session and epoch."""
    return Row(stream.info.session, stream.info.epoch, 0, 1)


def test_a_session_is_opened_and_its_prompt_goes_in_chunks() -> None:
    """Open a session at its hosts, and send its prompt in chunks without waiting for them.

    A host keeps rows that arrive before the command."""
    bench = Bench()
    stream = bench.submit(prompt=10)
    assert [(command.kind, hosts) for command, hosts in bench.gateway.commands] == [("open", ["embed.0", "head.0"])]
    assert len(bench.exchange.outbox) == 3
    assert not stream.events


def test_each_position_once_and_in_order_then_one_end() -> None:
    """Deliver each position once and in order, then one end.

    Tokens arrive twice, out of order, of another epoch, and after the end."""
    bench = Bench()
    stream = bench.submit(prompt=3, tokens=2)
    for row in (Row(1, 1, 4, 1), Row(1, 2, 3, 1), Row(9, 1, 3, 1)):
        bench.told([row], [50])
    bench.told([Row(1, 1, 3, 1)], [60])
    bench.told([Row(1, 1, 3, 1)], [61])
    bench.told([Row(1, 1, 4, 1)], [70])
    bench.told([Row(1, 1, 5, 1)], [80])
    assert list(stream.events) == [Delivered(3, 60), Delivered(4, 70), "length"]
    assert stream.log == [0, 1, 2, 60, 70]
    assert bench.exchange.counters["tokens_refused"] == 5
    assert [command.kind for command, _ in bench.gateway.commands] == ["open", "close"]


def test_a_stop_token_ends_the_stream() -> None:
    """End the stream at a stop token."""
    bench = Bench()
    stream = bench.submit(tokens=5, stop_tokens=(60,))
    bench.told([Row(1, 1, 3, 1)], [60])
    assert list(stream.events) == [Delivered(3, 60), "stop"]


@pytest.mark.parametrize("first", ["token", "logits"])
def test_logits_and_token_are_delivered_together(first: str) -> None:
    """Deliver a token and its logits together.

    They arrive on two edges, in either order. Two sessions that share a message each get their own row."""
    bench = Bench()
    streams = [bench.submit(tokens=1, logits=True), bench.submit(tokens=1, logits=True)]
    rows = [Row(1, 1, 3, 1), Row(2, 1, 3, 1)]
    data = array("f", [1, 2, 3, 4]).tobytes()
    for what in ("token", "logits") if first == "token" else ("logits", "token"):
        if what == "token":
            bench.told(rows, [60, 61])
        else:
            bench.message(2, rows, TensorMeta("logits", 8, (2, 2), 0, 16), data)
    assert list(streams[0].events) == [Delivered(3, 60, data[:8]), "length"]
    assert list(streams[1].events) == [Delivered(3, 61, data[8:]), "length"]


def test_what_does_not_fit_is_turned_away_at_the_door() -> None:
    """Refuse a session that does not fit.

    Room is reserved for a whole session, and returned when it ends, however it ends."""
    bench = Bench(capacity=12)
    first, second = bench.submit(), bench.submit()
    with pytest.raises(Overloaded, match="needs 5 tokens of KV cache, 2 of 12 are free"):
        bench.submit()
    bench.gateway.cancel(first)
    bench.gateway.cancel(first)
    third = bench.submit()
    failed = SessionFailed(second.info.session, 1, "boom", "T", Cause.RAISED)
    bench.gateway.on_session_failed("head.0", failed)
    bench.gateway.on_session_failed("embed.0", failed)
    [error] = second.events
    assert isinstance(error, ActorFailed)
    assert (error.actor, error.session, error.remote_traceback) == ("head.0", 2, "T")
    bench.gateway.on_lost(row_of(third), ValueError("refused"))
    bench.gateway.on_lost(row_of(third), ValueError("again"))
    assert [str(event) for event in third.events] == ["refused"]
    bench.submit(prompt=10, tokens=2)


def test_a_lost_run_ends_every_stream_and_takes_no_more() -> None:
    """End every stream with the first failure of the run, and refuse new sessions."""
    bench = Bench()
    streams = [bench.submit() for _ in range(3)]
    failure = ActorFailed("lower.0", "signal 9", Cause.DIED)
    bench.gateway.on_failure(failure)
    bench.gateway.on_failure(ActorFailed("upper.0", "later", Cause.DIED))
    assert [list(stream.events) for stream in streams] == [[failure]] * 3
    with pytest.raises(ActorFailed, match="lower.0"):
        bench.submit()


def test_token_tensors_need_no_torch() -> None:
    """Encode token ids as int64 without torch."""
    meta, data = token_tensor([1, 2**40])
    assert (meta.shape, meta.nbytes, len(data)) == ((2,), 16, 16)
    assert array("q", data).tolist() == [1, 2**40]


def test_what_waits_for_credit_goes_with_its_session() -> None:
    """Drop messages that wait for credit when their session is cancelled.

    Messages that were sent stay until they are acknowledged."""
    bench = Bench()
    [link] = bench.exchange.sending.values()
    link.window.sequence_limit = 1
    first, second = bench.submit(prompt=3), bench.submit(prompt=3)
    assert (len(bench.exchange.outbox), bench.exchange.waiting) == (1, 1)
    bench.gateway.cancel(first)
    assert bench.exchange.waiting == 1
    bench.gateway.cancel(second)
    assert (len(bench.exchange.outbox), bench.exchange.waiting) == (1, 0)


def test_a_stream_that_nobody_works_on_ends() -> None:
    """End a stream that began before all actors became idle, and keep one that began later."""
    bench = Bench()
    before = bench.submit()
    bench.exchange.clock = lambda: 100
    after = bench.submit()
    bench.gateway.on_quiet(50, 60.0)
    assert not after.over
    [error] = before.events
    assert "every actor has been idle for 60 s: expected a token at position 3, got nothing" in str(error)


def opened(bench: Bench) -> list[SessionInfo]:
    """Return the infos of sessions that the gateway opens at hosts, and clear its commands."""
    told = [command.info for command, _ in bench.gateway.commands if isinstance(command, Open)]
    bench.gateway.commands.clear()
    return told


LOST = ActorFailed("embed.0", "its process was ended by signal 9 while running", Cause.DIED)


def test_a_session_begins_anew_from_its_log_and_what_is_late_is_refused() -> None:
    """Open a session again from its log after a loss, and refuse late tokens.

    Each position is delivered once and in order through two losses. The tokens left to generate become fewer, and the
    epoch grows."""
    bench = Bench()
    stream = bench.submit(prompt=3, tokens=4)
    bench.told([Row(1, 1, 3, 1)], [60])
    assert [info.epoch for info in opened(bench)] == [1]
    for epoch, token in ((2, 61), (3, 62)):
        bench.gateway.on_lost_replica("embed", 0, LOST)
        assert [(command.kind, hosts) for command, hosts in bench.gateway.commands] == [("close", ["head.0"])]
        late = Row(1, epoch - 1, 3 + epoch - 1, 1)
        bench.told([late], [99])
        bench.gateway.on_session_failed("head.0", SessionFailed(1, epoch - 1, "late", "", Cause.RAISED))
        bench.gateway.on_replaced("embed", 0, 0)
        [info] = opened(bench)
        assert (info.epoch, list(info.log), info.max_tokens) == (epoch, stream.log, 7 - len(stream.log))
        bench.told([late], [99])
        bench.told([Row(1, epoch, 2 + epoch, 1)], [token])
    bench.told([Row(1, 3, 6, 1)], [63])
    assert list(stream.events) == [*(Delivered(position, 57 + position) for position in range(3, 7)), "length"]
    assert bench.exchange.counters["tokens_refused"] == 4
    assert bench.exchange.counters["sessions_replayed"] == 2


def test_who_comes_while_an_actor_is_away_waits_and_opens_after_those_before() -> None:
    """Let a session that begins while an actor is away wait, and open it after earlier ones.

    Hosts keep rows that arrive before their session by (epoch, session), so sessions must open in that order."""
    bench = Bench()
    bench.submit()
    bench.gateway.on_lost_replica("head", 0, LOST)
    waiting = bench.submit()
    assert not bench.exchange.waiting
    opened(bench)
    bench.gateway.on_quiet(50, 60.0)
    assert not waiting.over
    bench.gateway.on_replaced("head", 0, 0)
    bench.submit()
    assert [(info.epoch, info.session) for info in opened(bench)] == [(2, 1), (2, 2), (2, 3)]


def test_a_session_whose_log_is_ahead_of_its_logits_computes_them_again() -> None:
    """Compute logits again if the log of a session is ahead of them."""
    bench = Bench()
    stream = bench.submit(tokens=2, logits=True)
    bench.told([Row(1, 1, 3, 1)], [60])
    assert not stream.events
    opened(bench)
    bench.gateway.on_lost_replica("head", 0, LOST)
    bench.gateway.on_replaced("head", 0, 0)
    [info] = opened(bench)
    assert (list(info.log), info.max_tokens) == ([0, 1, 2], 2)
    for position in (3, 4):
        bench.told([Row(1, 2, position, 1)], [57 + position])
        bench.message(2, [Row(1, 2, position, 1)], TensorMeta("logits", 8, (1, 2), 0, 8), bytes(8))
    assert list(stream.events) == [Delivered(3, 60, bytes(8)), Delivered(4, 61, bytes(8)), "length"]


def test_a_session_that_loses_its_actors_again_and_again_ends_and_the_others_go_on() -> None:
    """End a session that loses its actors 4 times in a row, and continue the other sessions.

    It is blamed for the losses. A session that makes progress between losses is not."""
    bench = Bench()
    poison, good = bench.submit(), bench.submit(tokens=9)
    for epoch in (1, 2, 3, 4):
        bench.told([Row(2, epoch, 2 + epoch, 1)], [60])
        bench.gateway.on_lost_replica("embed", 0, LOST)
        bench.gateway.on_replaced("embed", 0, 0)
    [error] = poison.events
    assert isinstance(error, ActorFailed)
    assert (error.actor, error.session) == ("embed.0", 1)
    assert "session 1: its process was ended by signal 9 while running; that happened 4 times in a row" in str(error)
    assert not good.over
    assert good.delivered == 4


def test_a_session_moves_to_a_replica_that_has_room_and_waits_where_none_has() -> None:
    """Move a session to a replica that has room, and let it wait if none has."""
    bench = Bench(capacity=None)
    bench.gateway.placement.replicas["head"][0].capacity_tokens = 12
    bench.gateway.placement.join("head", 1, 6)
    first, second = bench.submit(), bench.submit()
    assert [first.replicas["head"], second.replicas["head"]] == [(0,), (1,)]
    third = bench.submit()
    assert third.replicas["head"] == (0,)
    opened(bench)
    bench.gateway.placement.replicas["head"][1].capacity_tokens = 11
    bench.gateway.on_lost_replica("head", 0, LOST)
    assert [(info.session, info.replicas) for info in opened(bench)] == [(1, {"head": (1,)})]
    assert (first.replicas["head"], third.replicas["head"]) == ((1,), (0,))
    assert third.waits
    bench.gateway.placement.join("head", 2, 12)
    bench.gateway.on_replaced("head", 0, 2)
    assert [(info.session, info.replicas) for info in opened(bench)] == [(3, {"head": (2,)})]
    assert set(bench.gateway.placement.replicas["head"]) == {1, 2}


def test_a_deadline_ends_a_stream_that_waits_too() -> None:
    """End a stream at its deadline and not before, even while an actor is away.

    A stream that has ended has no deadline any more."""
    bench = Bench()
    info = SessionInfo(0, 0, 5, (1, 2, 3), 2)
    soon, later = bench.gateway.submit(info, None, 100), bench.gateway.submit(info, None, 200)
    assert bench.gateway.due_ns == 100
    bench.gateway.on_lost_replica("head", 0, LOST)
    bench.gateway.on_due(99)
    assert not soon.over
    bench.gateway.on_due(100)
    [error] = soon.events
    assert str(error) == "session 1: deadline exceeded, 0 of 2 tokens delivered"
    assert (bench.gateway.due_ns, later.over) == (200, False)
    bench.gateway.cancel(later)
    assert bench.gateway.due_ns is None


def test_only_those_inside_the_step_are_blamed_and_suspects_are_tried_one_at_a_time_case_74() -> None:
    """Blame only sessions inside the step that failed, and try suspects one at a time.

    Three sessions share a step that kills the process. From the second loss on, each is tried alone. A session that
    then makes progress is cleared. A session that kills again, alone, is the cause. A session that is never inside is
    opened each time."""
    bench = Bench()
    guilty, first, second, nearby = (bench.submit(tokens=9) for _ in range(4))
    shared = frozenset({1, 2, 3})
    for _ in range(2):
        bench.gateway.on_lost_replica("embed", 0, LOST, shared)
        bench.gateway.on_replaced("embed", 0, 0)
    assert [stream.waits for stream in (guilty, first, second, nearby)] == [False, True, True, False]
    for _ in range(2):
        bench.gateway.on_lost_replica("embed", 0, LOST, frozenset({1}))
        bench.gateway.on_replaced("embed", 0, 0)
    assert guilty.over
    assert "that happened 4 times in a row" in str(guilty.events[0])
    assert [stream.waits for stream in (first, second, nearby)] == [False, True, False]
    bench.told([Row(2, first.info.epoch, 3, 1)], [60])
    assert [stream.waits for stream in (first, second, nearby)] == [False, False, False]
    assert [stream.losses for stream in (first, second, nearby)] == [0, 2, 0]
    assert not any(stream.over for stream in (first, second, nearby))
