"""Check routes without a process: the replica of each row, repeated answers, second copies, and where sessions fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranvier.actors.errors import Overloaded
from ranvier.actors.host.route import FEWEST_SAMPLES, Answers, Route
from ranvier.actors.protocol.host_spec import Policy
from ranvier.graph.sessions.placement import Placement
from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.header import Row, TensorMeta
from ranvier.transport.format.host_id import host_id
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.links.link_state import Outbound
from ranvier.transport.wires.testing import MemoryNetwork

SPEC = TensorSpec("float32", ("rows",))
META, DATA = TensorMeta("x", BY_NAME["float32"].number, (1,), 0, 4), b"\0\0\0\0"


class Bench:
    """Connect a sender to the replicas of one actor on a memory network.

    A replica consumes a message only when a test calls `use`."""

    def __init__(self, replicas: int, policy: Policy, credits: int = 4, skips: bool = True) -> None:
        self.network = MemoryNetwork()
        targets = [f"work.{number}.1" for number in range(replicas)]
        links = [
            LinkSpec(
                0,
                "a.x -> work.x",
                host_id("a.0.1"),
                host_id(name),
                (("x", SPEC),),
                credits,
                1 << 20,
                prompt=policy.by_load,
            )
            for name in targets
        ]
        self.ends = {name: Exchange(name, "g", links, self.network.clock) for name in ("a.0.1", *targets)}
        self.wires = {name: self.network.wire(name) for name in self.ends}
        self.route = Route(0, "work", policy, skips)
        for link in self.sender.sending.values():
            self.route.add(link)
        self.got: dict[int, list[Any]] = {number: [] for number in range(replicas)}
        self.replicas = {"work": tuple(range(replicas))}
        self.closed: set[int] = set()
        self.sender.open()
        self.turn(4)

    @property
    def sender(self) -> Exchange:
        return self.ends["a.0.1"]

    def turn(self, rounds: int = 3) -> None:
        """Deliver messages between all endpoints, `rounds` times."""
        for _ in range(rounds):
            for name, end in self.ends.items():
                while (arrival := self.wires[name].receive(0)) is not None:
                    received = end.on_arrival(arrival)
                    if received is not None:
                        self.got[int(name.split(".")[1])].append(received)
                end.idle()
                for out in end.outbox:
                    self.wires[name].send(out.peer, out.header, out.buffers)
                end.outbox.clear()

    def send(self, session: int, position: int = 0) -> tuple[int, ...]:
        """Send one row, and return the replicas that received it."""
        before = {number: len(got) for number, got in self.got.items()}
        rows = (Row(session, 1, position, 1),)
        for replicas, _ in self.route.groups(rows, lambda _: self.replicas):
            self.route.send(self.sender, replicas, Outbound(rows, (META,), (DATA,), 0))
        self.turn()
        return tuple(number for number, got in self.got.items() if len(got) > before[number])

    def use(self, replica: int, after_s: float = 0.0) -> None:
        """Let the replica consume its oldest message."""
        self.network.advance(after_s)
        received = self.got[replica].pop(0)
        self.ends[f"work.{replica}.1"].consumed(received.link, received.nbytes)
        self.turn()

    def copies(self) -> None:
        """Send the second copies that are due."""
        self.route.send_copies(
            self.sender, self.network.now_ns, lambda _: self.replicas, lambda row: row.session not in self.closed
        )
        self.turn()


def test_a_session_stays_where_it_is() -> None:
    """Send every step of a session to the replica that it was assigned to."""
    bench = Bench(3, Policy())
    bench.replicas = {"work": (2,)}
    assert {bench.send(1, position) for position in range(3)} == {(2,)}


def test_in_turn_by_session_and_position() -> None:
    """Choose the same replica at every sender, whatever it sent before, so that rows to be joined meet."""
    bench, other = Bench(3, Policy("round_robin")), Bench(3, Policy("round_robin"))
    other.send(7)
    for session in range(6):
        assert bench.send(session, 1) == other.send(session, 1) == ((session + 1) % 3,)


def test_the_shortest_queue() -> None:
    """Choose the replica that has the fewest unread messages."""
    bench = Bench(2, Policy("least_queued"))
    assert [bench.send(session) for session in range(4)] == [(0,), (1,), (0,), (1,)]
    bench.use(1)
    assert bench.send(4) == (1,)
    bench.use(0)
    bench.use(0)
    assert [bench.send(5), bench.send(6)] == [(0,), (0,)]


def test_the_lowest_latency() -> None:
    """Try each replica once, then choose the quicker one until it is slower or has no credit left."""
    bench = Bench(2, Policy("lowest_latency"), credits=2)
    assert [bench.send(0), bench.send(1)] == [(0,), (1,)]
    bench.use(1, after_s=0.001)
    bench.use(0, after_s=0.010)
    assert bench.send(2) == (1,)
    assert bench.send(3) == (1,)
    assert bench.send(4) == (0,), "the quicker one has no credit left"


def test_the_slow_one_is_tried_again_now_and_then() -> None:
    """Send a few of many rows to the slower replica, so that its latency is measured again."""
    bench = Bench(2, Policy("lowest_latency"), credits=1000)
    for replica, took_s in ((0, 0.010), (1, 0.001)):
        bench.send(replica)
        bench.use(replica, after_s=took_s)
    went = [bench.send(session) for session in range(200)]
    assert 1 <= went.count((0,)) <= 4


def test_hedged_to_both_and_one_without_credit_falls_out() -> None:
    """Stop sending a session to a replica that has no credit, for good.

    Replica 1 has four unread messages. Another session begins with both replicas."""
    bench = Bench(2, Policy("hedge", 2))
    for position in range(4):
        assert bench.send(1, position) == (0, 1)
        bench.use(0)
    assert bench.send(1, 4) == (0,)
    bench.use(0)
    bench.use(1)
    assert bench.send(1, 5) == (0,), "a hole in what it has seen"
    assert bench.send(2) == (0, 1)
    assert bench.sender.counters["copies_left_out"] == 1
    bench.route.close(1)
    bench.use(1)
    assert bench.send(1, 0) == (0, 1)


def test_while_none_has_credit_nobody_is_taken_for_the_slow_one() -> None:
    """Leave no replica out while none has credit.

    Ten messages are sent over four credits per replica. The other six are held, and go to the replica that consumes its
    own first, even the second one."""
    bench = Bench(2, Policy("hedge", 2))
    for session in range(10):
        bench.send(session)
    assert [len(got) for got in bench.got.values()] == [4, 4]
    assert bench.sender.waiting == 6
    for _ in range(10):
        bench.use(1)
    assert not bench.sender.waiting
    assert [len(got) for got in bench.got.values()] == [4, 0]
    bench.send(20)
    bench.route.remove("work.1.1")
    assert not bench.sender.waiting


def test_a_link_that_is_about_to_open_is_not_a_slow_one() -> None:
    """Leave no replica out because its link is not open yet.

    At a run's start, one replica's welcome arrives before the other's."""
    bench = Bench(2, Policy("hedge", 2))
    late = bench.route.links[0]
    late.open = False
    assert bench.send(1) == ()
    late.open = True
    assert late.on_credit is not None
    late.on_credit()
    bench.turn()
    assert [len(got) for got in bench.got.values()] == [1, 1]
    assert not bench.sender.counters["copies_left_out"]


def test_where_nothing_may_be_left_out_copies_wait() -> None:
    """Hold the copies for a replica without credit, if none may be left out."""
    bench = Bench(2, Policy("hedge", 2), skips=False)
    for position in range(6):
        bench.send(1, position)
    assert [len(got) for got in bench.got.values()] == [4, 4]
    assert bench.sender.waiting == 4


def test_a_second_copy_after_the_percentile() -> None:
    """Send one second copy to the other replica, once the first takes longer than 90 % of those before.

    Send none for a session that has closed."""
    bench = Bench(2, Policy("hedge", 2, after=90), credits=100)
    for number in range(FEWEST_SAMPLES):
        [replica] = bench.send(number)
        bench.use(replica, after_s=0.010 if number % 20 == 0 else 0.001)
    assert bench.route.due_ns is None
    [first] = bench.send(50)
    assert bench.route.due_ns == bench.network.now_ns + 1_000_000
    bench.copies()
    assert not bench.got[1 - first]
    bench.network.advance(0.0011)
    bench.copies()
    bench.copies()
    assert [len(bench.got[first]), len(bench.got[1 - first])] == [1, 1]
    assert bench.got[1 - first][0].header.rows == (Row(50, 1, 0, 1),)
    bench.send(51)
    bench.closed.add(51)
    bench.network.advance(1)
    bench.copies()
    assert sum(len(got) for got in bench.got.values()) == 3
    assert bench.sender.counters["second_copies"] == 1


def test_a_replica_that_leaves() -> None:
    """Send no second copy for a replica that left, and keep only the other one's link."""
    bench = Bench(2, Policy("hedge", 2, after=90))
    assert bench.send(2) == (0,)
    bench.route.remove("work.0.1")
    assert bench.route.due_ns is None
    assert bench.route.only is bench.route.links[1]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=40))
def test_each_step_counts_once(turns: list[tuple[int, int]]) -> None:
    """Count every step once and in order.

    Two replicas answer the steps of four sessions, each in its own order and interleaved at will."""
    answers = Answers()
    answers.add(5)
    sent, seen = dict.fromkeys(((r, s) for r in (0, 1) for s in range(4)), 0), []
    for replica, session in turns:
        position = sent[replica, session]
        sent[replica, session] += 1
        if answers.first(5, Row(session, 1, position, 1)):
            seen.append((session, position))
    for session in range(4):
        furthest = max(sent[0, session], sent[1, session])
        assert [position for of, position in seen if of == session] == list(range(furthest))
    assert 5 in answers
    assert 6 not in answers


def test_placing_sessions() -> None:
    """Assign a session to the replica with the fewest sessions, in turn among equals, if it fits.

    A replica that is leaving gets none. If a session fits nowhere, `Overloaded` gives the actor and its free tokens."""
    placement = Placement({"head": Policy("round_robin"), "pair": Policy("hedge", 2)})
    for number in range(2):
        placement.join("blocks", number, 100)
        placement.join("head", number)
    for number in range(3):
        placement.join("pair", number)
    places = [placement.take(40) for _ in range(4)]
    assert [place["blocks"] for place in places] == [(0,), (1,), (0,), (1,)]
    assert {place["head"] for place in places} == {(0, 1)}
    assert [place["pair"] for place in places[:2]] == [(0, 1), (0, 2)]
    with pytest.raises(Overloaded, match="needs 40 tokens of KV cache, 20 of 100 are free at blocks"):
        placement.take(40)
    both = Placement({"a": Policy("hedge", 2)})
    both.join("a", 0, 100)
    both.join("a", 1, 5)
    with pytest.raises(Overloaded, match=r"needs 10 tokens of KV cache, 5 of 5 are free at a\.1"):
        both.take(10)
    assert sum(replica.sessions for replica in placement.replicas["head"].values()) == 8, "a refused one left something"
    placement.give_back(places[1], 40)
    assert placement.take(60)["blocks"] == (1,)
    placement.leave("blocks", 1)
    placement.give_back(places[0], 40)
    assert placement.take(10)["blocks"] == (0,)
    assert placement.labels({"blocks": (1,), "head": (0, 1)}) == ["blocks.1", "head.0", "head.1"]
