"""Decide what the gateway does, without I/O: sessions and their logs, admission, prompt chunks, the end of a stream.

For every accepted request each position is delivered at most once and in order. The stream ends with exactly one *done*
or one typed error. The driver (run.py) carries `commands` to the hosts and the exchange's outbox to the wire.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from ranvier.actors.component.inside import READS
from ranvier.actors.component.session import SessionInfo
from ranvier.actors.errors import ActorFailed, Cause, Expired
from ranvier.actors.host.route import Replicas, Route
from ranvier.actors.protocol.control_protocol import Close, Command, Hold, Open, SessionFailed
from ranvier.actors.protocol.host_spec import GATEWAY, HostLink
from ranvier.actors.trace.spans import TraceContext
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Row, TensorMeta
from ranvier.transport.format.message import Buffer
from ranvier.transport.links.exchange import Exchange
from ranvier.transport.links.link_state import Outbound, Received

from .placement import Placement
from .readings import Readings
from .stream import MOST_LOSSES, Stream, Tensors
from .wire_rows import chunks_of, rows_of


class Gateway:
    """Keep the sessions of one run.

    Args:
        exchange: the state of the gateway's links.
        links: the links.
        placement: the hosts, and the replicas of each session.
        prefill_chunk: maximum number of prompt tokens in one message.
        generates: whether tokens come back. If not, clients call the graph's ports with tensors.
        recomputed_after: number of tokens after which a session is opened anew, with all its tokens as its prompt; 0: never.
    """

    def __init__(
        self,
        exchange: Exchange,
        links: Iterable[HostLink],
        placement: Placement,
        prefill_chunk: int,
        generates: bool = True,
        recomputed_after: int = 0,
    ) -> None:
        self.exchange = exchange
        self.placement = placement
        self.commands: list[tuple[Command, list[str]]] = []
        self.streams: dict[int, Stream] = {}
        self._chunk = prefill_chunk
        self._generates = generates
        self._recomputed_after = recomputed_after
        self._next = 1
        self._epoch = 1
        self._timed: dict[int, int] = {}
        self._failure: Exception | None = None
        self.accepted = self.delivered = 0
        """Counts so far of accepted requests, and of tokens delivered to clients."""
        self.on_ended: Callable[[Stream, str | Exception], None] = lambda _stream, _outcome: None
        """Called with each stream that has ended, and its outcome."""
        self.on_delivered: Callable[[Stream, int, int], None] = lambda _stream, _position, _token: None
        """Called with a stream, a position and its token, just before the client gets the token."""
        self._by_port: dict[str, dict[int, Route]] = {}
        self._answers: set[str] = set()
        self._port_of: dict[int, str] = {}
        for link in links:
            self.add(link)

    # -- links --------------------------------------------------------------------------------------------------

    def add(self, link: HostLink) -> None:
        """Add a link of the exchange."""
        spec, port = link.link, link.port
        if not link.outgoing:
            if port != READS:
                self._answers.add(port)
            self._port_of[spec.edge] = port
            return
        routes = self._by_port.setdefault(port, {})
        if spec.edge not in routes:
            routes[spec.edge] = Route(spec.edge, spec.target.actor, link.policy, link.skips)
        routes[spec.edge].add(self.exchange.sender(spec))

    def remove(self, peer: str) -> None:
        """Remove the links to a replica that has left."""
        for route in self._routes():
            route.remove(peer)

    def _routes(self) -> Iterator[Route]:
        for routes in self._by_port.values():
            yield from routes.values()

    @property
    def due_ns(self) -> int | None:
        """Return when the next second copy of a hedged message, or the next deadline, is due.

        Return None if neither is.
        """
        copies = min((due for route in self._routes() if (due := route.due_ns) is not None), default=None)
        if not self._timed:
            return copies
        return min(min(self._timed.values()), copies) if copies is not None else min(self._timed.values())

    def nearly_due(self, before_ns: int) -> list[Stream]:
        """Return the streams whose deadline is at `before_ns` or earlier, and for which `why` is not yet known."""
        near = (self.streams[session] for session, deadline_ns in self._timed.items() if deadline_ns <= before_ns)
        return [stream for stream in near if not stream.why]

    def on_due(self, now_ns: int) -> None:
        """Send the second copies that are due, and end the sessions whose deadline has passed."""
        for session in [session for session, deadline_ns in self._timed.items() if deadline_ns <= now_ns]:
            stream = self.streams[session]
            what = f"session {session}: deadline exceeded, {stream.delivered} of {stream.asked.max_tokens} tokens delivered"
            self._end(stream, Expired(f"{what}\n{stream.why}" if stream.why else what))
        for route in self._routes():
            route.send_copies(self.exchange, now_ns, self._replicas_of, self._is_open)

    def _replicas_of(self, session: int) -> Replicas:
        stream = self.streams.get(session)
        return stream.replicas if stream is not None else {}

    def _is_open(self, row: Row) -> bool:
        return self._stream_of(row) is not None

    def _stream_of(self, row: Row) -> Stream | None:
        """Return the stream of a row, or None if the session is over, waits, or is in another epoch."""
        stream = self.streams.get(row.session)
        return stream if stream is not None and stream.info.epoch == row.epoch and not stream.waits else None

    # -- clients ------------------------------------------------------------------------------------------------

    def submit(
        self,
        info: SessionInfo,
        inputs: Tensors | None = None,
        deadline_ns: int = 0,
        caller: str = "",
        key: str = "",
        tokens: Sequence[int] = (),
    ) -> Stream:
        """Accept a session: a generation from `info.log`, or a call with `inputs` by port. Set the session's number.

        The session ends with `Expired` at `deadline_ns` (0: never). `tokens` were already delivered by a run that was
        lost.

        Raises:
            Overloaded: there is no room for the session beside the open ones.
            ActorFailed: the run is over.
        """
        if self._failure is not None:
            raise self._failure
        replicas = self.placement.take(info.capacity)
        self.accepted += 1
        info = replace(info, session=self._next)
        self._next += 1
        stream = self.streams[info.session] = Stream(
            info, info, inputs or {}, replicas, log=[*info.log, *tokens], accepted_ns=self.exchange.clock(), caller=caller,
            key=key, delivered=len(tokens), readings=Readings(info.reads, info.capacity) if info.reads else None,
        )  # fmt: skip
        if deadline_ns:
            self._timed[info.session] = deadline_ns
        if self.placement.is_up(replicas):
            self._open(stream)
        return stream

    def _open(self, stream: Stream) -> None:
        """Open a session in the current epoch. Actors rebuild everything that they keep for it from its log.

        Actors that held the session already have everything, except the last token.
        """
        asked, log = stream.asked, stream.log
        stream.forget()
        chosen = {actor: replicas for actor, replicas in stream.replicas.items() if replicas != (0,)}
        left = asked.max_tokens - (len(log) - len(asked.log))
        if len(log) <= self._recomputed_after:
            left = min(left, self._recomputed_after + 1 - len(log))
        kept = stream.taken if stream.held else 0
        stream.info = replace(
            asked,
            epoch=self._epoch,
            log=tuple(log),
            max_tokens=left,
            kept=kept,
            replicas=chosen,
            prompt=asked.prompt_tokens,
        )
        stream.waits, stream.held, stream.submitted_ns = False, False, self.exchange.clock()
        self.commands.append((Open(stream.info), self.placement.labels(stream.replicas)))
        if asked.traceparent:
            context = TraceContext(asked.traceparent)
            if context.sampled:
                self.exchange.traces[asked.session] = context.with_span(context.span)
        try:
            self._send_inputs(stream)
        except Exception as error:
            self._end(stream, error)

    def cancel(self, stream: Stream) -> None:
        """Cancel a session: its client has gone, or wants no more tokens."""
        self._end(stream, "cancelled")

    # -- recovery -----------------------------------------------------------------------------------------------

    def on_lost_replica(
        self, actor: str, replica: int, failure: ActorFailed, inside: frozenset[int] | None = None
    ) -> None:
        """Suspend the sessions of a lost host, and resume those that can continue.

        A session that another replica has room for moves there at once. The other sessions wait for `on_replaced`.
        `inside` holds the sessions of the step that the host was in; None means that it is unknown, and then all of its
        sessions count. A session that seems to be the cause ends with the failure.
        """
        self.placement.down(actor, replica)
        for stream in list(self.streams.values()):
            if replica in stream.replicas.get(actor, ()):
                stream.lost(actor, inside is None or stream.info.session in inside)
                if stream.losses >= MOST_LOSSES:
                    self._end(stream, failure.of(stream.info.session, MOST_LOSSES))
                    continue
                self._suspend(stream, actor)
                self._move(stream, actor)
        self._resume()

    def on_replaced(self, actor: str, lost: int, replica: int) -> None:
        """Resume the sessions of a lost replica whose replacement runs, under the same number or another one."""
        if replica == lost:
            self.placement.up(actor, replica)
        else:
            for stream in self.streams.values():
                if lost in stream.replicas.get(actor, ()):
                    self._move(stream, actor)
            self.placement.remove(actor, lost)
        self._resume()

    def _move(self, stream: Stream, actor: str) -> None:
        stream.replicas = self.placement.move(stream.replicas, actor, stream.info.capacity)

    def _suspend(self, stream: Stream, lost: str) -> None:
        """Suspend a session: the other hosts hold it or, if they could not continue it, close it."""
        if stream.waits and not stream.held:
            return
        stream.waits = True
        stream.held = not stream.inputs and self.placement.outlive(stream.replicas, lost)
        self._close(stream, hold=stream.held)

    def _resume(self) -> None:
        """Open the waiting sessions whose actors are all up, in a new epoch. At most one of them is suspected."""
        if self._failure is not None:
            return
        ready = [s for s in self.streams.values() if s.waits and self.placement.is_up(s.replicas)]
        suspected = [stream for stream in ready if stream.suspected]
        tried = any(s.suspected and not s.waits for s in self.streams.values())
        for stream in suspected[0 if tried else 1 :]:
            ready.remove(stream)
        if ready:
            self._epoch += 1
        for stream in ready:
            anew = stream.info.epoch > 0
            self._open(stream)
            self.exchange.count("sessions_resumed" if stream.info.kept else "sessions_replayed", anew)

    # -- hosts --------------------------------------------------------------------------------------------------

    def on_session_failed(self, label: str, failed: SessionFailed) -> None:
        """Handle a host that could not open a session, or has lost it."""
        stream = self.streams.get(failed.session)
        if stream is None or stream.info.epoch != failed.epoch:
            return
        if stream.waits:
            if stream.held:  # a host cannot hold it: the whole session is replayed
                stream.held = False
                self._close(stream)
        else:
            error = ActorFailed(
                label, failed.error, failed.cause, session=failed.session, remote_traceback=failed.traceback
            )
            self._end(stream, error)

    def on_lost(self, row: Row, error: Exception) -> None:
        """End the session of a row whose message to the client was refused here."""
        stream = self._stream_of(row)
        if stream is not None:
            self._end(stream, error)

    def on_failure(self, failure: Exception) -> None:
        """End every stream with the failure that ended the run."""
        self._failure = self._failure or failure
        for stream in list(self.streams.values()):
            self._end(stream, failure)

    def on_quiet(self, since_ns: int, quiet_s: float) -> None:
        """End the sessions submitted before `since_ns`.

        Every actor has been idle since then, so no answer will come.
        """
        for stream in [
            stream for stream in self.streams.values() if stream.submitted_ns < since_ns and not stream.waits
        ]:
            session, lacks = stream.info.session, stream.lacks(frozenset() if self._generates else self._answers)
            what = f"session {session}: every actor has been idle for {quiet_s:g} s: {lacks}"
            self._end(stream, ActorFailed(GATEWAY, what, Cause.LATE, session=session))

    def on_message(self, received: Received) -> None:
        """Take a message of tokens, numbers about tokens, scores, or outputs of a call."""
        self.exchange.consumed(received.link, received.nbytes)
        port = self._port_of[received.link.spec.edge]
        if not self._generates:
            self._on_output(port, received)
        elif port == "sampled":
            tokens = array("q", bytes(received.buffers[0]))
            for row, token in zip(received.header.rows, tokens, strict=True):
                self._on_token(row, token)
        elif port in ("logits", "logprobs"):
            self._on_numbers(port, received)
        elif port == "scores":
            self._on_scores(received)
        else:
            self._on_reads(port, received)

    # -- inside -------------------------------------------------------------------------------------------------

    def _send_inputs(self, stream: Stream) -> None:
        info, now_ns = stream.info, self.exchange.clock()
        for port, (meta, buffer) in stream.inputs.items():
            tokens = meta.shape[0] if meta.shape else 1
            self._send(stream, port, Row(info.session, info.epoch, 0, tokens), meta, buffer, now_ns)
        for row, meta, data in chunks_of(info, self._chunk):
            self._send(stream, "token", row, meta, data, now_ns)

    def _send(self, stream: Stream, port: str, row: Row, meta: TensorMeta, buffer: Buffer, now_ns: int) -> None:
        for route in self._by_port[port].values():
            [(replicas, _)] = route.groups((row,), lambda _session: stream.replicas)
            route.send(self.exchange, replicas, Outbound((row,), (meta,), (buffer,), now_ns))

    def _on_token(self, row: Row, token: int) -> None:
        stream = self._stream_of(row)
        if stream is None or row.position != len(stream.log):
            self.exchange.count("tokens_refused")  # the session is over, or the token came twice
            return
        stream.log.append(token)  # logged before it is delivered
        self._deliver_complete(stream)  # else its numbers come later, over separate edges

    def _on_numbers(self, port: str, received: Received) -> None:
        """Take logits or log-probabilities, and deliver the positions that were waiting for them."""
        for row, (_, buffer) in rows_of(received):
            stream = self._stream_of(row)
            if stream is not None and stream.info.score:
                stream.numbers[port, row.position] = bytes(buffer)
                if len(stream.numbers) == len(stream.log) - 1:
                    self._end(stream, "done")
                continue
            if stream is None or row.position < stream.awaited:
                continue
            stream.numbers[port, row.position] = bytes(buffer)
            self._deliver_complete(stream)

    def _on_reads(self, port: str, received: Received) -> None:
        """Take what sessions read, inside the model or over an edge, and deliver the positions that were waiting for it."""
        for row, (meta, buffer) in rows_of(received):
            stream = self._stream_of(row)
            if stream is None or stream.readings is None:
                self.exchange.count("tokens_refused")
                continue
            try:
                stream.readings.take(port, row, meta, buffer)
            except (ValueError, ProtocolError) as error:
                what = f"edge {received.link.spec.name}: {error}"
                self._end(stream, ActorFailed(received.link.peer, what, Cause.REFUSED, session=row.session))
                continue
            self._deliver_complete(stream)

    def _on_scores(self, received: Received) -> None:
        for row, (_, buffer) in rows_of(received):
            stream = self._stream_of(row)
            if stream is None or row.position != len(stream.scores):
                self.exchange.count("tokens_refused")
                continue
            stream.scores.frombytes(bytes(buffer))
            if len(stream.scores) == len(stream.log) - 1:
                self._end(stream, "done")

    def _deliver_complete(self, stream: Stream) -> None:
        """Deliver the positions of which everything has come."""
        epoch = stream.info.epoch
        while not stream.over and stream.info.epoch == epoch and stream.complete(stream.awaited):
            self._deliver(stream, stream.awaited)

    def _deliver(self, stream: Stream, position: int) -> None:
        token = stream.log[position]
        stream.delivered += 1
        self.delivered += 1
        if stream.losses:
            self._acquit(stream)
        stream.events.append(stream.taken_out(position))
        self.on_delivered(stream, position, token)
        # the log may have later tokens, whose numbers have not come yet
        if not stream.info.finished(position + 1 - len(stream.info.log), token):
            return
        if stream.asked.finished(position + 1 - len(stream.asked.log), token):
            self._end(stream, stream.info.reason(token))
        else:  # all its positions change now; see `recomputed_after`
            self._close(stream)
            self._epoch += 1
            self._open(stream)

    def _acquit(self, stream: Stream) -> None:
        """Clear a session of suspicion: it has made progress, or is over. The next suspected session may start."""
        stream.losses = 0
        self._resume()

    def _on_output(self, port: str, received: Received) -> None:
        for row, part in rows_of(received):
            stream = self._stream_of(row)
            if stream is None or row.position <= stream.rounds.get(port, -1):
                continue  # the session is over, or the row is from a slower replica or an earlier round of a loop
            stream.outputs[port], stream.rounds[port] = part, row.position
            if stream.outputs.keys() == self._answers:
                self._end(stream, "done")

    def _end(self, stream: Stream, outcome: str | Exception) -> None:
        if stream.over:
            return
        stream.over = True
        stream.events.append(outcome)
        del self.streams[stream.info.session]
        self.exchange.traces.pop(stream.info.session, None)
        self._timed.pop(stream.info.session, None)
        self._close(stream)
        self.placement.give_back(stream.replicas, stream.info.capacity)
        self.on_ended(stream, outcome)
        if stream.losses:
            self._acquit(stream)

    def _close(self, stream: Stream, *, hold: bool = False) -> None:
        """Close a session at its hosts, or have them hold it. Drop its messages that wait for credit."""
        for route in self._routes():
            route.close(stream.info.session)
        if self.exchange.waiting:  # messages without credit: those of closed sessions are dropped
            for route in self._routes():
                route.give_up(self._is_open)
            self.exchange.give_up(self._is_open)
        command = (Hold if hold else Close)(stream.info.session)
        self.commands.append((command, self.placement.labels(stream.replicas)))
