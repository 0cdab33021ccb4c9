"""A host process: the step thread (this file) and the control thread (control.py).

The step thread owns the data wire: it waits on it directly, runs the actor, sends the outputs. No event loop is in its
way: waiting for the socket in trio took 18 µs a hop before any work was done.
"""

from __future__ import annotations

import gc
import math
import os
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ranvier.transport.curve import read as read_keys
from ranvier.transport.errors import LinkBroken, ProtocolError
from ranvier.transport.exchange import Exchange, RefusedMessage
from ranvier.transport.header import Row
from ranvier.transport.link import Arrival
from ranvier.transport.zeromq import ZeroWire

from .actor import Actor, Batch, Context, keeps
from .checkpoint import known_checkpoint
from .control import ControlThread
from .core import HostCore, Work
from .crossing import Crossing
from .kinds import make
from .lifecycle import Lifecycle, State
from .open_sessions import OpenSessions
from .records import Records
from .session import SessionInfo
from .snapshots import Snapshots
from .spec import HostLink, HostSpec

ACK_DELAY_S = 0.001
"""An acknowledgement that nobody waits for goes out after so long without work."""
TICK_S = 1.0
"""Unanswered offers and probes are repeated this often; garbage is collected then, too."""
HANDSHAKE_DEADLINE_S = 30.0
DRAIN_DEADLINE_S = 1.0


class Stopped(Exception):
    """The supervisor said stop before the run had begun."""


def main(spec: HostSpec, lifeline: int) -> int:
    """The whole life of a host; returns the exit code. `lifeline` is a descriptor that ends when the supervisor does."""
    torch.set_num_threads(spec.threads)
    if spec.cpus is not None:  # before any thread is made, so that ZeroMQ's own runs on the same cores
        os.sched_setaffinity(0, spec.cpus)
    crossing = Crossing()
    control = ControlThread(spec, crossing, lifeline)
    control.start()
    host = Host(spec, crossing)
    try:
        host.run()
        code = 0
    except Stopped:
        code = 0
    except BaseException as error:  # whatever it was, the supervisor must hear of it
        host.failed(error)
        code = 1
    finally:
        control.finish()
        host.close()
    return code


class Host:
    """The step thread's side: load, link up, step until told to stop."""

    def __init__(self, spec: HostSpec, crossing: Crossing) -> None:
        self.spec = spec
        self.crossing = crossing
        self.records = Records(crossing.ring)
        self.life = Lifecycle(spec.label)
        self.wire: ZeroWire | None = None

    def run(self) -> None:
        spec, crossing = self.spec, self.crossing
        self._to(State.LOADING)
        wire = self.wire = ZeroWire(
            spec.identity,
            spec.endpoint,
            max_frame_bytes=spec.max_frame_bytes,
            shared_from_bytes=spec.shared_from_bytes,
            direct=True,
            keys=read_keys(Path(spec.keys), spec.actor) if spec.keys is not None else None,
        )
        crossing.waker = wire.waker()
        self.exchange = Exchange(
            spec.identity,
            spec.graph_hash,
            (),
            time.monotonic_ns,
            self.records.sent if spec.trace else None,
            self.records.unsent if spec.trace else None,
        )
        self.core = HostCore(spec.inputs, spec.outputs, (), self.exchange, spec.batch_tokens, spec.needed, spec.batches)
        with torch.inference_mode():
            self.actor = self._load()
            self.sessions = OpenSessions(self.actor, self.core)
            state = Path(spec.snapshot_of(spec.label))
            self.snapshots = Snapshots.of(self.actor, state, spec.restart.snapshot_s)
            gc.collect()
            gc.freeze()
            # A full collection walks all of torch's objects: 1 ms in the middle of a step. Ticks collect what is young.
            gc.disable()
            self._to(State.READY)
            crossing.tell(
                "ready",
                address=wire.address,
                capacity_tokens=self.actor.capacity_tokens(),
                held_bytes=self.actor.held_bytes(),
                keeps=keeps(self.actor),
            )
            self._link_up(wire)
            self._to(State.RUNNING)
            self._steps(wire)
            self._drain(wire)
        self._to(State.STOPPED)

    def _load(self) -> Actor:
        spec = self.spec
        actor = make(spec.implementation, spec.folder)
        checkpoint = known_checkpoint(Path(spec.model)) if spec.model is not None else None
        actor.load(
            Context(
                name=spec.label,
                args=spec.args,
                progress=lambda share: self._progress(share),
                checkpoint=checkpoint,
                dtype=spec.dtype,
                layers=spec.layers,
                cache_tokens=spec.cache_tokens,
                experts=spec.experts,
                weights=Path(spec.weights) if spec.weights is not None else None,
                replica=spec.replica,
                precision=spec.precision,
            )
        )
        return actor

    def _progress(self, share: float) -> None:
        self.crossing.tell("progress", share=float(share))
        if any(kind == "stop" for kind, _ in self.crossing.commands):
            raise Stopped

    # -- linking up ---------------------------------------------------------------------------------------------

    def _link_up(self, wire: ZeroWire) -> None:
        """Connect to all neighbours once the supervisor has told who and where they are, and open every link. A spare waits
        here until it is needed. A neighbour that is lost meanwhile is not waited for."""
        early = deque[Arrival]()
        connected = False
        deadline = math.inf
        while True:
            while self.crossing.commands:
                kind, fields = self.crossing.commands.popleft()
                if kind == "connect":
                    self._connect(wire, fields)
                    connected, deadline = True, time.monotonic() + HANDSHAKE_DEADLINE_S
                elif (connected or kind == "stop") and not self._obey(kind, fields):
                    raise Stopped
            if not connected:
                arrival = wire.receive(TICK_S)
                if arrival is not None:  # a neighbour was told first; it is answered once we know where it listens
                    early.append(arrival)
                continue
            self._flush(wire)
            if self.exchange.ready and not early:
                return
            if time.monotonic() > deadline:
                raise LinkBroken(
                    f"{self.spec.label}: links did not open within {HANDSHAKE_DEADLINE_S:.0f} s: {self._closed()}"
                )
            if early:
                self._take_in(early.popleft())
            elif not self._receive(wire, 0.2):
                self.exchange.tick()

    def _connect(self, wire: ZeroWire, fields: Mapping[str, Any]) -> None:
        for peer, address in fields["peers"].items():
            wire.connect(peer, address)
        self._add_links(fields["links"])
        if self.snapshots is not None and fields["instead_of"] is not None:
            self.snapshots.restore(Path(self.spec.snapshot_of(fields["instead_of"])))

    def _add_links(self, plain: Sequence[Mapping[str, Any]]) -> None:
        links = [HostLink.from_plain(each) for each in plain]
        for spec in dict.fromkeys(link.link for link in links):  # one to ourselves has both its ends here
            self.exchange.add(spec)
        for link in links:
            self.core.add(link)
        self.exchange.open()

    def _closed(self) -> str:
        closed = [link.spec.name for link in self.exchange.sending.values() if not link.open]
        closed += [link.spec.name for link in self.exchange.receiving.values() if not link.open]
        return ", ".join(closed)

    # -- stepping -----------------------------------------------------------------------------------------------

    def _steps(self, wire: ZeroWire) -> None:
        exchange, core, crossing = self.exchange, self.core, self.crossing
        tick_at_s = time.monotonic() + TICK_S
        while True:
            if time.monotonic() > tick_at_s:  # whether or not there is work: a join may wait while others go on
                tick_at_s = time.monotonic() + TICK_S
                exchange.tick()
                self._give_up_overdue()
                if self.snapshots is not None:
                    self.snapshots.on_tick()
                self._flush(wire)
                self._count()
            while crossing.commands:
                if not self._obey(*crossing.commands.popleft()):
                    return
                self._flush(wire)
            due_ns = core.due_ns
            if due_ns is not None and time.monotonic_ns() >= due_ns:
                core.send_copies(time.monotonic_ns())
                self._flush(wire)
                due_ns = core.due_ns
            if not core.queued or exchange.waiting:
                self._wait(wire, due_ns)
            elif core.may_batch:  # what has come meanwhile may go before what waits, or together with it
                while self._receive(wire, 0):
                    pass
            work = core.take()
            if core.discarded:
                self._record_discarded()
            if work is not None:
                self._step(work)

    def _wait(self, wire: ZeroWire, due_ns: int | None) -> None:
        """Nothing can be done before something comes: take that in."""
        exchange, core = self.exchange, self.core
        self._flush(wire)
        wait_s = ACK_DELAY_S if exchange.owes() else TICK_S
        if due_ns is not None:
            wait_s = min(wait_s, max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
        if self._receive(wire, wait_s):
            if core.may_batch:  # all that has queued up meanwhile may go into one step
                while self._receive(wire, 0):
                    pass
        elif exchange.owes():
            exchange.idle()
            self._flush(wire)
        elif due_ns is None and not self.crossing.commands:
            gc.collect()

    def _receive(self, wire: ZeroWire, timeout_s: float) -> bool:
        """Take in what comes next; False if nothing came in time."""
        try:
            arrival = wire.receive(timeout_s)
        except ProtocolError as error:
            self._refused(error)
            return True
        if arrival is None:
            return False
        self._take_in(arrival)
        return True

    def _take_in(self, arrival: Arrival) -> None:
        try:
            received = self.exchange.on_arrival(arrival)
            if received is not None:
                self.core.on_message(received)
        except ProtocolError as error:
            self._refused(error)

    def _flush(self, wire: ZeroWire) -> None:
        outbox = self.exchange.outbox
        if outbox:
            for outgoing in outbox:
                outgoing.buffers = wire.send(outgoing.peer, outgoing.header, outgoing.buffers)
            outbox.clear()

    def _step(self, work: Work) -> None:
        crossing = self.crossing
        started_ns = crossing.stepping_since_ns = time.monotonic_ns()
        done = None
        try:
            outputs = self.actor.step(work.batch)
            finished_ns = time.monotonic_ns()
            if self.snapshots is not None:
                self.snapshots.on_step()
            done = self.core.finish(work)  # so that its credit rides along with the outputs, or goes before them
            self.core.complete(work, outputs, finished_ns)
        except Exception as error:
            finished_ns = time.monotonic_ns()
            if done is None:
                done = self.core.finish(work)
            self._step_failed(work, error)
        assert self.wire is not None
        self._flush(self.wire)  # the next stage first, then our own books
        crossing.steps += 1
        crossing.queued = self.core.queued
        crossing.stepping_since_ns = 0
        if self.spec.trace:
            for received in done:
                self.records.done(received, started_ns, finished_ns, len(done))

    def _step_failed(self, work: Work, error: Exception) -> None:
        """End the sessions that the failure is due to; the others of the batch get their step alone."""
        if len(work.batch.rows) == 1:
            self._session_failed(work.batch.rows[0], error)
            return
        for single in self.core.alone(work):
            try:
                outputs: Mapping[str, torch.Tensor | Batch] = self.actor.step(single.batch)
                if self.snapshots is not None:
                    self.snapshots.on_step()
                self.core.complete(single, outputs, time.monotonic_ns())
            except Exception as own:
                self._session_failed(single.batch.rows[0], own)

    def _give_up_overdue(self) -> None:
        limit_s = self.spec.supervision.join_deadline_s
        for row, present, missing in self.core.overdue(time.monotonic_ns() - int(limit_s * 1e9)):
            self._session_failed(
                row,
                TimeoutError(
                    f"the join waited over {limit_s:g} s: expected {', '.join(missing)}, got only {', '.join(present)}"
                ),
            )

    def _session_failed(self, row: Row, error: Exception) -> None:
        self.sessions.close(row.session)
        self.crossing.tell(
            "session_failed",
            session=row.session,
            epoch=row.epoch,
            error=f"session {row.session}, epoch {row.epoch}, position {row.position}: {type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
        )

    def _refused(self, error: ProtocolError) -> None:
        """A message was refused; whoever waits for its rows must hear of it."""
        self.core.counters["refused"] += 1
        self.crossing.tell("refused", what=str(error))
        if isinstance(error, RefusedMessage):
            for row in error.rows:
                self._session_failed(row, error)

    # -- commands -----------------------------------------------------------------------------------------------

    def _obey(self, kind: str, fields: Mapping[str, Any]) -> bool:
        """False: stop."""
        if kind == "open":
            try:
                info = SessionInfo.from_plain(fields["info"])
            except (KeyError, TypeError, ValueError) as error:
                self._refused(ProtocolError(f"control open: {type(error).__name__}: {error}"))
                return True
            try:
                self.sessions.open(info)
            except Exception as error:
                self._session_failed(Row(info.session, info.epoch, 0, 0), error)
        elif kind == "hold":
            self.sessions.hold(fields["session"])
        elif kind == "close":
            self.sessions.close(fields["session"])
            if self.snapshots is not None:
                self.snapshots.on_step()
        elif kind == "link":
            self._link(fields)
        elif kind == "unlink":
            self._unlink(fields["peer"])
        return kind != "stop"

    def _link(self, fields: Mapping[str, Any]) -> None:
        """A replica has joined: it will answer our offers, and we its own."""
        assert self.wire is not None
        peer = fields["peer"]
        self.wire.connect(peer, fields["address"])
        self._add_links(fields["links"])
        self.crossing.tell("linked", peer=peer)

    def _unlink(self, peer: str) -> None:
        """A replica has left."""
        assert self.wire is not None
        self.core.remove(peer)
        self.exchange.remove(peer)
        self.wire.disconnect(peer)

    def _count(self) -> None:
        dropped = self.crossing.ring.dropped
        assert self.wire is not None
        self.crossing.counters = {
            **self.exchange.counters, **self.core.counters, **self.wire.counters, "trace_dropped": dropped
        }  # fmt: skip

    # -- the end ------------------------------------------------------------------------------------------------

    def _drain(self, wire: ZeroWire) -> None:
        """Send what is owed and wait until what was sent is acknowledged, but not for long."""
        self._to(State.DRAINING)
        self.core.outputs.give_up(lambda _row: False)  # every session is over
        deadline = time.monotonic() + DRAIN_DEADLINE_S
        self.exchange.idle()
        self._flush(wire)
        while self.exchange.unfinished() and time.monotonic() < deadline:
            self._receive(wire, 0.02)
            self.exchange.idle()
            self._flush(wire)
        self._record_discarded()
        self._count()
        self.crossing.tell("counters", counters=self.crossing.counters)

    def failed(self, error: BaseException) -> None:
        if not self.life.over:
            self.life.to(State.FAILED, str(error))
        self.crossing.tell(
            "failed",
            error=f"{type(error).__name__} while {self.life.story[-2][0].value}: {error}",
            traceback="".join(traceback.format_exception(error)),
        )

    def close(self) -> None:
        """Close the wire. The control thread must be over: it holds the waker."""
        if self.crossing.waker is not None:
            self.crossing.waker.close()
        if self.wire is not None:
            self.wire.close()

    def _to(self, state: State) -> None:
        self.life.to(state)
        self.crossing.tell("state", state=state.value, why="")

    def _record_discarded(self) -> None:
        """Messages that went into no step: losers of a join, rows of sessions that are over."""
        if self.spec.trace:
            now_ns = time.monotonic_ns()
            for received in self.core.discarded:
                self.records.done(received, now_ns, now_ns, 0)
        self.core.discarded.clear()
