"""What a host decides, without I/O: which rows to join, what to batch, what to refuse, where outputs go.

Events come in (`on_message`, `open`, `close`), work comes out (`take`), its result goes back in (`complete`). The step
thread drives it over ZeroMQ; the tests drive the same over memory wires.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping

import msgspec
import torch

from ranvier.transport.exchange import Exchange, Received, ReceivingLink, SendingLink
from ranvier.transport.header import Row
from ranvier.transport.tensors import from_buffer, to_buffer

from .actor import Batch
from .spec import HostLink, PortSpec


class Work(msgspec.Struct, frozen=True, eq=False):
    """One step to take, or a piece of one: rows that have a tensor for every input port, and the messages they were in."""

    batch: Batch
    sources: tuple[Received, ...]


class HostCore:
    """The decisions of one host.

    Args:
        inputs, outputs: the actor's ports.
        links: every link at this host, with the port at this end.
        exchange: the links' own state.
        batch_tokens: at most so many tokens are laid together in one step (a single message may hold more).
    """

    def __init__(
        self,
        inputs: Iterable[PortSpec],
        outputs: Iterable[PortSpec],
        links: Iterable[HostLink],
        exchange: Exchange,
        batch_tokens: int,
    ) -> None:
        self.exchange = exchange
        self.counters: Counter[str] = Counter()
        self._inputs = {port.name: port for port in inputs}
        self._outputs: dict[str, list[SendingLink]] = {port.name: [] for port in outputs}
        self._in: dict[ReceivingLink, HostLink] = {}
        for link in links:
            spec = link.link
            if link.outgoing:
                self._outputs[link.port].append(exchange.sending[spec.edge, spec.target])
            else:
                self._in[exchange.receiving[spec.edge, spec.source]] = link
        self._batch_tokens = batch_tokens
        self._stacks = all(port.stacks for port in self._inputs.values())
        self._epochs: dict[int, int] = {}
        self._ready: deque[Work] = deque()
        self._partial: dict[Row, dict[str, tuple[torch.Tensor, Received]]] = {}
        self._rows_left: dict[tuple[ReceivingLink, int], int] = {}

    # -- sessions -----------------------------------------------------------------------------------------------

    def open(self, session: int, epoch: int) -> None:
        """Rows of the session are taken from now on, those of any other epoch refused."""
        self._epochs[session] = epoch

    def close(self, session: int) -> bool:
        """Rows of the session are refused from now on. False if it was not open."""
        for row in [row for row in self._partial if row.session == session]:
            self._use_up(source for _, source in self._partial.pop(row).values())
        return self._epochs.pop(session, None) is not None

    @property
    def sessions(self) -> tuple[int, ...]:
        return tuple(self._epochs)

    # -- in -----------------------------------------------------------------------------------------------------

    def on_message(self, received: Received) -> None:
        """Queue a message; a port that waits for others keeps its rows until they are there."""
        header = received.header
        rows = header.rows
        here = self._in[received.link]
        if here.feedback:
            # What comes back is bounded by the open sessions, one step each. Its credit returns at once, so that a
            # ring of full links cannot stand still.
            self.exchange.consumed(received.link, received.nbytes)
        tensor = from_buffer(header.tensors[0], received.buffers[0])
        if len(self._inputs) == 1:
            self._ready.append(Work(Batch(rows, {here.port: tensor}), (received,)))
        else:
            self._rows_left[received.link, header.sequence] = len(rows)
            self._join(here.port, rows, tensor, received)

    def _join(self, port: str, rows: tuple[Row, ...], tensor: torch.Tensor, received: Received) -> None:
        """`join: all`. A row waits until every port holds the same (session, epoch, position, tokens)."""
        for row, part in zip(rows, self._split(port, rows, tensor), strict=True):
            held = self._partial.setdefault(row, {})
            if port in held:
                self.counters["rows_repeated"] += 1
                self._use_up((received,))
                continue
            held[port] = part, received
            if len(held) == len(self._inputs):
                del self._partial[row]
                tensors = {name: held[name][0] for name in self._inputs}
                self._ready.append(Work(Batch((row,), tensors), tuple(held[name][1] for name in self._inputs)))

    def _split(self, port: str, rows: tuple[Row, ...], tensor: torch.Tensor) -> list[torch.Tensor]:
        if len(rows) == 1:
            return [tensor]
        by_tokens = self._inputs[port].tensor.shape[0] == "tokens"
        return list(torch.split(tensor, [row.tokens if by_tokens else 1 for row in rows]))

    # -- work ---------------------------------------------------------------------------------------------------

    @property
    def may_batch(self) -> bool:
        """Whether several sessions are open: looking for more that came in costs 15 µs, and one has nothing to add."""
        return len(self._epochs) > 1

    @property
    def queued(self) -> int:
        """Pieces that wait for a step."""
        return len(self._ready)

    def take(self) -> Work | None:
        """The next step: what has queued up, one row a session, up to the token budget. None if there is none or an
        output has no credit."""
        if not self._ready or self.exchange.waiting:
            return None
        if len(self._ready) == 1:
            return self._current(self._ready.popleft())
        pieces: list[Work] = []
        sessions: set[int] = set()
        tokens = 0
        while self._ready:
            piece = self._ready[0]
            size = piece.batch.tokens
            if pieces and (not self._stacks or tokens + size > self._batch_tokens):
                break
            if not sessions.isdisjoint(row.session for row in piece.batch.rows):
                break  # a session's next step stands on the one before
            self._ready.popleft()
            current = self._current(piece)
            if current is not None:
                pieces.append(current)
                tokens += size
                sessions.update(row.session for row in current.batch.rows)
        if len(pieces) < 2:
            return pieces[0] if pieces else None
        return Work(
            Batch(
                tuple(row for piece in pieces for row in piece.batch.rows),
                {port: torch.cat([piece.batch[port] for piece in pieces]) for port in self._inputs},
            ),
            tuple(source for piece in pieces for source in piece.sources),
        )

    def _current(self, piece: Work) -> Work | None:
        """The piece without rows of sessions that are closed or of another epoch; None if no row is left."""
        epochs, rows = self._epochs, piece.batch.rows
        for row in rows:
            if epochs.get(row.session) != row.epoch:
                break
        else:
            return piece
        kept = tuple(row for row in rows if epochs.get(row.session) == row.epoch)
        self.counters["rows_refused"] += len(rows) - len(kept)
        if not kept:
            self._use_up(piece.sources)
            return None
        tensors = {
            port: torch.cat([part for row, part in zip(rows, self._split(port, rows, tensor), strict=True)
                             if epochs.get(row.session) == row.epoch])
            for port, tensor in piece.batch.tensors.items()
        }  # fmt: skip
        return Work(Batch(kept, tensors), piece.sources)

    def complete(self, work: Work, outputs: Mapping[str, torch.Tensor | Batch], ready_ns: int) -> None:
        """Send the outputs of a step down their edges.

        Raises:
            ProtocolError: an output is not what its edge carries.
            ValueError, TypeError: the actor returned a port it does not have, or no tensor.
        """
        for port, value in outputs.items():
            links = self._outputs.get(port)
            if links is None:
                raise ValueError(f"step returned the port {port!r}; the actor's outputs are {', '.join(self._outputs)}")
            if not links:
                continue
            rows, tensor = (value.rows, value.tensors[port]) if isinstance(value, Batch) else (work.batch.rows, value)
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"step returned {type(tensor).__name__} for the port {port!r}, expected a torch.Tensor")
            if not rows:
                continue
            meta, buffer = to_buffer(port, tensor)
            for link in links:
                self.exchange.send(link, rows, (meta,), (buffer,), ready_ns)

    def alone(self, work: Work) -> list[Work]:
        """One work a row of the batch, to find out which sessions a failing step is due to. They hold no credit."""
        batch = work.batch
        parts = {port: self._split(port, batch.rows, tensor) for port, tensor in batch.tensors.items()}
        return [
            Work(Batch((row,), {port: split[index] for port, split in parts.items()}), ())
            for index, row in enumerate(batch.rows)
        ]

    def finish(self, work: Work) -> list[Received]:
        """The step is over, well or not: give its credit back. Returns the messages that are done with."""
        return self._use_up(work.sources)

    def _use_up(self, sources: Iterable[Received]) -> list[Received]:
        """The messages that are done with. Where rows of one are joined with rows of others, the last row ends it."""
        done = []
        for received in sources:
            if len(self._inputs) > 1:
                key = received.link, received.header.sequence
                self._rows_left[key] -= 1
                if self._rows_left[key]:
                    continue
                del self._rows_left[key]
            if not self._in[received.link].feedback:
                self.exchange.consumed(received.link, received.nbytes)
            done.append(received)
        return done
