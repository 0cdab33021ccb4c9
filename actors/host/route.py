"""Choose the replica of an actor that a row goes to, and drop repeated answers. No I/O.

A session is opened at some replicas of each actor and stays with them (`SessionInfo.replicas`). Among these the sender
chooses by the actor's policy. Policies that use only the session and the position choose alike at every sender, so rows
that must be joined reach the same replica.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ranvier.transport.format.header import Row
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link_state import Outbound, SendingLink

from ..protocol.host_spec import STICKY, Policy

Replicas = Mapping[str, tuple[int, ...]]
"""The replicas of one session, by actor."""
ReplicasOf = Callable[[int], Replicas]
WEIGHT = 0.1
"""Weight of the newest message in the moving average of the latencies."""
RETRY_EVERY = 64
"""With `lowest_latency`, one row in this many goes to the next replica in turn: a slow replica may be fast by now."""
SAMPLES = 256
"""Number of recent messages over which the percentile for second copies is taken."""
RANK_EVERY = 16
"""Number of messages after which the percentile is computed again."""
FEWEST_SAMPLES = 20
"""Until this many messages are used up there is no percentile, and second copies go out at once."""
_EVERYWHERE: tuple[int, ...] = (0,)


class _Copy(NamedTuple):
    """Describe a message of which a second replica may get a copy."""

    due_ns: int
    replica: int
    sequence: int
    message: Outbound


class _Held(NamedTuple):
    """Describe a hedged message for which no replica has credit yet."""

    exchange: Exchange
    replicas: tuple[int, ...]
    message: Outbound


class Route:
    """Represent one edge at its sending end.

    Args:
        edge: the number of the edge.
        actor: the receiving actor.
        policy, skips: see `HostLink`.

    `only` is the link to the only replica, or None if there are several.
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
        replica = link.spec.target.replica
        self.links[replica] = link
        self.only = link if len(self.links) == 1 else None
        if self._policy.by_load:
            link.on_used = lambda took_ns: self._used(replica, took_ns)
        elif self._skips and self._policy.copies > 1:
            link.on_credit = self._send_held

    def remove(self, peer: str) -> None:
        """Remove the link to a replica that has left."""
        self.links = {replica: link for replica, link in self.links.items() if link.peer != peer}
        self.only = next(iter(self.links.values())) if len(self.links) == 1 else None
        self._send_held()

    def close(self, session: int) -> None:
        """Forget a session."""
        self._dropped_out.pop(session, None)

    def give_up(self, wanted: Callable[[Row], bool]) -> None:
        """Drop the held messages that have no `wanted` row."""
        kept = deque[_Held]()
        for held in self._held:
            if any(wanted(row) for row in held.message.rows):
                kept.append(held)
            else:
                held.exchange.release(given_up=True)
        self._held = kept

    # -- choosing -----------------------------------------------------------------------------------------------

    def groups(self, rows: Sequence[Row], replicas_of: ReplicasOf) -> list[tuple[tuple[int, ...], list[int]]]:
        """Group the rows by destination: pairs of replicas and of row indices.

        Each of the replicas gets a copy. No replicas means that the session has lost all of them. With `policy.after`,
        each row is a group by itself, because it may need a second copy.
        """
        made: dict[tuple[int, ...], list[int]] = {}
        chosen_now: dict[int, int] = {}
        for index, row in enumerate(rows):
            replicas = self._choose(row, replicas_of(row.session), chosen_now)
            out = self._dropped_out.get(row.session)
            if out is not None:
                replicas = tuple(replica for replica in replicas if replica not in out)
            made.setdefault(replicas, []).append(index)
        if self._policy.after:
            return [(replicas, [index]) for replicas, own in made.items() for index in own]
        return list(made.items())

    def _choose(self, row: Row, own: Replicas, chosen_now: dict[int, int]) -> tuple[int, ...]:
        replicas = own.get(self.actor, _EVERYWHERE)
        policy = self._policy
        if not all(replica in self.links for replica in replicas):  # lost: its sessions start again elsewhere
            replicas = tuple(replica for replica in replicas if replica in self.links)
        if len(replicas) <= 1 or policy.opened is not None:
            return replicas
        if policy.name == "round_robin":
            return (replicas[(row.session + row.position) % len(replicas)],)
        # by load; round robin among equals
        turn = (row.session + row.position) % len(replicas)
        in_turn = replicas[turn:] + replicas[:turn]
        if policy.name == "lowest_latency":
            # replicas without a measured latency come first, replicas without credit last
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

    def send(self, exchange: Exchange, replicas: tuple[int, ...], message: Outbound) -> None:
        """Send one message to each of `replicas`.

        With `skips`, a replica that has no credit gets no more copies of that session while another replica has credit. So
        the slowest replica does not delay the fastest.
        """
        if not replicas:
            exchange.count("rows_unsent", len(message.rows))
            return
        if self._policy.copies > 1:  # a later copy must carry the present values
            message = message.stable()
        if len(replicas) > 1 and self._skips:
            # while no replica has credit, the slow one is unknown: hold the message until one has
            self._held.append(_Held(exchange, replicas, message))
            exchange.hold()
            self._send_held()
            return
        for replica in replicas:
            exchange.send(self.links[replica], message)
        if self._policy.after:
            link = self.links[replicas[0]]
            sequence = link.window.sequence + len(link.waiting)
            self._copies.append(_Copy(exchange.clock() + self._late_ns, replicas[0], sequence, message))

    def _send_held(self) -> None:
        while self._held:
            held = self._held[0]
            rows = held.message.rows
            out = {replica for row in rows for replica in self._dropped_out.get(row.session, ())}
            left = [replica for replica in held.replicas if replica in self.links and replica not in out]
            nbytes = held.message.nbytes
            able = [replica for replica in left if self.links[replica].may_send(nbytes)]
            if left and (not able or not all(self.links[replica].open for replica in left)):
                return  # a link that is not open yet does not count as slow
            self._held.popleft()
            held.exchange.release()
            if len(able) < len(left):
                held.exchange.count("copies_left_out", len(left) - len(able))
                for row in rows:
                    self._dropped_out.setdefault(row.session, set()).update(set(left) - set(able))
            for replica in able:
                held.exchange.send(self.links[replica], held.message)

    # -- second copies ------------------------------------------------------------------------------------------

    @property
    def due_ns(self) -> int | None:
        """Return when the next second copy goes out if the first copy is not used up by then, or None."""
        while self._copies and self._answered(self._copies[0]):
            self._copies.popleft()
        return self._copies[0].due_ns if self._copies else None

    def send_copies(
        self, exchange: Exchange, now_ns: int, replicas_of: ReplicasOf, open_: Callable[[Row], bool]
    ) -> None:
        """Send the copies that are due, each to the session's other replica with the fewest queued messages."""
        while (due_ns := self.due_ns) is not None and due_ns <= now_ns:
            copy = self._copies.popleft()
            rows = copy.message.rows
            if not open_(rows[0]):
                continue  # the session has ended
            others = [
                r for r in replicas_of(rows[0].session).get(self.actor, ()) if r != copy.replica and r in self.links
            ]
            nbytes = copy.message.nbytes
            able = [replica for replica in others if self.links[replica].may_send(nbytes)]
            if able:
                best = min(able, key=lambda replica: self.links[replica].queued)
                exchange.count("second_copies")
                exchange.send(self.links[best], copy.message)

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
    """Accept the first answer of each step on edges that may bring a step more than once.

    The first answers of a session come in the order of its positions. So only the last accepted position is stored.
    """

    def __init__(self) -> None:
        self._last: dict[int, dict[int, int]] = {}

    def add(self, edge: int) -> None:
        self._last.setdefault(edge, {})

    def __contains__(self, edge: int) -> bool:
        return edge in self._last

    def first(self, edge: int, row: Row) -> bool:
        """Return whether a step comes over this edge for the first time. Its session must be open, in the row's epoch."""
        seen = self._last[edge]
        if row.position <= seen.get(row.session, -1):
            return False
        seen[row.session] = row.position
        return True

    def close(self, session: int) -> None:
        """Forget a session."""
        for seen in self._last.values():
            seen.pop(session, None)
