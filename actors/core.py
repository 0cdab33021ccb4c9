"""What a host decides, without I/O: which rows to join, what to batch, what to refuse, where outputs go.

Events come in (`on_message`, `open`, `close`), work comes out (`take`), its result goes back in (`complete`). The step
thread drives it over ZeroMQ; the tests drive the same over memory wires.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec
import torch

from ranvier.transport.errors import ProtocolError
from ranvier.transport.exchange import Exchange, Received, ReceivingLink, RefusedMessage, SendingLink
from ranvier.transport.header import Row
from ranvier.transport.tensors import LOOK_EVERY, encode, from_buffer, to_buffer

from .actor import Batch
from .join import Join, Late, Overdue, Part
from .spec import HostLink, PortSpec


class Work(msgspec.Struct, frozen=True, eq=False):
    """One step to take, or a piece of one: rows that have what they need, and the messages they were in. `pieces` are what
    was laid together."""

    batch: Batch
    sources: tuple[Received, ...]
    pieces: tuple[Work, ...] = ()


class Loop(NamedTuple):
    """What an edge that a user's actor feeds back to itself carries: the port that says done, and a bound."""

    until: str | None
    at_most: int


class HostCore:
    """The decisions of one host.

    Args:
        inputs, outputs: the actor's ports.
        links: every link at this host, with the port at this end.
        exchange: the links' own state.
        batch_tokens: at most so many tokens are laid together in one step (a single message may hold more).
        needed: how many input ports make a step; all if it is not given.
    """

    def __init__(
        self,
        inputs: Iterable[PortSpec],
        outputs: Iterable[PortSpec],
        links: Iterable[HostLink],
        exchange: Exchange,
        batch_tokens: int,
        needed: int | None = None,
    ) -> None:
        self.exchange = exchange
        self.counters: Counter[str] = Counter()
        self._inputs = {port.name: port for port in inputs}
        self._output_specs = {port.name: port.tensor for port in outputs}
        self._outputs: dict[str, list[SendingLink]] = {port: [] for port in self._output_specs}
        self._in: dict[ReceivingLink, HostLink] = {}
        self._loops: dict[str, tuple[SendingLink, Loop]] = {}
        for link in links:
            spec = link.link
            if link.outgoing:
                sending = exchange.sending[spec.edge, spec.target]
                if link.at_most:
                    self._loops[link.port] = sending, Loop(link.until, link.at_most)
                else:
                    self._outputs[link.port].append(sending)
            else:
                self._in[exchange.receiving[spec.edge, spec.source]] = link
        self._batch_tokens = batch_tokens
        self._stacks = all(port.stacks for port in self._inputs.values())
        self._epochs: dict[int, int] = {}
        self._ready: deque[Work] = deque()
        arrivals = sum(not link.feedback for link in self._in.values())
        # one port and nothing to choose from: messages are steps as they come
        plain = len(self._inputs) == 1 and needed is None
        self._join = None if plain else Join(tuple(self._inputs), needed or len(self._inputs), arrivals)
        self._rows_left: dict[tuple[ReceivingLink, int], int] = {}

    # -- sessions -----------------------------------------------------------------------------------------------

    def open(self, session: int, epoch: int) -> None:
        """Rows of the session are taken from now on, those of any other epoch refused."""
        self._epochs[session] = epoch

    def close(self, session: int) -> bool:
        """Rows of the session are refused from now on. False if it was not open."""
        if self._join is not None:
            self._use_up(part.source for part in self._join.drop(session))
        return self._epochs.pop(session, None) is not None

    @property
    def sessions(self) -> tuple[int, ...]:
        return tuple(self._epochs)

    # -- in -----------------------------------------------------------------------------------------------------

    def on_message(self, received: Received) -> None:
        """Queue a message; a port that waits for others keeps its rows until they are there.

        Raises:
            RefusedMessage: its bytes are not what its codec writes.
        """
        header = received.header
        rows = header.rows
        here = self._in[received.link]
        if here.feedback:
            # What comes back is bounded by the open sessions, one step each. Its credit returns at once, so that a
            # ring of full links cannot stand still.
            self.exchange.consumed(received.link, received.nbytes)
        try:
            tensor = from_buffer(header.tensors[0], received.buffers[0])
        except ProtocolError as error:  # a codec's bytes that are not what the header says
            if not here.feedback:
                self.exchange.consumed(received.link, received.nbytes)
            raise RefusedMessage(f"edge {received.link.spec.name}: {error}", rows) from None
        if self._join is None:
            self._ready.append(Work(Batch(rows, {here.port: tensor}), (received,)))
        else:
            self._rows_left[received.link, header.sequence] = len(rows)
            self._offer(self._join, here.port, rows, tensor, received)

    def _offer(self, join: Join, port: str, rows: tuple[Row, ...], tensor: torch.Tensor, received: Received) -> None:
        for row, part in zip(rows, self._split(port, rows, tensor), strict=True):
            if self._epochs.get(row.session) != row.epoch:
                self.counters["rows_refused"] += 1
                self._use_up((received,))
                continue
            try:
                whole = join.offer(port, Part(row, part, received))
            except Late:
                self.counters["rows_late"] += 1
                self._use_up((received,))
                continue
            if whole is not None:
                parts = whole.values()
                tensors = {name: held.tensor for name, held in whole.items()}
                lead = next(iter(parts)).row
                own = {name: (held.row,) for name, held in whole.items() if held.row != lead}
                self._ready.append(Work(Batch((lead,), tensors, own), tuple(held.source for held in parts)))

    def overdue(self, before_ns: int) -> list[Overdue]:
        """Steps that have waited at the join since before then."""
        return self._join.overdue(before_ns) if self._join is not None else []

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
            if pieces and piece.batch.tensors.keys() != pieces[0].batch.tensors.keys():
                break  # other ports came first
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
                {port: torch.cat([piece.batch[port] for piece in pieces]) for port in pieces[0].batch.tensors},
                self._own_rows(pieces),
            ),
            tuple(source for piece in pieces for source in piece.sources),
            tuple(pieces),
        )

    def _own_rows(self, pieces: list[Work]) -> dict[str, tuple[Row, ...]]:
        ports = {port for piece in pieces for port in piece.batch.own_rows}
        return {port: tuple(row for piece in pieces for row in piece.batch.rows_of(port)) for port in ports}

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
            loop = self._loops.get(port)
            if not links and loop is None:
                continue
            rows, tensor = (value.rows, value.tensors[port]) if isinstance(value, Batch) else (work.batch.rows, value)
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"step returned {type(tensor).__name__} for the port {port!r}, expected a torch.Tensor")
            if loop is not None:
                rows, tensor = self._go_round(port, rows, tensor, *loop, outputs, ready_ns)
            if rows:
                self._send(port, links, rows, tensor, ready_ns)

    def _send(
        self, port: str, links: list[SendingLink], rows: tuple[Row, ...], tensor: torch.Tensor, ready_ns: int
    ) -> None:
        plain = None
        for link in links:
            if link.raw:
                meta, buffer = plain = plain or to_buffer(port, tensor)
                self.exchange.send(link, rows, (meta,), (buffer,), ready_ns)
            else:
                meta, buffer, coding = encode(port, tensor, link.codec, link.sent % LOOK_EVERY == 0)
                link.sent += 1
                self.exchange.send(link, rows, (meta,), (buffer,), ready_ns, coding)

    def _go_round(
        self,
        port: str,
        rows: tuple[Row, ...],
        tensor: torch.Tensor,
        link: SendingLink,
        loop: Loop,
        outputs: Mapping[str, torch.Tensor | Batch],
        ready_ns: int,
    ) -> tuple[tuple[Row, ...], torch.Tensor]:
        """Send on what goes round once more, one position further; what is done, or was round often enough, remains."""
        if loop.until is None and len(rows) == 1 and rows[0].position + 1 < loop.at_most:
            self._send(port, [link], (rows[0]._replace(position=rows[0].position + 1),), tensor, ready_ns)
            return (), tensor
        done = outputs.get(loop.until) if loop.until is not None else None
        said = [False] * len(rows)
        if isinstance(done, torch.Tensor):
            if done.numel() != len(rows):
                raise ValueError(
                    f"step returned {list(done.shape)} for the port {loop.until!r}, expected one of {len(rows)} rows each"
                )
            said = [bool(flag) for flag in done.reshape(-1).tolist()]
        goes = [not flag and row.position + 1 < loop.at_most for flag, row in zip(said, rows, strict=True)]
        if not any(goes):
            return rows, tensor
        parts = self._split_output(port, rows, tensor)
        on = tuple(row._replace(position=row.position + 1) for row, going in zip(rows, goes, strict=True) if going)
        self._send(port, [link], on, torch.cat([p for p, going in zip(parts, goes, strict=True) if going]), ready_ns)
        left = [part for part, going in zip(parts, goes, strict=True) if not going]
        return tuple(row for row, going in zip(rows, goes, strict=True) if not going), torch.cat(left or [tensor[:0]])

    def _split_output(self, port: str, rows: tuple[Row, ...], tensor: torch.Tensor) -> list[torch.Tensor]:
        if len(rows) == 1:
            return [tensor]
        by_tokens = self._output_specs[port].shape[:1] == ("tokens",)
        return list(torch.split(tensor, [row.tokens if by_tokens else 1 for row in rows]))

    def alone(self, work: Work) -> list[Work]:
        """One work a row of the batch, to find out which sessions a failing step is due to. They hold no credit."""
        if work.pieces:
            return [single for piece in work.pieces for single in self.alone(piece)]
        batch = work.batch
        if len(batch.rows) == 1:
            return [Work(batch, ())]
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
            if self._join is not None:
                key = received.link, received.header.sequence
                self._rows_left[key] -= 1
                if self._rows_left[key]:
                    continue
                del self._rows_left[key]
            if not self._in[received.link].feedback:
                self.exchange.consumed(received.link, received.nbytes)
            done.append(received)
        return done
