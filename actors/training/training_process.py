"""Send and await the tensors of a host that trains, by link and number, and count the time of its actions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ranvier.transport.format.codec import RAW
from ranvier.transport.format.header import Row
from ranvier.transport.format.tensors import from_buffer, to_buffer
from ranvier.transport.links.exchange import ACK_DELAY_S, TICK_S
from ranvier.transport.links.link_state import Outbound, Received
from ranvier.transport.links.wire import ProcessWire

from ..component.devices import ends_with_its_gpu, here, wait
from ..host.outputs import coded
from ..host.process import Process, Stopped
from ..protocol.control_protocol import Counters, StepCommand, Stop
from ..protocol.host_spec import HostLink
from ..protocol.schedule import UPDATE, Action
from ..protocol.training_spec import INPUT_GRADIENT, VALIDATION, WAITED, TrainingLink
from .inbox import Key, TrainingCore

DRAIN_DEADLINE_S = 5.0


class Mail(Process):
    """Exchange the messages of one stage; `owed` holds, by link, the part of the last gradient that its codec has lost."""

    def begin(self, links: Iterable[TrainingLink]) -> None:
        """Prepare the inbox and group the links by role."""
        self.core = TrainingCore(self.exchange)
        self.counted = self.core.counters
        self.owed: dict[TrainingLink, torch.Tensor] = {}
        self._links: dict[str, list[TrainingLink]] = {}
        for link in links:
            self._links.setdefault(link.role, []).append(link)

    def of(self, role: str, number: int | None = None) -> list[TrainingLink]:
        """Return the links of a role: all of them, or those for one micro-batch."""
        links = self._links.get(role, [])
        return links if number is None else [link for link in links if link.carries(number)]

    def add_links(self, links: Sequence[HostLink], training: Sequence[TrainingLink]) -> None:
        for link in training:
            self.exchange.add(link.link)
        self.core.add(training)

    def on_message(self, received: Received) -> None:
        self.core.on_message(received)

    def obey(self, command: StepCommand) -> bool:
        return not isinstance(command, Stop)

    def lost_rows(self, rows: Sequence[Row], error: Exception) -> None:
        raise error  # training must not skip a row

    def until(self, wire: ProcessWire, links: Iterable[TrainingLink], key: Key) -> None:
        """Receive messages until each of `links` has the one for `key`, and count the time that this takes."""
        missing = self.core.missing(links, key)
        if not missing:
            return
        role, began_ns = missing[0].role, time.monotonic_ns()
        while missing:
            self.take_in_more(wire)
            missing = self.core.missing(missing, key)
        name = f"{role}{WAITED}" + (" in validation" if key.session == VALIDATION else "")
        self.core.counters[name] += (time.monotonic_ns() - began_ns) // 1000

    def take_in_more(self, wire: ProcessWire) -> None:
        """Send messages that may go, wait for a message or a timeout, then carry out commands.

        Raises:
            Stopped: the supervisor has sent `stop`.
        """
        exchange, crossing = self.exchange, self.crossing
        self.exchange.drain(wire.send)
        if not self._receive(wire, ACK_DELAY_S if exchange.owes() else TICK_S):
            if exchange.owes():
                exchange.idle()
            else:
                exchange.tick()
                self._count()
            self.exchange.drain(wire.send)
        while crossing.commands:
            if not self.obey_next():
                raise Stopped

    def send(self, link: TrainingLink, key: Key, tensor: torch.Tensor) -> None:
        """Send the tensor for `key`, from any device. The caller must not change it afterwards."""
        tensor = here(tensor)
        sending = self.exchange.sender(link.link)
        name = link.link.tensors[0][0]
        row = Row(key.session, 1, key.number, len(tensor) if tensor.dim() else 1)
        now_ns = time.monotonic_ns()
        if sending.raw:
            meta, buffer = to_buffer(name, tensor)
            assert meta.codec == RAW
            self.exchange.send(sending, Outbound((row,), (meta,), (buffer,), now_ns))
        else:
            owed = self.owed.get(link)
            if owed is not None and owed.shape == tensor.shape:  # a router's number of rows varies
                tensor = tensor + owed
            tensors, buffers, coding = coded(name, tensor, sending)
            if link.role == INPUT_GRADIENT:  # error feedback: what the codec lost is added to the next one
                self.owed[link] = tensor - from_buffer(tensors[0], buffers[0])
            self.exchange.send(sending, Outbound((row,), tensors, buffers, now_ns, coding))

    def counting(self, what: Callable[[], float]) -> float:
        """Run `what` before the optimiser's step, and count its time as part of the update."""
        began_ns = time.monotonic_ns()
        made = what()
        self.core.counters[f"{UPDATE}_us"] += (time.monotonic_ns() - began_ns) // 1000
        return made

    def timed(self, action: Action, what: Any, messages: Sequence[Received] = (), called: str | None = None) -> Any:
        """Run `what`, and count the action and its time."""
        crossing = self.crossing
        began_ns = crossing.stepping_since_ns = time.monotonic_ns()
        try:
            with ends_with_its_gpu():
                made = what()
                wait()  # the GPU may still be at it
            return made
        finally:
            ended_ns = time.monotonic_ns()
            crossing.stepped_ns, crossing.stepping_since_ns = ended_ns, 0
            name = called or action.kind
            self.core.counters[f"{name}_us"] += (ended_ns - began_ns) // 1000
            self.core.counters[name] += 1
            if self.spec.trace:
                for received in messages:
                    self.records.done(received, began_ns, ended_ns, 1)

    def drain(self, wire: ProcessWire) -> None:
        """Send pending messages, and wait at most `DRAIN_DEADLINE_S` seconds until all are acknowledged."""
        self.send_owed(wire, DRAIN_DEADLINE_S)
        self._count()
        self.crossing.report(Counters(self.crossing.counters))
