"""Check a host's decisions over memory wires: joining, batching, refusing, and where outputs and credits go."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranvier.actors.component.actor import Batch
from ranvier.actors.host.batcher import Work
from ranvier.actors.host.scheduler import HostCore
from ranvier.actors.protocol.host_spec import HostLink, PortSpec
from ranvier.transport.format.aligned import ALIGNED_BYTES
from ranvier.transport.format.header import Row
from ranvier.transport.format.host_id import host_id
from ranvier.transport.format.tensor_spec import TensorSpec
from ranvier.transport.format.tensors import from_buffer, to_buffer
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link import LinkSpec
from ranvier.transport.links.link_state import Outbound
from ranvier.transport.wires.testing import MemoryNetwork

SPEC = TensorSpec("float32", ("tokens",))
ME, UP, DOWN = "me.0.1", "up.0.1", "down.0.1"


def link(edge: int, source: str, target: str, port: str, credits: int) -> LinkSpec:
    """Return the spec of a link with one port."""
    return LinkSpec(edge, f"{source} -> {target}", host_id(source), host_id(target), ((port, SPEC),), credits, 1 << 20)


class Bench:
    """Connect a host's core to two neighbours, all three on a memory network."""

    def __init__(
        self,
        ports: Sequence[str] = ("x",),
        credits: int = 8,
        batch_tokens: int = 16,
        feedback: bool = False,
        needed: int | None = None,
        once: Sequence[str] = (),
        repeats: bool = False,
        batches: int = 1,
    ) -> None:
        self.network = MemoryNetwork()
        links = [link(index, UP, ME, port, credits) for index, port in enumerate(ports)]
        out = link(len(ports), ME, DOWN, "y", credits)
        self.wires = {name: self.network.wire(name) for name in (ME, UP, DOWN)}
        self.ends = {name: Exchange(name, "g", [*links, out], self.network.clock) for name in self.wires}
        host_links = [
            HostLink(port, spec, outgoing=False, feedback=feedback, repeats=repeats)
            for port, spec in zip(ports, links, strict=True)
        ]
        host_links.append(HostLink("y", out, outgoing=True))
        inputs = [PortSpec(port, SPEC, port in once) for port in dict.fromkeys(ports)]
        self.core = HostCore(inputs, [PortSpec("y", SPEC)], host_links, self.ends[ME], batch_tokens, needed, batches)
        self.got: list[tuple[tuple[Row, ...], list[float]]] = []
        self.read_down = True
        for end in self.ends.values():
            end.open()
        self.turn(4)

    def turn(self, rounds: int = 3) -> None:
        """Deliver messages between all endpoints, `rounds` times."""
        for _ in range(rounds):
            for name, end in self.ends.items():
                while (arrival := self.wires[name].receive(0)) is not None:
                    received = end.on_arrival(arrival)
                    if received is None:
                        continue
                    if name == ME:
                        self.core.on_message(received)
                    else:
                        header, buffers = received.header, received.buffers
                        self.got.append((header.rows, from_buffer(header.tensors[0], buffers[0]).tolist()))
                        if self.read_down:
                            end.consumed(received.link, received.nbytes)
                end.idle()
                for out in end.outbox:
                    self.wires[name].send(out.peer, out.header, out.buffers)
                end.outbox.clear()

    def send(self, rows: Sequence[Row], edge: int = 0, port: str = "x", value: float = 0.0) -> None:
        """Send one message with these rows from the upper neighbour."""
        end = self.ends[UP]
        tensor = torch.cat([torch.full((row.tokens,), row.session + value) for row in rows])
        meta, buffer = to_buffer(port, tensor)
        end.send(end.sending[edge, ME], Outbound(tuple(rows), (meta,), (buffer,), 0))
        self.turn()

    def step(self) -> Work | None:
        """Run one step that returns the sum of its inputs + 0.5, and return its work."""
        work = self.core.take()
        if work is not None:
            total = sum(work.batch.tensors.values())
            assert isinstance(total, torch.Tensor)
            self.core.complete(work, {"y": total + 0.5}, 0)
            self.core.finish(work)
            self.turn()
        return work


def test_one_message_one_step() -> None:
    """Run one step for one message, and send the output down."""
    bench = Bench()
    bench.core.open(7, 1)
    bench.send([Row(7, 1, 0, 2)])
    assert bench.step() is not None
    assert bench.step() is None
    assert bench.got == [((Row(7, 1, 0, 2),), [7.5, 7.5])]


def test_what_has_queued_up_is_one_batch_up_to_the_budget() -> None:
    """Batch the queued messages up to the token budget.

    Of five sessions with four tokens each, the first step takes sixteen tokens and the next step the rest."""
    bench = Bench()
    for session in range(1, 6):
        bench.core.open(session, 1)
        bench.send([Row(session, 1, 0, 4)])
    works = [bench.step(), bench.step(), bench.step()]
    assert [work and [row.session for row in work.batch.rows] for work in works] == [[1, 2, 3, 4], [5], None]
    assert works[0] is not None
    assert works[0].batch["x"].tolist() == [float(s) for s in (1, 2, 3, 4) for _ in range(4)]
    assert [rows[0].session for rows, _ in bench.got] == [1, 5]


def test_a_message_over_the_budget_goes_alone() -> None:
    """Run a message over the token budget in a separate step."""
    bench = Bench(batch_tokens=4)
    bench.core.open(1, 1)
    bench.core.open(2, 1)
    bench.send([Row(1, 1, 0, 9)])
    bench.send([Row(2, 1, 0, 2)])
    first = bench.step()
    assert first is not None
    assert first.batch.tokens == 9


def sessions_of(work: Work | None) -> list[tuple[int, int]]:
    """Return session and position of each row of a step."""
    assert work is not None
    return [(row.session, row.position) for row in work.batch.rows]


def test_a_long_prompt_holds_up_neither_tokens_nor_short_prompts() -> None:
    """Delay neither decoding tokens nor short prompts by a long prompt.

    Four parts of a long prompt are queued before a short prompt and two decoding sessions. Every step takes the
    decoding tokens first, then the oldest part. The short prompt goes with the first part."""
    bench = Bench(batch_tokens=12)
    for session in range(1, 5):
        bench.core.open(session, 1)
    for part in range(4):
        bench.send([Row(1, 1, 4 * part, 4)])
    bench.send([Row(2, 1, 0, 3)])
    bench.send([Row(3, 1, 9, 1)])
    bench.send([Row(4, 1, 5, 1)])
    assert sessions_of(bench.step()) == [(3, 9), (4, 5), (1, 0), (2, 0)]
    bench.send([Row(4, 1, 6, 1), Row(3, 1, 10, 1)])
    assert sessions_of(bench.step()) == [(4, 6), (3, 10), (1, 4)]
    assert [sessions_of(bench.step()) for _ in range(2)] == [[(1, 8)], [(1, 12)]]
    assert bench.step() is None


def test_a_part_that_never_fits_beside_tokens_is_passed_over_once() -> None:
    """Pass over a prompt's part at most once.

    Tokens of two sessions come before every step, and the budget has no room for a part beside them."""
    bench = Bench(batch_tokens=4)
    for session in range(1, 4):
        bench.core.open(session, 1)
    bench.send([Row(1, 1, 0, 4)])
    bench.send([Row(1, 1, 4, 4)])
    taken = []
    for step in range(5):
        bench.send([Row(2, 1, step, 1), Row(3, 1, step, 1)])
        taken.append({session for session, _ in sessions_of(bench.step())})
    assert taken == [{2, 3}, {1}, {2, 3}, {1}, {2, 3}]


@given(
    st.lists(st.dictionaries(st.integers(1, 4), st.integers(1, 5), min_size=1), min_size=1, max_size=7),
    st.integers(1, 12),
    st.integers(1, 3),
)
def test_every_row_is_taken_once_and_each_sessions_in_order(
    messages: list[dict[int, int]], batch_tokens: int, batches: int
) -> None:
    """Take every row once and each session's rows in order, whatever the steps batch.

    Messages hold parts of any sessions. A KV cache relies on this order."""
    bench = Bench(batch_tokens=batch_tokens, batches=batches)
    at = dict.fromkeys(range(1, 5), 0)
    for session in at:
        bench.core.open(session, 1)
    sent = []
    for message in messages:
        rows = [Row(session, 1, at[session], tokens) for session, tokens in message.items()]
        at |= {row.session: row.position + row.tokens for row in rows}
        sent += rows
        bench.send(rows)
    taken: list[Row] = []
    while (work := bench.step()) is not None:
        taken += work.batch.rows
    assert sorted(taken) == sorted(sent)
    for session in at:
        assert [row for row in taken if row.session == session] == [row for row in sent if row.session == session]


def test_a_sessions_own_order_comes_before_any_other() -> None:
    """Keep a step of one token behind a larger step of the same session."""
    bench = Bench()
    bench.core.open(1, 1)
    bench.core.open(2, 1)
    bench.send([Row(1, 1, 0, 3)])
    bench.send([Row(2, 1, 0, 2)])
    bench.send([Row(1, 1, 3, 1)])
    assert sessions_of(bench.step()) == [(1, 0), (2, 0)]
    assert sessions_of(bench.step()) == [(1, 3)]


def test_a_sessions_next_step_waits_for_the_one_before() -> None:
    """Run two queued chunks of one prompt in two steps. Another session may share the first."""
    bench = Bench()
    bench.core.open(1, 1)
    bench.core.open(2, 1)
    bench.send([Row(1, 1, 0, 2)])
    bench.send([Row(2, 1, 0, 3)])
    bench.send([Row(1, 1, 2, 2)])
    first, second = bench.step(), bench.step()
    assert first is not None
    assert second is not None
    assert [row.session for row in first.batch.rows] == [1, 2]
    assert second.batch.rows == (Row(1, 1, 2, 2),)


def test_rows_of_another_epoch_or_no_session_are_refused() -> None:
    """Refuse rows of another epoch or of a closed session, and return their credit.

    One of three rows is current, and the step holds that row alone."""
    bench = Bench(credits=2)
    bench.core.open(1, 2)
    bench.core.open(2, 1)
    bench.core.open(3, 1)
    bench.core.close(3)
    for _ in range(3):
        bench.send([Row(1, 1, 0, 1), Row(2, 1, 0, 2), Row(3, 1, 0, 1)])
        work = bench.step()
        assert work is not None
        assert work.batch.rows == (Row(2, 1, 0, 2),)
        assert work.batch["x"].tolist() == [2.0, 2.0]
    assert bench.core.counters["rows_refused"] == 6
    bench.core.close(2)
    bench.send([Row(2, 1, 2, 1)])
    assert bench.step() is None
    assert not bench.ends[UP].waiting


def test_a_join_takes_rows_that_are_complete() -> None:
    """Step each row once, when it has arrived on both ports.

    Rows arrive in another order and in other messages on the two ports."""
    bench = Bench(ports=("a", "b"))
    for session in (1, 2, 3):
        bench.core.open(session, 1)
    bench.send([Row(1, 1, 0, 1), Row(2, 1, 0, 2)], edge=0, port="a")
    assert bench.step() is None
    bench.send([Row(2, 1, 0, 2)], edge=1, port="b", value=10.0)
    work = bench.step()
    assert work is not None
    assert work.batch.rows == (Row(2, 1, 0, 2),)
    assert bench.got[-1][1] == [14.5, 14.5]
    bench.send([Row(3, 1, 0, 1), Row(1, 1, 0, 1)], edge=1, port="b")
    bench.send([Row(3, 1, 0, 1)], edge=0, port="a")
    work = bench.step()
    assert work is not None
    assert [row.session for row in work.batch.rows] == [1, 3]
    assert not bench.ends[UP].unfinished()


def test_a_session_that_closes_gives_back_what_its_join_held() -> None:
    """Return the credit of the rows that a closing session had in the join."""
    bench = Bench(ports=("a", "b"), credits=1)
    for session in (1, 2, 3):
        bench.core.open(session, 1)
        bench.send([Row(session, 1, 0, 1)], edge=0, port="a")
        assert bench.core.close(session)
        bench.turn()
    assert not bench.core.close(1)
    assert not bench.ends[UP].waiting


def test_no_step_without_credit_for_its_output() -> None:
    """Begin no step while an output waits for credit.

    The consumer below does not read. Once it reads, steps begin again."""
    bench = Bench(credits=2)
    bench.read_down = False
    for session in range(1, 6):
        bench.core.open(session, 1)
    taken = 0
    for session in range(1, 6):
        if not bench.ends[UP].waiting:
            bench.send([Row(session, 1, 0, 1)])
        taken += bench.step() is not None
    assert taken == 3  # two outputs are sent, one waits for credit
    assert len(bench.got) == 2
    assert bench.ends[ME].waiting
    down = bench.ends[DOWN]
    for receiving in down.receiving.values():
        down.consumed(receiving, 4)
        down.consumed(receiving, 4)
    bench.turn()
    assert len(bench.got) == 3
    assert bench.step() is not None


def test_what_waits_for_credit_goes_with_its_session() -> None:
    """Drop the output that waits for credit when its session closes.

    A consumer that never reads delays other sessions only until then."""
    bench = Bench(credits=2)
    bench.read_down = False
    for session in range(1, 5):
        bench.core.open(session, 1)
    for session in (1, 2, 3):
        bench.send([Row(session, 1, 0, 1)])
        bench.step()
    bench.send([Row(4, 1, 0, 1)])
    assert bench.ends[ME].waiting == 1
    assert bench.core.take() is None
    bench.core.close(1)
    assert bench.ends[ME].waiting == 1, "that of session 3"
    bench.core.close(3)
    assert bench.ends[ME].waiting == 0
    assert bench.ends[ME].counters["given_up"] == 1
    assert bench.step() is not None


def test_feedback_gives_its_credit_back_at_once() -> None:
    """Return the credit of feedback at once, even if its step cannot run yet.

    Otherwise a ring could stop for lack of credit."""
    bench = Bench(credits=1, feedback=True)
    for session in range(1, 6):
        bench.core.open(session, 1)
        bench.send([Row(session, 1, 0, 1)])
    assert len(bench.core.queue) == 5
    assert not bench.ends[UP].waiting


def test_rows_of_their_own_and_ports_that_send_nothing() -> None:
    """Let an actor answer with positions of its choice, for some rows only, or for none."""
    bench = Bench()
    bench.core.open(1, 1)
    bench.send([Row(1, 1, 0, 3)])
    work = bench.core.take()
    assert work is not None
    bench.core.complete(work, {"y": Batch((Row(1, 1, 3, 1),), {"y": torch.tensor([9.0])})}, 0)
    bench.core.complete(work, {}, 0)
    bench.core.complete(work, {"y": Batch((), {"y": torch.empty(0)})}, 0)
    bench.core.finish(work)
    bench.turn()
    assert bench.got == [((Row(1, 1, 3, 1),), [9.0])]


def test_each_row_alone() -> None:
    """Split a step into one step per row."""
    bench = Bench()
    bench.core.open(1, 1)
    bench.core.open(2, 1)
    bench.send([Row(1, 1, 0, 2), Row(2, 1, 0, 1)])
    work = bench.core.take()
    assert work is not None
    singles = bench.core.alone(work)
    assert [single.batch["x"].tolist() for single in singles] == [[1.0, 1.0], [2.0]]


@pytest.mark.parametrize(
    ("outputs", "kind", "words"),
    [
        ({"z": torch.ones(1)}, ValueError, "step returned the port 'z'; the actor's outputs are y"),
        ({"y": [1.0]}, TypeError, "step returned list for the port 'y'"),
    ],
)
def test_outputs_that_cannot_be_sent(outputs: dict[str, torch.Tensor], kind: type[Exception], words: str) -> None:
    """Refuse an output for an unknown port, or one that is no tensor."""
    bench = Bench()
    bench.core.open(1, 1)
    bench.send([Row(1, 1, 0, 1)])
    work = bench.core.take()
    assert work is not None
    with pytest.raises(kind, match=words):
        bench.core.complete(work, outputs, 0)


@pytest.mark.parametrize("ports", [("a", "b", "c"), ("a", "a", "a")])
def test_the_first_of_three_wins_and_the_others_are_dropped(ports: tuple[str, ...]) -> None:
    """Step once on the first of three inputs, count the late ones, and return every credit.

    The inputs of `join: first` are three ports, or three edges into one port."""
    bench = Bench(ports=ports, needed=1, credits=2)
    bench.core.open(1, 1)
    for position in range(6):
        order = [(position + edge) % 3 for edge in range(3)]
        for count, edge in enumerate(order):
            bench.send([Row(1, 1, position, 1)], edge=edge, port=ports[edge], value=float(edge))
            assert (bench.step() is not None) == (count == 0)
        assert bench.got[-1] == ((Row(1, 1, position, 1),), [1.5 + order[0]])
    assert bench.core.counters["rows_late"] == 12
    assert not bench.ends[UP].unfinished()
    assert not bench.ends[UP].waiting


def test_a_quorum_steps_with_what_it_has() -> None:
    """Step on the first two of three ports, and drop the third whenever it arrives.

    Sessions whose inputs are on different ports share no batch."""
    bench = Bench(ports=("a", "b", "c"), needed=2)
    for session in (1, 2):
        bench.core.open(session, 1)
    bench.send([Row(1, 1, 0, 1), Row(2, 1, 0, 1)], edge=2, port="c")
    assert bench.step() is None
    bench.send([Row(1, 1, 0, 1)], edge=0, port="a")
    bench.send([Row(2, 1, 0, 1)], edge=1, port="b")
    first, second = bench.step(), bench.step()
    assert first is not None
    assert second is not None
    assert [list(work.batch.tensors) for work in (first, second)] == [["a", "c"], ["b", "c"]]
    bench.send([Row(1, 1, 0, 1)], edge=1, port="b")
    assert bench.step() is None
    assert bench.core.counters["rows_late"] == 1


def test_a_step_that_waits_too_long_names_what_is_missing() -> None:
    """Name the ports that a row has and those that it lacks, until its session closes."""
    bench = Bench(ports=("a", "b"))
    bench.core.open(1, 1)
    bench.send([Row(1, 1, 0, 1)], edge=1, port="b")
    assert bench.core.overdue(0) == []
    assert bench.core.overdue(1 << 62) == [(Row(1, 1, 0, 1), ("b",), ("a",), 0)]
    bench.core.close(1)
    assert bench.core.overdue(1 << 62) == []


def test_ports_of_one_step_may_hold_different_numbers_of_tokens() -> None:
    """Allow a different number of tokens on each port of a step, even 0, as a router sends them.

    Two sessions in one batch keep their own counts."""
    bench = Bench(ports=("a", "b"))
    for session in (1, 2):
        bench.core.open(session, 1)
    bench.send([Row(1, 1, 0, 2), Row(2, 1, 0, 4)], edge=0, port="a")
    bench.send([Row(1, 1, 0, 0), Row(2, 1, 0, 3)], edge=1, port="b")
    work = bench.core.take()
    assert work is not None
    assert work.batch.rows == (Row(1, 1, 0, 2), Row(2, 1, 0, 4))
    assert work.batch.rows_of("b") == (Row(1, 1, 0, 0), Row(2, 1, 0, 3))
    assert work.batch["b"].tolist() == [2.0, 2.0, 2.0]
    assert [single.batch["b"].tolist() for single in bench.core.alone(work)] == [[], [2.0, 2.0, 2.0]]


def test_steps_wait_for_what_their_session_gets_once() -> None:
    """Delay a session's steps until its once-per-session input has arrived.

    That input gets a separate step, before the session's first. Sessions that have the input do not wait for sessions
    that lack it. When a session closes, the credit of its held rows is returned."""
    bench = Bench(ports=("x", "memory"), once=("memory",), credits=2)
    for session in (1, 2, 3):
        bench.core.open(session, 1)
    bench.send([Row(1, 1, 0, 1), Row(2, 1, 0, 1)], edge=0)
    assert bench.step() is None
    bench.send([Row(2, 1, 0, 3)], edge=1, port="memory", value=10.0)
    told, work = bench.step(), bench.step()
    assert told is not None
    assert told.batch.tensors.keys() == {"memory"}
    assert told.batch.rows == (Row(2, 1, 0, 3),)
    assert work is not None
    assert work.batch.rows == (Row(2, 1, 0, 1),)
    bench.send([Row(2, 1, 1, 1)], edge=0)
    again = bench.step()
    assert again is not None
    assert again.batch.tensors.keys() == {"x"}
    [overdue] = bench.core.overdue(1 << 62)
    assert (overdue.row, overdue.present, overdue.missing) == (Row(1, 1, 0, 1), (), ("memory",))
    bench.core.close(1)
    bench.turn()
    for position in range(2, 8):
        bench.send([Row(2, 1, position, 1)], edge=0)
        assert bench.step() is not None
    assert not bench.ends[UP].waiting


def test_rows_that_come_before_their_session_opens_are_kept_for_it() -> None:
    """Keep rows that arrive before their session opens.

    Commands and messages take different paths. A row waits if its session is newer than all sessions so far, even in a
    message with rows of other sessions. If the session never opens here, the row is refused."""
    bench = Bench(credits=2)
    bench.core.open(1, 1)
    bench.send([Row(3, 1, 0, 1), Row(1, 1, 0, 2), Row(2, 1, 0, 1)])
    work = bench.step()
    assert work is not None
    assert work.batch.rows == (Row(1, 1, 0, 2),)
    assert work.batch["x"].tolist() == [1.0, 1.0]
    assert bench.step() is None
    bench.core.open(3, 1)
    work = bench.step()
    assert work is not None
    assert work.batch.rows == (Row(3, 1, 0, 1),)
    assert bench.core.counters["rows_refused"] == 1, "session 2 never was"
    bench.turn()
    assert not bench.ends[UP].unfinished()


def test_what_another_replica_answered_before_is_dropped() -> None:
    """Step each row once if it arrives twice, and return all credit.

    The two copies arrive in messages that are cut differently."""
    bench = Bench(credits=2, repeats=True)
    bench.core.open(1, 1)
    bench.core.open(2, 1)
    bench.send([Row(1, 1, 0, 2), Row(2, 1, 0, 1)])
    bench.send([Row(2, 1, 0, 1)])
    bench.send([Row(1, 1, 0, 2)])
    bench.send([Row(2, 1, 1, 1), Row(1, 1, 0, 2)])
    works = [bench.step() for _ in range(3)]
    assert [work and work.batch.rows for work in works] == [
        (Row(1, 1, 0, 2), Row(2, 1, 0, 1)), (Row(2, 1, 1, 1),), None,
    ]  # fmt: skip
    assert bench.core.counters["rows_late"] == 3
    assert not bench.ends[UP].unfinished()
    bench.core.close(1)
    bench.core.open(1, 1)
    bench.send([Row(1, 1, 0, 1)])
    assert bench.step() is not None


def test_what_came_as_two_batches_stays_two() -> None:
    """Keep two queued batches apart.

    Four sessions form two batches. Smaller messages are merged only up to half of the sessions."""
    bench = Bench(batches=2)
    for session in range(1, 5):
        bench.core.open(session, 1)
    for position, messages in enumerate([[[1, 2], [3, 4]], [[1], [2], [3, 4]], [[1], [2, 3], [4]]]):
        for message in messages:
            bench.send([Row(session, 1, position, 1) for session in message])
    taken = []
    while (work := bench.step()) is not None:
        taken.append([row.session for row in work.batch.rows])
    assert taken == [[1, 2], [3, 4], [1, 2], [3, 4], [1], [2, 3], [4]]


def test_sessions_are_cut_into_batches_that_keep_every_stage_busy() -> None:
    """Cut five sessions into batches of three and two, even if they arrive in one message.

    So every stage stays busy. The credit of a message that was cut is returned with its last row."""
    bench = Bench(credits=2, batches=2)
    for session in range(1, 6):
        bench.core.open(session, 1)
    for position in range(6):
        bench.send([Row(session, 1, position, 1) for session in range(1, 6)])
        works = [bench.step(), bench.step(), bench.step()]
        assert [work and [row.session for row in work.batch.rows] for work in works] == [[1, 2, 3], [4, 5], None]
    for session in range(1, 6):
        bench.send([Row(session, 1, 6, 1)])
        if session == 2:
            bench.core.close(5)
    works = [bench.step(), bench.step(), bench.step()]
    assert [work and [row.session for row in work.batch.rows] for work in works] == [[1, 2], [3, 4], None]
    assert not bench.ends[UP].waiting
    bench.turn()
    assert not bench.ends[UP].unfinished()


def test_a_step_of_several_inputs_has_them_where_they_matter() -> None:
    """Copy only the inputs whose address is not aligned and whose kernels need it."""
    memory = (torch.arange(400) % 100).to(torch.uint8)  # no byte pattern of a NaN
    odd, narrow, even = (
        memory[4:68].view(torch.float32),
        memory[4:68].view(torch.bfloat16),
        memory[:64].view(torch.float32),
    )
    batch = Batch((Row(1, 1, 0, 1),), {"odd": odd, "narrow": narrow, "even": even})
    made = batch.aligned()
    assert made["odd"].data_ptr() % ALIGNED_BYTES == 0
    assert made["odd"].equal(odd)
    assert made["narrow"] is narrow and made["even"] is even
    assert made.aligned() is made
