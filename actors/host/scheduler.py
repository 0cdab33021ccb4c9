"""Decide, without I/O, which rows a host joins, batches and refuses, and where its outputs go.

Events go in (`on_message`, `open`, `close`), work comes out (`take`), and its result goes back in (`complete`). The
step thread drives this over ZeroMQ, the tests over memory wires.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import MAX_ROWS, Row
from ranvier.transport.format.tensors import from_buffer
from ranvier.transport.links.exchange import Exchange, RefusedMessage
from ranvier.transport.links.link_state import Received, ReceivingLink

from ..component.actor import Batch
from ..protocol.host_spec import HostLink, PortSpec
from .batcher import Batcher, Work
from .join import Gate, Join, Late, Overdue, Part
from .outputs import Outputs
from .route import Answers, Replicas


class HostCore:
    """Make the decisions of one host.

    Args:
        inputs, outputs: the actor's ports.
        links: every link at this host, with the port at this end.
        exchange: the state of the links.
        batch_tokens: the maximum number of tokens of a batched step. A single message may hold more.
        needed: the number of input ports that complete a step; None: all.
        batches: the number of batches that the open sessions are divided into. Use more than one where tokens return to
            the start of a ring of stages. With all sessions in one batch, one stage would work while the others wait.
    """

    def __init__(
        self,
        inputs: Iterable[PortSpec],
        outputs: Sequence[PortSpec],
        links: Iterable[HostLink],
        exchange: Exchange,
        batch_tokens: int,
        needed: int | None = None,
        batches: int = 1,
    ) -> None:
        self.exchange = exchange
        self.counters: Counter[str] = Counter()
        self.discarded: list[Received] = []
        self._inputs = {port.name: port for port in inputs}
        self.outputs = Outputs(outputs, exchange)
        self._in: dict[ReceivingLink, HostLink] = {}
        self._answers = Answers()
        self._arriving: set[int] = set()
        self._join: Join | None = None
        self._batches = batches
        # rows may share a step only if every output has a dimension of tokens or rows
        self._most_rows = MAX_ROWS if all(port.stacks for port in outputs) else 1
        self._epochs: dict[int, int] = {}
        self._newest = (0, 0)
        self._early: dict[tuple[int, int], list[tuple[HostLink, Row, torch.Tensor, Received]]] = {}
        self._batcher = Batcher(self._inputs, batch_tokens, self._current, self._share)
        self.queue = self._batcher.waiting
        """The pieces that wait for a step."""
        once = [port.name for port in self._inputs.values() if port.once]
        joined = tuple(port for port in self._inputs if port not in once)
        self._gate: Gate[Work] | None = Gate(once) if once else None
        # one port and nothing to join: each message is a step
        plain = len(self._inputs) == 1 and needed is None
        if not plain:
            self._join = Join(joined, needed or len(joined))
        self._joined = joined
        self._shares: dict[tuple[ReceivingLink, int], int] = {}
        for link in links:
            self.add(link)

    # -- links --------------------------------------------------------------------------------------------------

    def add(self, link: HostLink) -> None:
        """Add a link, which the exchange already has."""
        edge = link.link.edge
        if link.outgoing:
            self.outputs.add(link)
            return
        self._in[self.exchange.receiver(link.link)] = link
        if link.repeats:
            self._answers.add(edge)
        if self._join is not None and not link.feedback and link.port in self._joined:
            self._arriving.add(edge)
            self._join.arrivals = len(self._arriving)

    def remove(self, peer: str) -> None:
        """Remove the links with a replica that has left."""
        self.outputs.remove(peer)
        self._in = {link: here for link, here in self._in.items() if link.peer != peer}

    def send_copies(self, now_ns: int) -> None:
        """Send the second copies that are due."""
        self.outputs.send_copies(now_ns, self._is_open)

    # -- sessions -----------------------------------------------------------------------------------------------

    def open(self, session: int, epoch: int, replicas: Replicas | None = None, reads: Collection[str] = ()) -> None:
        """Accept rows of the session and epoch from now on. Rows of the session in any other epoch are refused.

        Sessions open in the order of their epochs, and within an epoch in the order of their numbers. Rows that arrived
        before their session opened were kept, and are queued now. `reads` are the names of what the session reads.
        """
        self._epochs[session] = epoch
        if reads:
            self.outputs.read_by(session, reads)
        if replicas:
            self.outputs.open(session, replicas)
        if (epoch, session) > self._newest:
            self._newest = epoch, session
            for early in [early for early in self._early if early <= self._newest]:
                for here, row, tensor, received in self._early.pop(early):
                    self._put(here, (row,), tensor, received)

    def _is_open(self, row: Row) -> bool:
        return self._epochs.get(row.session) == row.epoch

    def close(self, session: int) -> bool:
        """Refuse rows of the session from now on. Return False if it was not open."""
        if self._join is not None:
            self._discard(part.source for part in self._join.drop(session))
        if self._gate is not None:
            for work in self._gate.drop(session):
                self._discard(work.sources)
        self._answers.close(session)
        self.outputs.close(session)
        was_open = self._epochs.pop(session, None) is not None
        if self.exchange.waiting:
            self.outputs.give_up(self._is_open)
        return was_open

    @property
    def sessions(self) -> tuple[int, ...]:
        return tuple(self._epochs)

    # -- in -----------------------------------------------------------------------------------------------------

    def on_message(self, received: Received) -> None:
        """Queue a message. Rows that must be joined wait until the other ports have theirs.

        Raises:
            RefusedMessage: the codec cannot decode the bytes of the message.
        """
        header = received.header
        rows = header.rows
        here = self._in[received.link]
        if here.feedback:
            # Feedback is bounded by the open sessions, one step each. Its credit returns at once, so that a ring of
            # full links cannot deadlock.
            self.exchange.consumed(received.link, received.nbytes)
        try:
            tensor = from_buffer(header.tensors[0], received.buffers[0])
        except ProtocolError as error:  # the bytes do not match the header
            if not here.feedback:
                self.exchange.consumed(received.link, received.nbytes)
            raise RefusedMessage(f"edge {received.link.spec.name}: {error}", rows) from None
        if self._join is not None:
            self._shares[received.link, header.sequence] = len(rows)
        newest = self._newest
        for row in rows:
            if (row.epoch, row.session) > newest:
                self._keep_early(here, rows, tensor, received)
                return
        self._put(here, rows, tensor, received)

    def _keep_early(self, here: HostLink, rows: tuple[Row, ...], tensor: torch.Tensor, received: Received) -> None:
        """Keep rows of sessions that have not opened here yet: the command `open` comes over another socket."""
        parts = self._batcher.split(here.port, rows, tensor)
        early = [(row.epoch, row.session) > self._newest for row in rows]
        if self._join is None:
            self._shares[received.link, received.header.sequence] = sum(early) + (not all(early))
        for row, part in zip(itertools.compress(rows, early), itertools.compress(parts, early), strict=True):
            self._early.setdefault((row.epoch, row.session), []).append((here, row, part, received))
        if not all(early):
            known = [not is_early for is_early in early]
            self._put(
                here,
                tuple(itertools.compress(rows, known)),
                torch.cat(list(itertools.compress(parts, known))),
                received,
            )

    def _put(self, here: HostLink, rows: tuple[Row, ...], tensor: torch.Tensor, received: Received) -> None:
        if self._join is not None:
            self._offer(self._join, here.port, rows, tensor, received)
            return
        piece = Work(Batch(rows, {here.port: tensor}), (received,))
        kept = self._without_repeats(piece, here) if here.repeats else piece
        if kept is not None:
            self._batcher.add(kept)

    def _offer(self, join: Join, port: str, rows: tuple[Row, ...], tensor: torch.Tensor, received: Received) -> None:
        for row, part in zip(rows, self._batcher.split(port, rows, tensor), strict=True):
            if not self._is_open(row):
                self.counters["rows_refused"] += 1
                self._discard((received,))
                continue
            edge = received.link.spec.edge
            if edge in self._answers and not self._answers.first(edge, row):
                self.counters["rows_late"] += 1
                self._discard((received,))
                continue
            if self._gate is not None and port in self._gate:
                self._batcher.add(Work(Batch((row,), {port: part}), (received,)))
                for work in self._gate.came(row.session, port):
                    self._batcher.add(work)
                continue
            try:
                whole = join.offer(port, Part(row, part, received))
            except Late:
                self.counters["rows_late"] += 1
                self._discard((received,))
                continue
            if whole is not None:
                parts = whole.values()
                tensors = {name: held.tensor for name, held in whole.items()}
                lead = next(iter(parts)).row
                own = {name: (held.row,) for name, held in whole.items() if held.row != lead}
                work = Work(Batch((lead,), tensors, own), tuple(held.source for held in parts))
                if self._gate is None or not self._gate.holds(work, lead, received.received_ns):
                    self._batcher.add(work)

    def overdue(self, before_ns: int) -> list[Overdue]:
        """Return the steps that have waited at the join, or for a `once` input, since before `before_ns`."""
        found = self._join.overdue(before_ns) if self._join is not None else []
        return found + (self._gate.overdue(before_ns) if self._gate is not None else [])

    # -- work ---------------------------------------------------------------------------------------------------

    @property
    def may_batch(self) -> bool:
        """Return whether several sessions are open. Only then is it worth 15 µs to look for more messages to batch."""
        return len(self._epochs) > 1

    def take(self) -> Work | None:
        """Return the next step (see `Batcher.take`); None if nothing is queued, or if an output waits for credit."""
        if not self.queue or self.exchange.waiting:
            return None
        return self._batcher.take(self._most_rows if self._batches == 1 else self._rows_of_a_batch())

    def _rows_of_a_batch(self) -> int:
        """Return the maximum number of rows of one of several batches.

        It is at least 1: when no session is open, the queued rows must still be taken, to be dropped.
        """
        return min(self._most_rows, max(1, -(-len(self._epochs) // self._batches)))

    def abandon(self) -> tuple[Row, ...]:
        """Drop the pieces that the last, failed `take` was batching, and give back their credit.

        Returns the rows of these pieces. Their sessions have lost a step.
        """
        taken = self._batcher.abandon()
        for piece in taken:
            self._discard(piece.sources)
        return tuple(dict.fromkeys(row for piece in taken for row in piece.batch.rows))

    def _share(self, piece: Work) -> None:
        """Note that the message of a piece goes into one more step."""
        [received] = piece.sources  # only joined pieces have several sources, and these have one row
        key = received.link, received.header.sequence
        self._shares[key] = self._shares.get(key, 1) + 1

    def _current(self, piece: Work) -> Work | None:
        """Remove rows of closed sessions and of other epochs from a piece. Return None if no row is left."""
        epochs, rows = self._epochs, piece.batch.rows
        for row in rows:
            if epochs.get(row.session) != row.epoch:
                break
        else:
            return piece
        return self._filtered(piece, [self._is_open(row) for row in rows], "rows_refused")

    def _without_repeats(self, piece: Work, here: HostLink) -> Work | None:
        """Remove rows that another replica has answered already from a piece. Return None if no row is left."""
        edge = here.link.edge
        first = [not self._is_open(row) or self._answers.first(edge, row) for row in piece.batch.rows]
        return piece if all(first) else self._filtered(piece, first, "rows_late")

    def _filtered(self, piece: Work, keep: list[bool], counter: str) -> Work | None:
        rows = piece.batch.rows
        self.counters[counter] += len(rows) - sum(keep)
        if not any(keep):
            self._discard(piece.sources)
            return None
        return self._batcher.part(piece, keep)

    def complete(
        self,
        work: Work,
        outputs: Mapping[str, torch.Tensor | Batch],
        ready_ns: int,
        soles: frozenset[str] = frozenset(),
    ) -> None:
        """Send the outputs of a step down their edges. See `Outputs.send`, also for the errors."""
        self.outputs.send(work.batch.rows, outputs, ready_ns, soles)

    def alone(self, work: Work) -> list[Work]:
        """Make a step of each row of a step, to find the sessions that make it fail. These steps hold no credit."""
        return self._batcher.alone(work)

    def finish(self, work: Work) -> list[Received]:
        """Give back the credit of a step that has ended or failed, and return its used-up messages."""
        return self._use_up(work.sources)

    def _discard(self, sources: Iterable[Received]) -> None:
        self.discarded += self._use_up(sources)

    def _use_up(self, sources: Iterable[Received]) -> list[Received]:
        """Give back the credit of messages that are used up, and return these.

        A message whose rows went into several steps is used up with the last of these steps.
        """
        done = []
        for received in sources:
            if self._shares:
                key = received.link, received.header.sequence
                left = self._shares.pop(key, 1) - 1
                if left:
                    self._shares[key] = left
                    continue
            here = self._in.get(received.link)
            if here is not None and not here.feedback:
                self.exchange.consumed(received.link, received.nbytes)
            done.append(received)
        return done
