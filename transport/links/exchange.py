"""Keep all links of one process, without I/O: frames go in, messages and frames come out.

The step thread of a host drives an exchange over a wire, and the parent process drives one from trio. The tests drive one over
memory wires with a virtual clock. Nothing here blocks, sleeps, or knows a socket.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from ..format.codec import RAW
from ..format.codec import parse as parse_codec
from ..format.errors import LinkBroken, ProtocolError
from ..format.header import (
    MAX_TRACED_ROWS,
    VERSION,
    Ack,
    Control,
    Header,
    MessageKind,
    Row,
    TracedHeader,
    Verb,
    control,
    decode,
)
from ..format.message import Buffer, check_frames, checksum
from . import codec_choice
from .handshake import hello, objection
from .link import LinkSpec
from .link_state import Outbound, Received, ReceivingLink, SendingLink, Sent, Unsent, checked
from .window import Outgoing, ReceiveWindow, SendWindow
from .wire import Arrival

ACK_DELAY_S = 0.02
"""Seconds without work after which the driver of an exchange calls `idle`, if it `owes` an acknowledgement."""
TICK_S = 1.0
"""Seconds between two calls of `tick`."""
Link = TypeVar("Link")
OnSent = Callable[[Sent], None]
OnUnsent = Callable[[Unsent], None]
OnControl = Callable[[int, Verb, str, bool, tuple[Any, ...]], None]
"""Called for a control message of a link: (edge, verb, peer, whether it was sent from here, arguments)."""


class Exchange:
    """Keep the links of the process `me`.

    Args:
        me: this process's identity, `actor.replica.epoch`.
        graph: the hash of the graph. Both ends of a link must run the same graph.
        links: every link with `me` at one end, or at both.
        clock: returns nanoseconds; CLOCK_MONOTONIC in a run.
        on_sent: called for each message that was handed over (for the trace).
        on_unsent: called for each message that waited for credit and was given up.
        on_control: called for each control message of the links, in both directions.

    Attributes:
        traces: the W3C trace context (header.py) of the current work of each traced session.
        waiting: the number of messages that wait for credit. While there are any, the host starts no step.
        outbox: frames for the wire; the driver hands them over with `drain`.
    """

    def __init__(
        self,
        me: str,
        graph: str,
        links: Iterable[LinkSpec],
        clock: Callable[[], int],
        on_sent: OnSent | None = None,
        on_unsent: OnUnsent | None = None,
        on_control: OnControl | None = None,
    ) -> None:
        self.me = me
        self.graph = graph
        self.sending: dict[tuple[int, str], SendingLink] = {}
        self.receiving: dict[tuple[int, str], ReceivingLink] = {}
        self.outbox: list[Outgoing] = []
        self.counters: Counter[str] = Counter()
        self.clock = clock
        self._on_sent = on_sent
        self._on_unsent = on_unsent
        self._on_control_message = on_control
        self._owing: dict[ReceivingLink, None] = {}
        self.waiting = 0
        self.traces: dict[int, bytes] = {}
        for spec in links:
            self.add(spec)

    def add(self, spec: LinkSpec) -> None:
        """Add a link. `open` offers it to its receiver."""
        source, target = str(spec.source), str(spec.target)
        if source == self.me:
            window, choices = SendWindow(spec.credits_bytes), codec_choice.candidates(spec.codec)
            if choices is None:
                codec = parse_codec(spec.codec)
                link = SendingLink(spec, target, window, codec, codec.number == RAW, spec.wire == "tcp")
            else:
                chooser = codec_choice.Chooser(choices)
                link = SendingLink(spec, target, window, choices[0], False, spec.wire == "tcp", chooser=chooser)
            self.sending[spec.edge, target] = link
        if target == self.me:
            receiver = ReceiveWindow(spec.credits_messages, spec.credits_bytes)
            measured = codec_choice.candidates(spec.codec) is not None
            self.receiving[spec.edge, source] = ReceivingLink(spec, source, receiver, measured)

    def sender(self, spec: LinkSpec) -> SendingLink:
        """Return the sending end of a link that was added."""
        return self.sending[spec.edge, str(spec.target)]

    def receiver(self, spec: LinkSpec) -> ReceivingLink:
        """Return the receiving end of a link that was added."""
        return self.receiving[spec.edge, str(spec.source)]

    def remove(self, peer: str) -> None:
        """Remove all links with `peer`, and the messages that were on their way there."""
        for key in [key for key in self.sending if key[1] == peer]:
            self.release(len(self.sending.pop(key).waiting))
        for key in [key for key in self.receiving if key[1] == peer]:
            link = self.receiving.pop(key)
            link.open = False
            self._owing.pop(link, None)
        self.outbox = [outgoing for outgoing in self.outbox if outgoing.peer != peer]

    # -- opening ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Offer every sending link to its receiver."""
        for link in self.sending.values():
            if not link.open:
                self._queue(link.peer, hello(link.spec, self.graph))

    @property
    def ready(self) -> bool:
        """Return whether every link is open at both ends.

        Raises:
            LinkBroken: a receiver refused a link. The message names both sides.
        """
        for link in self.sending.values():
            if link.refused is not None:
                raise LinkBroken(f"edge {link.spec.name}: refused by {link.peer}: {link.refused}")
        return all(link.open for link in self.sending.values()) and all(r.open for r in self.receiving.values())

    # -- sending ------------------------------------------------------------------------------------------------

    def send(self, link: SendingLink, message: Outbound) -> None:
        """Send a message, or keep it until there is credit (`waiting` counts these).

        Buffers that can be written to are copied before they wait. Otherwise the wire copies what it sends by reference.

        Raises:
            ProtocolError: the tensors do not match the specs of the edge.
        """
        nbytes = checked(link, message.rows, message.tensors)
        if link.waiting or not link.window.may_send(nbytes):
            self.count("credit_waits")
            self.hold()
            link.waiting.append((message.stable(), nbytes))
        else:
            self._transmit(link, message, nbytes, message.ready_ns)

    def hold(self) -> None:
        """Count a message that waits for credit. The host starts no step meanwhile."""
        self.waiting += 1

    def release(self, messages: int = 1, *, given_up: bool = False) -> None:
        """Count messages that no longer wait, because they were sent or are `given_up`."""
        self.waiting -= messages
        if given_up:
            self.count("given_up", messages)

    def count(self, what: str, times: int = 1) -> None:
        """Count an event of the links, for the run's counters."""
        self.counters[what] += times

    def drain(self, send: Callable[[str, bytes, Sequence[Buffer]], Sequence[Buffer]]) -> None:
        """Hand the frames of the outbox to the wire, in order. What `send` returns is kept in place of the buffers."""
        if self.outbox:
            for outgoing in self.outbox:
                outgoing.buffers = send(outgoing.peer, outgoing.header, outgoing.buffers)
            self.outbox.clear()

    def give_up(self, wanted: Callable[[Row], bool] = lambda _row: False) -> None:
        """Drop the messages that wait for credit and have no `wanted` row.

        They have no sequence number yet, so the receiver misses nothing.
        """
        if not self.waiting:
            return
        for link in self.sending.values():
            kept = deque[tuple[Outbound, int]]()
            for message, nbytes in link.waiting:
                if any(wanted(row) for row in message.rows):
                    kept.append((message, nbytes))
                    continue
                self.release(given_up=True)
                if self._on_unsent is not None:
                    self._on_unsent(Unsent(link, message, nbytes, self.clock()))
            link.waiting = kept

    def unfinished(self) -> bool:
        """Return whether a message waits, or was sent and is not acknowledged yet."""
        return any(link.waiting or link.window.kept for link in self.sending.values())

    def _transmit(self, link: SendingLink, message: Outbound, nbytes: int, credit_ns: int) -> None:
        window, spec, rows = link.window, link.spec, message.rows
        sequence = window.sequence + 1
        acks = self._acks_for(link.peer) if self._owing else ()
        sent_ns = self.clock()
        crc = checksum(message.buffers) if link.checksums else 0
        fields = VERSION, spec.kind, spec.edge, sequence, rows, message.tensors, message.ready_ns, sent_ns, crc, acks
        if self.traces and len(rows) <= MAX_TRACED_ROWS and any(row.session in self.traces for row in rows):
            header = TracedHeader(*fields, tuple(self.traces.get(row.session, b"") for row in rows)).encode()
        else:
            header = Header(*fields).encode()
        outgoing = Outgoing(link.peer, header, message.buffers, sequence, nbytes)
        window.keep(outgoing)
        self.outbox.append(outgoing)
        if link.on_used is not None:
            link.sent_at.append((sequence, sent_ns))
        if link.chooser is not None and nbytes >= codec_choice.MEASURED_BYTES:
            link.timed.append((sequence, sent_ns, nbytes))
        if self._on_sent is not None:
            self._on_sent(Sent(link, message, sequence, nbytes, credit_ns, sent_ns, crc))

    def _acks_for(self, peer: str) -> tuple[Ack, ...]:
        """Return the acknowledgements owed to `peer`: they travel with a message that goes there anyway."""
        if len(self._owing) == 1:  # as in every chain of actors; building a list would take twice as long
            [link] = self._owing
            if link.peer != peer:
                return ()
            self._owing.clear()
            return (Ack(link.spec.edge, *link.window.report()),)
        acks = []
        for link in list(self._owing):
            if link.peer == peer:
                del self._owing[link]
                acks.append(Ack(link.spec.edge, *link.window.report()))
        return tuple(acks)

    # -- receiving ----------------------------------------------------------------------------------------------

    def on_arrival(self, arrival: Arrival) -> Received | None:
        """Process frames that a wire received. Return a message for the host, or None if they concern only the link.

        Raises:
            ProtocolError: the peer sent something invalid. The message is dropped.
            RefusedMessage: the message does not match its edge. `rows` names the sessions that lost it.
        """
        header, peer = decode(arrival.header), arrival.peer
        if isinstance(header, Control):
            self._on_control(peer, header, arrival.waiting_since_ns)
            return None
        for ack in header.acks:
            sending = self.sending.get((ack.edge, peer)) or self._link(self.sending, peer, ack.edge, "an ack")
            sending.window.acknowledge(ack.received, ack.sequence_limit, ack.byte_limit)
            if sending.on_used is not None:
                self._report_used(sending, sending.on_used)
            if sending.waiting or sending.on_credit is not None:
                self._use_credit(sending)
        link = self.receiving.get((header.edge, peer))
        if link is None or not link.open or header.kind != link.spec.kind:
            raise ProtocolError(self._misplaced(header, peer, link))
        if header.sequence != link.window.received + 1:
            self._out_of_order(link, header.sequence)
            return None
        try:
            check_frames(header, arrival.buffers)
        except ProtocolError:
            self.count("damaged")
            self._ask_again(link)  # the sender still has it
            raise
        link.window.received = header.sequence
        self._owing[link] = None
        if link.measured and arrival.waiting_since_ns:
            self._queue_waited(link, header, arrival.waiting_since_ns)
        try:
            nbytes = checked(link, header.rows, header.tensors)
        except ProtocolError as error:
            self.consumed(link, sum(meta.nbytes for meta in header.tensors))
            raise RefusedMessage(str(error), header.rows) from None
        return Received(link, header, arrival.buffers, nbytes, self.clock())

    def _queue_waited(self, link: ReceivingLink, header: Header, since_ns: int) -> None:
        """Tell the sender how long this process had waited for its message.

        The sender measures the link by its own clock, because clocks of two machines are never compared.
        """
        if sum(meta.nbytes for meta in header.tensors) >= codec_choice.MEASURED_BYTES:
            waited_ns = max(0, self.clock() - since_ns)
            self._queue(link.peer, control(link.spec.edge, Verb.SPEED, header.sequence, waited_ns))

    def _misplaced(self, header: Header, peer: str, link: ReceivingLink | None) -> str:
        if link is None:
            return f"{self.me}: expected an edge of the graph, got edge {header.edge} from {peer}"
        if not link.open:
            return f"edge {link.spec.name}: expected a handshake from {peer}, got a message"
        expected, got = (MessageKind(kind).name.lower() for kind in (link.spec.kind, header.kind))
        return f"edge {link.spec.name}: expected {expected}, got {got}"

    def _out_of_order(self, link: ReceivingLink, sequence: int) -> None:
        """Drop a message out of sequence. If messages before it are missing, ask the sender to send them again."""
        if sequence <= link.window.received:
            self.count("duplicate")
            self._owing[link] = None
        else:
            self.count("gap")
            self._ask_again(link)

    def consumed(self, link: ReceivingLink, nbytes: int) -> None:
        """Note that a message was used up. Tell the sender at once if it may run out of credit, otherwise when idle."""
        if not link.open:
            return  # removed meanwhile
        if link.window.consume(nbytes) or link.spec.prompt:
            self._acknowledge(link)
        else:
            self._owing[link] = None

    def owes(self) -> bool:
        """Return whether an acknowledgement is held back until the process is idle."""
        return bool(self._owing)

    def idle(self) -> None:
        """Send the acknowledgements that were held back, because there is nothing else to do now."""
        for link in list(self._owing):
            self._acknowledge(link)

    def tick(self) -> None:
        """Repeat the offers and probes that nobody answered. Call this every `TICK_S`."""
        self.open()
        for link in self.sending.values():
            if link.open and (link.window.kept or link.waiting):
                self._queue(link.peer, control(link.spec.edge, Verb.PROBE, link.window.sequence))

    def _ask_again(self, link: ReceivingLink) -> None:
        missing = link.window.ask()
        if missing is not None:
            self.count("asked_again")
            self._queue(link.peer, control(link.spec.edge, Verb.AGAIN, missing))

    def _acknowledge(self, link: ReceivingLink) -> None:
        self._owing.pop(link, None)
        self._queue(link.peer, control(link.spec.edge, Verb.ACK, *link.window.report()))

    def _queue(self, peer: str, message: Control) -> None:
        self.outbox.append(Outgoing(peer, message.encode()))
        if self._on_control_message is not None:
            self._on_control_message(message.edge, message.verb, peer, True, message.arguments)

    # -- control ------------------------------------------------------------------------------------------------

    def _on_control(self, peer: str, message: Control, waiting_since_ns: int) -> None:
        verb, arguments = message.verb, message.arguments
        if self._on_control_message is not None:
            self._on_control_message(message.edge, verb, peer, False, arguments)
        if verb is Verb.HELLO:
            self._on_hello(peer, message.edge, arguments)
        elif verb is Verb.PROBE:
            receiving = self._link(self.receiving, peer, message.edge, verb.name)
            if arguments[0] > receiving.window.received:
                receiving.window.asked = 0  # the answer to an earlier AGAIN was lost
                self._ask_again(receiving)
            else:
                self._acknowledge(receiving)
        else:
            link = self._link(self.sending, peer, message.edge, verb.name)
            self._on_answer(link, verb, arguments, waiting_since_ns)

    def _on_hello(self, peer: str, edge: int, offer: tuple[Any, ...]) -> None:
        link = self.receiving.get((edge, peer))
        reason = objection(link.spec if link else None, self.graph, peer, self.me, offer)
        if link is None or reason is not None:
            self.count("refused")
            self._queue(peer, control(edge, Verb.REFUSE, reason or "no such edge"))
            raise ProtocolError(f"handshake refused: {reason}")
        link.open = True
        self._queue(peer, control(edge, Verb.WELCOME, *link.window.limits()))

    def _on_answer(self, link: SendingLink, verb: Verb, arguments: tuple[Any, ...], waiting_since_ns: int) -> None:
        if verb is Verb.WELCOME:
            link.open = True
            link.window.grant(*arguments)
        elif verb is Verb.REFUSE:
            link.refused = arguments[0]
        elif verb is Verb.ACK:
            link.window.acknowledge(*arguments)
            if link.on_used is not None:
                self._report_used(link, link.on_used)
        elif verb is Verb.SPEED:
            link.learn_speed(arguments[0], arguments[1], self.clock(), waiting_since_ns > 0)
        elif verb is Verb.AGAIN:
            for sent in link.window.since(arguments[0]):
                self.count("sent_again")
                self.outbox.append(sent)
        self._use_credit(link)

    def _report_used(self, link: SendingLink, on_used: Callable[[int], None]) -> None:
        now_ns, used = self.clock(), link.used
        while link.sent_at and link.sent_at[0][0] <= used:
            on_used(now_ns - link.sent_at.popleft()[1])

    def _use_credit(self, link: SendingLink) -> None:
        """Send the waiting messages that have credit now."""
        while link.waiting and link.window.may_send(link.waiting[0][1]):
            self.release()
            message, nbytes = link.waiting.popleft()
            self._transmit(link, message, nbytes, self.clock())
        if link.on_credit is not None:
            link.on_credit()

    def _link(self, links: dict[tuple[int, str], Link], peer: str, edge: int, what: str) -> Link:
        link = links.get((edge, peer))
        if link is None:
            raise ProtocolError(f"{self.me}: expected {what} of an edge of the graph, got edge {edge} from {peer}")
        return link


class RefusedMessage(ProtocolError):
    """Report a message that came in sequence but does not match its edge. `rows` are the steps that lost their input."""

    def __init__(self, text: str, rows: tuple[Row, ...]) -> None:
        super().__init__(text)
        self.rows = rows
