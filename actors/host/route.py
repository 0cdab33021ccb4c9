"""An edge to an actor with several replicas: which of them a row goes to, and which answers came before. No I/O.

A session is opened at some replicas of each actor and stays with them (`SessionInfo.places`); among these the sender
chooses by the actor's policy. Choices by place alone are the same at every sender, so that what is to be joined meets.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ranvier.transport.format.codec import Coding
from ranvier.transport.format.header import Row, TensorMeta
from ranvier.transport.format.message import Buffer, stable
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link_state import SendingLink

from ..protocol.host_spec import STICKY, Policy, replica_of

Places = Mapping[str, tuple[int, ...]]
"""The replicas of one session, by actor."""
PlacesOf = Callable[[int], Places]
WEIGHT = 0.1
"""Of the newest message in the moving average of latencies."""
RETRY_EVERY = 64
"""By lowest latency, one row in so many goes to the next replica in turn: one that was slow may be quick by now."""
SAMPLES = 256
"""The percentile that a second copy waits for is that of so many messages before."""
RANK_EVERY = 16
FEWEST_SAMPLES = 20
"""Until so many were used up there is no percentile, and second copies go out at once."""
_EVERYWHERE: tuple[int, ...] = (0,)


class _Copy(NamedTuple):
    """A message that may have to be sent to a second replica."""

    due_ns: int
    replica: int
    sequence: int
    rows: tuple[Row, ...]
    tensors: tuple[TensorMeta, ...]
    buffers: tuple[Buffer, ...]
    ready_ns: int
    coding: Coding | None


class _Held(NamedTuple):
    """A hedged message for which no replica has credit."""

    exchange: Exchange
    replicas: tuple[int, ...]
    rows: tuple[Row, ...]
    tensors: tuple[TensorMeta, ...]
    buffers: tuple[Buffer, ...]
    ready_ns: int
    coding: Coding | None


class Route:
    """One edge at its sending end.

    Args:
        edge: its number.
        actor: where it leads.
        policy, skips: see `HostLink`.

    `only` is its link where there is no choice.
    """

    def __init__(self, edge: int, actor: str, policy: Policy = STICKY, skips: bool = False) -> None:
        self.edge = edge
        self.actor = actor
        self.links: dict[int, SendingLink] = {}
        self.only: SendingLink | None = None
        self._policy = policy
        self._skips = skips
        self._latency_ns: dict[int, float] = {}
        self._samples: deque[int] = deque(maxlen=SAMPLES)
        self._late_ns = 0
        self._ranked_in = FEWEST_SAMPLES
        self._copies: deque[_Copy] = deque()
        self._chosen = 0
        self._held: deque[_Held] = deque()
        self._dropped_out: dict[int, set[int]] = {}

    def add(self, link: SendingLink) -> None:
        replica = replica_of(link.spec.target)
        self.links[replica] = link
        self.only = link if len(self.links) == 1 else None
        if self._policy.by_load:
            link.on_used = lambda took_ns: self._used(replica, took_ns)
        elif self._skips and self._policy.copies > 1:
            link.on_credit = self._send_held

    def remove(self, peer: str) -> None:
        """The link to a replica that has left."""
        self.links = {replica: link for replica, link in self.links.items() if link.spec.target != peer}
        self.only = next(iter(self.links.values())) if len(self.links) == 1 else None
        self._send_held()

    def close(self, session: int) -> None:
        """Forget a session."""
        self._dropped_out.pop(session, None)

    def give_up(self, wanted: Callable[[Row], bool]) -> None:
        """Drop what is held and of which no row is `wanted` any more."""
        kept = deque[_Held]()
        for held in self._held:
            if any(wanted(row) for row in held.rows):
                kept.append(held)
            else:
                held.exchange.waiting -= 1
                held.exchange.counters["given_up"] += 1
        self._held = kept

    # -- choosing -----------------------------------------------------------------------------------------------

    def groups(self, rows: Sequence[Row], places: PlacesOf) -> list[tuple[tuple[int, ...], list[int]]]:
        """Which rows (their numbers) go together where (replicas; several: a copy to each; none: all of the session's are
        lost). A row that may need a second copy goes alone."""
        made: dict[tuple[int, ...], list[int]] = {}
        chosen_now: dict[int, int] = {}
        for index, row in enumerate(rows):
            replicas = self._choose(row, places(row.session), chosen_now)
            out = self._dropped_out.get(row.session)
            if out is not None:
                replicas = tuple(replica for replica in replicas if replica not in out)
            made.setdefault(replicas, []).append(index)
        if self._policy.after:
            return [(replicas, [index]) for replicas, own in made.items() for index in own]
        return list(made.items())

    def _choose(self, row: Row, places: Places, chosen_now: dict[int, int]) -> tuple[int, ...]:
        replicas = places.get(self.actor, _EVERYWHERE)
        policy = self._policy
        if not all(replica in self.links for replica in replicas):  # lost: its sessions begin anew elsewhere
            replicas = tuple(replica for replica in replicas if replica in self.links)
        if len(replicas) <= 1 or policy.places is not None:
            return replicas
        if policy.name == "round_robin":
            return (replicas[(row.session + row.position) % len(replicas)],)
        # by load; among equals in turn
        turn = (row.session + row.position) % len(replicas)
        in_turn = replicas[turn:] + replicas[:turn]
        if policy.name == "lowest_latency":
            # one that nothing is known of is tried, one that has no credit left is not
            self._chosen += 1
            tried = replicas[self._chosen // RETRY_EVERY % len(replicas)]
            if self._chosen % RETRY_EVERY == 0 and self.links[tried].may_send(0):
                return (tried,)
            best = min(in_turn, key=lambda r: (not self.links[r].may_send(0), self._latency_ns.get(r, 0.0)))
        else:
            best = min(in_turn, key=lambda r: self.links[r].queued + chosen_now.get(r, 0))
        chosen_now[best] = chosen_now.get(best, 0) + 1
        return (best,)

    # -- sending ------------------------------------------------------------------------------------------------

    def send(
        self,
        exchange: Exchange,
        replicas: tuple[int, ...],
        rows: tuple[Row, ...],
        tensors: tuple[TensorMeta, ...],
        buffers: tuple[Buffer, ...],
        ready_ns: int,
        coding: Coding | None = None,
    ) -> None:
        """Send one message to each of `replicas`.

        A replica that has fallen so far behind that it has no credit gets no more copies of that session, as long as
        another does: the fastest is not held up by the slowest.
        """
        if not replicas:
            exchange.counters["rows_unsent"] += len(rows)
            return
        if self._policy.copies > 1:  # what is sent again later has the values of now
            buffers = tuple(map(stable, buffers))
        if len(replicas) > 1 and self._skips:
            # which of them is the slow one is not known while none has credit: held until one has
            self._held.append(_Held(exchange, replicas, rows, tensors, buffers, ready_ns, coding))
            exchange.waiting += 1
            self._send_held()
            return
        for replica in replicas:
            exchange.send(self.links[replica], rows, tensors, buffers, ready_ns, coding)
        if self._policy.after:
            link = self.links[replicas[0]]
            sequence = link.window.sequence + len(link.waiting)
            due_ns = exchange.clock() + self._late_ns
            self._copies.append(_Copy(due_ns, replicas[0], sequence, rows, tensors, buffers, ready_ns, coding))

    def _send_held(self) -> None:
        while self._held:
            held = self._held[0]
            out = {replica for row in held.rows for replica in self._dropped_out.get(row.session, ())}
            left = [replica for replica in held.replicas if replica in self.links and replica not in out]
            nbytes = sum(meta.nbytes for meta in held.tensors)
            able = [replica for replica in left if self.links[replica].may_send(nbytes)]
            if left and (not able or not all(self.links[replica].open for replica in left)):
                return  # a link that is only about to open is not one that has fallen behind
            self._held.popleft()
            held.exchange.waiting -= 1
            if len(able) < len(left):
                held.exchange.counters["copies_left_out"] += len(left) - len(able)
                for row in held.rows:
                    self._dropped_out.setdefault(row.session, set()).update(set(left) - set(able))
            for replica in able:
                held.exchange.send(
                    self.links[replica], held.rows, held.tensors, held.buffers, held.ready_ns, held.coding
                )

    # -- second copies ------------------------------------------------------------------------------------------

    @property
    def due_ns(self) -> int | None:
        """When the next second copy goes out, if its first is not used up by then."""
        while self._copies and self._answered(self._copies[0]):
            self._copies.popleft()
        return self._copies[0].due_ns if self._copies else None

    def send_copies(self, exchange: Exchange, now_ns: int, places: PlacesOf, open_: Callable[[Row], bool]) -> None:
        """Send the copies that are due, to the replica of their session that has the least to do."""
        while (due_ns := self.due_ns) is not None and due_ns <= now_ns:
            copy = self._copies.popleft()
            rows = copy.rows
            if not open_(rows[0]):
                continue  # answered, or given up
            others = [r for r in places(rows[0].session).get(self.actor, ()) if r != copy.replica and r in self.links]
            nbytes = sum(meta.nbytes for meta in copy.tensors)
            able = [replica for replica in others if self.links[replica].may_send(nbytes)]
            if able:
                best = min(able, key=lambda replica: self.links[replica].queued)
                exchange.counters["second_copies"] += 1
                exchange.send(self.links[best], rows, copy.tensors, copy.buffers, copy.ready_ns, copy.coding)

    def _answered(self, copy: _Copy) -> bool:
        link = self.links.get(copy.replica)
        return link is None or link.used >= copy.sequence

    def _used(self, replica: int, took_ns: int) -> None:
        before = self._latency_ns.get(replica)
        self._latency_ns[replica] = took_ns if before is None else before + WEIGHT * (took_ns - before)
        self._samples.append(took_ns)
        self._ranked_in -= 1
        if self._policy.after and self._ranked_in <= 0:
            self._ranked_in = RANK_EVERY
            ordered = sorted(self._samples)
            self._late_ns = ordered[math.ceil(self._policy.after / 100 * len(ordered)) - 1]


class Answers:
    """What has come by the edges that bring a step more than once: the first counts.

    The first answers of one session come in the order of its positions, so the last one seen is all there is to know.
    """

    def __init__(self) -> None:
        self._last: dict[int, dict[int, int]] = {}

    def add(self, edge: int) -> None:
        self._last.setdefault(edge, {})

    def __contains__(self, edge: int) -> bool:
        return edge in self._last

    def first(self, edge: int, row: Row) -> bool:
        """Whether this step comes for the first time by this edge. The session must be open, the epoch its own."""
        seen = self._last[edge]
        if row.position <= seen.get(row.session, -1):
            return False
        seen[row.session] = row.position
        return True

    def close(self, session: int) -> None:
        """Forget a session."""
        for seen in self._last.values():
            seen.pop(session, None)
