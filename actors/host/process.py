"""Implement what every host process does: load, open links, receive, send, fail and end.

`host.py` derives from it to serve, `training/host.py` to train. The step thread owns the data wire: it waits on the
wire directly, runs the actor and sends the outputs. It uses no event loop: waiting for the socket in trio took 18 µs
per hop.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ranvier.transport import system
from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.format.header import Row
from ranvier.transport.links.exchange import TICK_S, Exchange, RefusedMessage
from ranvier.transport.links.link_state import Received
from ranvier.transport.links.wire import Arrival, ProcessWire
from ranvier.transport.wires.opening import open_wire

from ..component import devices
from ..errors import Cause, describe, traceback_of, words
from ..protocol.control_protocol import (
    Connect,
    Failed,
    Progress,
    Ready,
    Refused,
    SessionFailed,
    StateChanged,
    StepCommand,
    Stop,
)
from ..protocol.host_spec import HostLink, HostSpec
from ..protocol.lifecycle import Lifecycle, State
from ..protocol.refusals import Refusals, with_left_out
from ..protocol.training_spec import TrainingLink
from ..trace.crossing import Crossing
from ..trace.trace_records import Records
from . import situation
from .control import ControlThread
from .join import Overdue

UNLINKED_S = 30.0
"""Seconds after which a host reports the links that are still closed. It keeps waiting: only the supervisor ends the
wait, because the parent process may itself have been suspended."""


class Stopped(Exception):
    """Signal that the supervisor sent `stop` before the host was running."""


class JoinTimeout(TimeoutError):
    """Signal that a step has waited too long for some of its inputs."""


class Process(ABC):
    """Drive the step thread of one host. Subclasses define its preparation, its work and its commands."""

    def __init__(self, spec: HostSpec, crossing: Crossing) -> None:
        self.spec = spec
        self.crossing = crossing
        self.records = Records(crossing.ring, spec.trace_sample, by_position=spec.training is not None)
        self.life = Lifecycle(spec.label)
        self.wire: ProcessWire | None = None
        self._connected_s: float | None = None
        self._refusals = Refusals()
        self.counted: Counter[str] = Counter()
        """Events of this host that neither the links nor the wire count."""

    # -- for subclasses ---------------------------------------------------------------------------------------------

    def mode(self) -> AbstractContextManager[Any]:
        """Return the torch mode of the step thread: inference mode, unless a subclass overrides it."""
        return torch.inference_mode()

    @abstractmethod
    def prepare(self, address: str) -> Ready:
        """Load everything. Return what the supervisor needs to know: `capacity_tokens`, `held_bytes`, `keeps`."""

    @abstractmethod
    def work(self, wire: ProcessWire) -> None:
        """Do the work of this process until the supervisor sends `stop`, then finish it."""

    @abstractmethod
    def add_links(self, links: Sequence[HostLink], training: Sequence[TrainingLink]) -> None:
        """Add the links that the supervisor sent."""

    @abstractmethod
    def on_message(self, received: Received) -> None:
        """Process a message that has arrived."""

    @abstractmethod
    def obey(self, command: StepCommand) -> bool:
        """Obey a command of the supervisor. Return False if it is `stop`."""

    @abstractmethod
    def lost_rows(self, rows: Sequence[Row], error: Exception) -> None:
        """End the sessions of these rows: their message was refused, or could not be processed."""

    def held_up(self, before_ns: int) -> Iterable[Overdue]:
        """Return the steps that have waited for some of their inputs since before `before_ns`."""
        return ()

    def open_wire(self) -> ProcessWire:
        """Open the wire of this host."""
        spec = self.spec
        return open_wire(
            spec.identity,
            spec.endpoint,
            max_frame_bytes=spec.max_frame_bytes,
            shared_from_bytes=spec.shared_from_bytes,
            keys=Path(spec.keys) if spec.keys is not None else None,
        )

    # -- life cycle -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        spec, crossing = self.spec, self.crossing
        self._to(State.LOADING)
        wire = self.wire = self.open_wire()
        crossing.waker = wire.waker()
        self.exchange = Exchange(
            spec.identity,
            spec.graph_hash,
            (),
            time.monotonic_ns,
            self.records.sent if spec.trace else None,
            self.records.unsent if spec.trace else None,
            self.records.control if spec.trace else None,
        )
        crossing.situation = lambda: situation.describe(crossing, self.exchange, self.held_up)
        with self.mode():
            ready = self.prepare(wire.address)
            gc.collect()
            gc.freeze()
            # A full collection walks all of torch's objects: 1 ms in the middle of a step. Subclasses collect between
            # steps.
            gc.disable()
            self._to(State.READY)
            crossing.report(ready)
            self._link_up(wire)
            self._to(State.RUNNING)
            self.work(wire)
        self._to(State.STOPPED)

    def progress(self, share: float) -> None:
        """Report the share that is loaded, from 0 to 1.

        Raises:
            Stopped: the supervisor has sent `stop`.
        """
        self.crossing.report(Progress(float(share)))
        if any(isinstance(received.command, Stop) for received in self.crossing.commands):
            raise Stopped

    def _link_up(self, wire: ProcessWire) -> None:
        """Connect to all neighbours once the supervisor has sent their addresses, and open every link.

        A spare waits here until it is needed. A neighbour that is lost meanwhile is not waited for.
        """
        early = deque[Arrival]()
        complained = False
        while True:
            while self.crossing.commands:
                if not self.obey_next():
                    raise Stopped
            if self._connected_s is None:
                arrival = wire.receive(TICK_S)
                if arrival is not None:  # the neighbour connected first: answered once its address is known
                    early.append(arrival)
                continue
            self.exchange.drain(wire.send)
            if self.exchange.ready and not early:
                return
            if not complained and time.monotonic() > self._connected_s + UNLINKED_S:
                complained = True
                self.warn(f"links are not open after {UNLINKED_S:.0f} s: {self._closed()}")
            if early:
                self._take_in(early.popleft())
            elif not self._receive(wire, 0.2):
                self.exchange.tick()

    def obey_next(self) -> bool:
        """Obey the oldest waiting command. Return False if it is `stop`.

        Before `connect`, all commands except `connect` and `stop` are ignored.
        """
        received = self.crossing.commands.popleft()
        command = received.command
        started_ns, going_on = time.monotonic_ns(), True
        if isinstance(command, Connect):
            self._connect(command)
        elif self._connected_s is None and not isinstance(command, Stop):
            return True
        else:
            going_on = self.obey(command)
        if self.spec.trace:
            self.records.command(received, started_ns, time.monotonic_ns())
        return going_on

    def _connect(self, command: Connect) -> None:
        assert self.wire is not None
        for peer, address in command.peers.items():
            self.wire.connect(peer, address)
        self.add_links(command.links, command.training)
        self.exchange.open()
        self._connected_s = time.monotonic()
        self.on_connected(command.instead_of)

    def on_connected(self, instead_of: str | None) -> None:  # noqa: B027 - most subclasses have nothing to do
        """React to `connect`. `instead_of` is the label of the lost host that this one replaces, or None."""

    def _closed(self) -> str:
        closed = [link.spec.name for link in self.exchange.sending.values() if not link.open]
        closed += [link.spec.name for link in self.exchange.receiving.values() if not link.open]
        return ", ".join(closed)

    def _receive(self, wire: ProcessWire, timeout_s: float) -> bool:
        """Receive and process the next frames. Return False if none came in time."""
        try:
            arrival = wire.receive(timeout_s)
        except ProtocolError as error:
            self.refused(error)
            return True
        if arrival is None:
            return False
        self._take_in(arrival)
        return True

    def _take_in(self, arrival: Arrival) -> None:
        received = None
        try:
            received = self.exchange.on_arrival(arrival)
            if received is not None:
                self.on_message(received)
        except ProtocolError as error:
            self.refused(error)
        except Exception as error:
            if received is None:
                raise  # the state of a link is broken: this host fails and is replaced
            self.decision_failed(received.header.rows, error)

    def refused(self, error: ProtocolError) -> None:
        """Count and report a refused message or command, and end the sessions that lost a row by it."""
        self.counted["refused"] += 1
        self.warn(words(error))
        if isinstance(error, RefusedMessage):
            self.lost_rows(error.rows, error)

    def warn(self, what: str) -> None:
        """Ask the supervisor to log a problem. Problems beyond the limit of `Refusals` are only counted."""
        left_out = self._refusals.one_more(time.monotonic())
        if left_out is not None:
            self.crossing.report(Refused(with_left_out(what, left_out)))

    def decision_failed(self, rows: Sequence[Row], error: Exception) -> None:
        """Let an error outside the actor's step end the sessions of `rows`, not the host."""
        self.counted["decisions_failed"] += 1
        self.warn(f"received rows could not be processed: {traceback_of(error)}")
        self.lost_rows(rows, error)

    def send_owed(self, wire: ProcessWire, deadline_s: float) -> None:
        """Send owed acknowledgements, and wait up to `deadline_s` seconds until all sent messages are acknowledged."""
        until_s = time.monotonic() + deadline_s
        self.exchange.idle()
        self.exchange.drain(wire.send)
        while self.exchange.unfinished() and time.monotonic() < until_s:
            self._receive(wire, 0.02)
            self.exchange.idle()
            self.exchange.drain(wire.send)

    def _count(self) -> None:
        left_out = self._refusals.overdue(time.monotonic())
        if left_out:
            self.crossing.report(Refused(f"{left_out} more, left out"))
        dropped = self.crossing.ring.dropped
        assert self.wire is not None
        self.crossing.counters = {
            **self.exchange.counters, **self.counted, **self.wire.counters, "trace_dropped": dropped
        }  # fmt: skip

    def session_failed(self, row: Row, error: BaseException) -> None:
        """Report to the supervisor that the step of a row failed, so that its session ends."""
        what = f"session {row.session}, epoch {row.epoch}, position {row.position}: {describe(error)}"
        self.crossing.report(SessionFailed(row.session, row.epoch, what, traceback_of(error), _cause_of(error)))

    def failed(self, error: BaseException) -> None:
        what = words(error)
        if not self.life.over:
            self.life.to(State.FAILED, what)
        state = self.life.story[-2][0].value
        self.crossing.report(Failed(f"{type(error).__name__} while {state}: {what}", traceback_of(error)))

    def close(self) -> None:
        """Close the wire. The control thread must have ended, because it uses the waker."""
        if self.crossing.waker is not None:
            self.crossing.waker.close()
        if self.wire is not None:
            self.wire.close()

    def _to(self, state: State) -> None:
        self.life.to(state)
        self.crossing.report(StateChanged(state.value))


def _cause_of(error: BaseException) -> Cause:
    """Return why a session failed: refused messages and missed deadlines are not the actor's own errors."""
    if isinstance(error, ProtocolError):
        return Cause.REFUSED
    return Cause.LATE if isinstance(error, JoinTimeout) else Cause.RAISED


def live(kind: type[Process], spec: HostSpec, lifeline: int) -> int:
    """Run a host process until it ends, and return its exit code.

    `lifeline` is a descriptor that becomes readable when the supervisor has ended.
    """
    prepare_process(spec)
    crossing = Crossing()
    control = ControlThread(spec, crossing, lifeline)
    control.start()
    host = kind(spec, crossing)
    try:
        return outcome(host)
    finally:
        control.finish()
        host.close()


def prepare_process(spec: HostSpec) -> None:
    """Give this process its device, threads and cores."""
    devices.enter(spec.device)
    torch.set_num_threads(spec.threads)
    if spec.cpus is not None:  # before any thread starts, so that ZeroMQ's thread runs on the same cores
        system.run_on(spec.cpus)


def outcome(host: Process) -> int:
    """Run a host until it ends. Return 0, or 1 if it failed; the supervisor hears of any failure."""
    try:
        host.run()
    except Stopped:
        pass
    except BaseException as error:
        host.failed(error)
        return 1
    return 0
