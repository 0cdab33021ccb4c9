"""Serve requests in a host: join and batch the received rows, run steps, send the outputs.

`process.py` holds the life cycle that all hosts share.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ranvier.transport.format.aligned import NARROW_BYTES
from ranvier.transport.format.dtypes import BY_NAME
from ranvier.transport.format.header import Row
from ranvier.transport.links.exchange import ACK_DELAY_S, TICK_S
from ranvier.transport.links.link_state import Received
from ranvier.transport.links.wire import ProcessWire

from ..component.actor import Batch, RowsFailed, keeps
from ..component.ownership import soles
from ..component.session import SessionInfo
from ..errors import describe, traceback_of
from ..protocol import step_board
from ..protocol.control_protocol import (
    Alarm,
    Close,
    Counters,
    Hold,
    Link,
    Linked,
    Open,
    Ready,
    StepCommand,
    Stop,
    Unlink,
)
from ..protocol.host_spec import HostLink, HostSpec
from ..protocol.lifecycle import State
from ..protocol.training_spec import TrainingLink
from ..trace.recording_writer import Recording
from ..trace.spans import Spans
from . import taps
from .batcher import Work
from .join import Overdue
from .loading import load
from .open_sessions import Onlooker, OpenSessions
from .process import JoinTimeout, Process, live
from .scheduler import HostCore
from .snapshots import Snapshots

DRAIN_DEADLINE_S = 1.0


class Made(NamedTuple):
    """Hold the outputs of a step, the time when it ended, and the ports whose memory nobody else holds.

    `failed` holds the errors of rows that are not in the outputs.
    """

    outputs: Mapping[str, torch.Tensor | Batch]
    finished_ns: int
    own: frozenset[str]
    failed: Mapping[Row, Exception]


_NONE = frozenset[str]()
_NO_FAILURES: Mapping[Row, Exception] = {}


class _Afterwards(Exception):
    """Signal an error after the actor's step, in its recording or snapshot. `__cause__` is the error itself."""


def _cause(error: BaseException) -> BaseException:
    return error.__cause__ or error if isinstance(error, _Afterwards) else error


def main(spec: HostSpec, lifeline: int) -> int:
    """Run a host until it ends, and return its exit code.

    `lifeline` is a descriptor that becomes readable when the supervisor has ended.
    """
    return live(Host, spec, lifeline)


class Host(Process):
    """Drive the step thread of a serving host: load, link up, run steps until `stop`."""

    recording: Recording | None = None
    shares = False
    """True if other actors run in the same process."""

    def prepare(self, address: str) -> Ready:
        spec = self.spec
        self.core = HostCore(spec.inputs, spec.outputs, (), self.exchange, spec.batch_tokens, spec.needed, spec.batches)
        self.counted = self.core.counters
        actor = self.actor = load(spec, self.progress, stays=self.shares)
        self.spans = Spans(self.exchange, self.records)
        self.board = step_board.board(Path(spec.board))
        self._alignment_matters = any(BY_NAME[port.tensor.dtype].itemsize > NARROW_BYTES for port in spec.inputs)
        onlookers: list[Onlooker] = [self.spans] if spec.trace else []
        if spec.record is not None:
            self.recording = Recording(spec, spec.record)
            onlookers.append(self.recording)
        self.sessions = OpenSessions(actor, self.core, onlookers)
        state = Path(spec.snapshot_of(spec.label))
        self.snapshots = Snapshots.of(actor, state, spec.restart.snapshot_s, self._snapshot_failed)
        return Ready(address, actor.capacity_tokens(), actor.held_bytes(), keeps(actor))

    def work(self, wire: ProcessWire) -> None:
        self._steps(wire)
        self._drain(wire)

    def on_message(self, received: Received) -> None:
        self.core.on_message(received)

    def on_connected(self, instead_of: str | None) -> None:
        if self.snapshots is not None and instead_of is not None:
            state = Path(self.spec.snapshot_of(instead_of))
            if self.recording is not None:
                self.recording.restored(state)
            self.snapshots.restore(state)

    def add_links(self, links: Sequence[HostLink], training: Sequence[TrainingLink] = ()) -> None:
        for spec in dict.fromkeys(link.link for link in links):  # a link to this host itself appears at both ends
            self.exchange.add(spec)
        for link in links:
            self.core.add(link)
            if link.tap is not None and link.outgoing and link.link.edge not in self.core.outputs.taps:
                self.core.outputs.taps[link.link.edge] = taps.make(
                    link.tap, link.link, self.spec.tap_folder, self.records.tapped, self._alarm
                )

    def _snapshot_failed(self, error: Exception) -> None:
        self.counted["snapshots_failed"] += 1
        self.warn(f"a snapshot could not be taken: {describe(error)}")

    def _alarm(self, edge: str, row: Row, share: float, at_ns: int) -> None:
        self.crossing.report(Alarm(edge, row.session, row.position, share, at_ns))

    # -- stepping -----------------------------------------------------------------------------------------------

    def _steps(self, wire: ProcessWire) -> None:
        exchange, core, crossing = self.exchange, self.core, self.crossing
        tick_at_s = time.monotonic() + TICK_S
        while True:
            if time.monotonic() > tick_at_s:  # also while there is work: a join may be overdue
                tick_at_s = time.monotonic() + TICK_S
                self._tick(wire)
            if crossing.commands and not self._obey_all(wire):
                return
            due_ns = core.outputs.due_ns
            if due_ns is not None and time.monotonic_ns() >= due_ns:
                core.send_copies(time.monotonic_ns())
                exchange.drain(wire.send)
                due_ns = core.outputs.due_ns
            if not core.queue or exchange.waiting:
                self._wait(wire, due_ns)
            elif core.may_batch:  # new rows may go before the queued ones, or into the same step
                self._receive_all(wire)
            work = None
            try:
                work = core.take()
            except Exception as error:
                self.decision_failed(core.abandon(), error)
            if core.discarded:
                self._record_discarded()
            if work is not None:
                self.step(work)

    def _obey_all(self, wire: ProcessWire) -> bool:
        """Obey the commands that have arrived. Return False if one of them is `stop`."""
        while self.crossing.commands:
            if not self.obey_next():
                return False
            self.exchange.drain(wire.send)
        return True

    def _receive_all(self, wire: ProcessWire) -> None:
        """Take in all messages that have arrived."""
        while self._receive(wire, 0):
            pass

    def _tick(self, wire: ProcessWire) -> None:
        """Do what is due every `TICK_S`."""
        self.exchange.tick()
        self._give_up_overdue()
        if self.snapshots is not None:
            self.snapshots.on_tick()
        if self.recording is not None:
            self.recording.flush()
        self.exchange.drain(wire.send)
        self._count()

    def _wait(self, wire: ProcessWire, due_ns: int | None) -> None:
        """Wait for messages, because nothing can be done before one comes, and take in all that have come."""
        exchange, core = self.exchange, self.core
        self.exchange.drain(wire.send)
        wait_s = ACK_DELAY_S if exchange.owes() else TICK_S
        if due_ns is not None:
            wait_s = min(wait_s, max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
        if self._receive(wire, wait_s):
            if core.may_batch:  # all messages that have arrived meanwhile may go into one step
                self._receive_all(wire)
        elif exchange.owes():
            exchange.idle()
            self.exchange.drain(wire.send)
        elif due_ns is None and not self.crossing.commands:
            gc.collect()

    def step(self, work: Work) -> None:
        """Run one step, and send what it made."""
        crossing = self.crossing
        started_ns = crossing.stepping_since_ns = time.monotonic_ns()
        spans = self.spans.begin(work.batch.rows)
        done, failures, made = None, {}, None
        try:
            made = self._stepped(work.batch, again=len(work.batch.rows) > 1 and not work.pieces)
            finished_ns = made.finished_ns
            done = self.core.finish(work)  # now, so that the credit travels with the outputs, or before them
            self.core.complete(work, made.outputs, finished_ns, made.own)
            if made.failed:
                failures = self._rows_failed(made.failed)
        except BaseException as error:  # also SystemExit: it ends the sessions of the step, not the host
            finished_ns = time.monotonic_ns()
            if done is None:
                done = self.core.finish(work)
            failures = self._step_failed(work, _cause(error), again=made is None and not isinstance(error, _Afterwards))
        assert self.wire is not None
        self.exchange.drain(self.wire.send)  # send to the next stage first, then do the bookkeeping
        crossing.steps += 1
        crossing.queued = len(self.core.queue)
        crossing.stepped_ns, crossing.stepping_since_ns = finished_ns, 0
        if self.recording is not None:
            self.recording.write_if_due()
        if spans:
            self.spans.end(spans, work.sources, started_ns, finished_ns, len(work.batch.rows), failures)
        if self.spec.trace:
            on = [] if len(done) == len(work.sources) else _others(work.sources, done)
            for received in done:
                self.records.done(received, started_ns, finished_ns, len(done) + len(on))
            for received in on:  # some of its rows go into a later step
                self.records.part(received, started_ns, finished_ns, len(done) + len(on), work.batch.rows)

    def _stepped(self, batch: Batch, *, again: bool = False) -> Made:
        """Run one step, and record it if the actor is recorded.

        `again`: if the step fails, its rows are tried again from this same batch.
        """
        if self._alignment_matters:
            batch = batch.aligned()
        # an actor that writes into its inputs gets copies where the originals are needed afterwards
        given = batch.copied() if (again or self.recording is not None) and self.actor.writes else batch
        rows, board = batch.rows, self.board
        if len(rows) == 1:
            board[1], board[0] = rows[0].session, 1
        else:
            step_board.write(board, [row.session for row in rows])
        failed = _NO_FAILURES
        try:
            outputs = self.actor.step(given)
        except RowsFailed as some:
            outputs, failed = some.outputs, some.failures
        except BaseException as error:
            if self.recording is not None:
                self.recording.stepped(batch, error)
            raise
        finally:
            board[0] = 0
        finished_ns = time.monotonic_ns()
        try:
            own = soles(outputs, given) if self.core.outputs.large else _NONE
            if self.recording is not None:
                self.recording.stepped(batch, outputs)
            if self.snapshots is not None:
                self.snapshots.on_step()
        except Exception as error:
            raise _Afterwards from error
        return Made(outputs, finished_ns, own, failed)

    def _rows_failed(self, failed: Mapping[Row, Exception]) -> dict[int, BaseException]:
        """End the sessions of rows that the actor itself reports, and return their errors by session."""
        for row, error in failed.items():
            self.session_failed(row, error)
        return {row.session: error for row, error in failed.items()}

    def _step_failed(self, work: Work, error: BaseException, *, again: bool) -> dict[int, BaseException]:
        """End the sessions that caused a failure, and return their errors by session.

        `again`: the step itself failed. If the batch has several rows, each is then stepped alone, and only the sessions
        that fail again end. Without `again` the actor has taken the step already, so all sessions of the batch end.
        """
        rows = work.batch.rows
        if len(rows) == 1 or not again:
            for row in rows:
                self.session_failed(row, error)
            return {row.session: error for row in rows}
        failures: dict[int, BaseException] = {}
        try:
            singles = self.core.alone(work)
        except Exception as own:
            return self._step_failed(work, own, again=False)
        assert self.wire is not None
        for single in singles:
            try:
                made = self._stepped(single.batch)
                self.core.complete(single, made.outputs, made.finished_ns, made.own)
                failures |= self._rows_failed(made.failed)
                self.exchange.drain(self.wire.send)  # before the next step, which may reuse the memory of these outputs
            except BaseException as own:
                self.session_failed(single.batch.rows[0], _cause(own))
                failures[single.batch.rows[0].session] = _cause(own)
        return failures

    def _give_up_overdue(self) -> None:
        limit_s = self.spec.supervision.join_deadline_s
        for row, present, missing, _ in self.core.overdue(time.monotonic_ns() - int(limit_s * 1e9)):
            expected, got = ", ".join(missing), ", ".join(present)
            late = JoinTimeout(f"the join waited over {limit_s:g} s: expected {expected}, got only {got}")
            self.session_failed(row, late)

    def session_failed(self, row: Row, error: BaseException) -> None:
        super().session_failed(row, error)
        try:
            self.sessions.close(row.session)
        except BaseException as own:  # raised by the actor's `close`; the session is closed anyway
            self.warn(f"session {row.session} could not be closed: {traceback_of(own)}")

    def failed(self, error: BaseException) -> None:
        if self.recording is not None:
            self.recording.flush()  # the last steps before a failure matter most
        super().failed(error)

    def lost_rows(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            self.session_failed(row, error)

    def held_up(self, before_ns: int) -> Iterable[Overdue]:
        return self.core.overdue(before_ns)

    # -- commands -----------------------------------------------------------------------------------------------

    def obey(self, command: StepCommand) -> bool:
        """Obey a command of the supervisor. Return False if it is `Stop`."""
        match command:
            case Open():
                self._open(command.info)
            case Hold():
                self.sessions.hold(command.session)
            case Close():
                self._close(command.session)
            case Link():
                self._link(command)
            case Unlink():
                self._unlink(command.peer)
        return not isinstance(command, Stop)

    def _open(self, info: SessionInfo) -> None:
        step_board.write(self.board, [info.session])
        try:
            self.sessions.open(info)
        except BaseException as error:
            self.session_failed(Row(info.session, info.epoch, 0, 0), error)
        self.board[0] = 0

    def _close(self, session: int) -> None:
        try:
            self.sessions.close(session)
        except BaseException as error:  # raised by the actor's `close`: its other sessions continue
            self.warn(f"session {session} could not be closed: {traceback_of(error)}")
        if self.snapshots is not None:
            self.snapshots.on_step()

    def _link(self, command: Link) -> None:
        """Add the links with a replica that has joined the run, and report `linked`.

        On an error `linked` is not sent. Whoever started the replica waits for `linked`, and handles that case.
        """
        assert self.wire is not None
        peer = command.peer
        try:
            self.wire.connect(peer, command.address)
            self.add_links(command.links)
        except Exception as error:
            self.warn(f"no link with {peer}: {traceback_of(error)}")
            return
        self.exchange.open()
        self.crossing.report(Linked(peer))

    def _unlink(self, peer: str) -> None:
        """Remove the links with a replica that has left the run."""
        assert self.wire is not None
        self.core.remove(peer)
        self.exchange.remove(peer)
        self.wire.disconnect(peer)

    # -- the end ------------------------------------------------------------------------------------------------

    def _drain(self, wire: ProcessWire) -> None:
        """Finish the links: wait up to `DRAIN_DEADLINE_S` for acknowledgements, then report the last counters."""
        self._to(State.DRAINING)
        self.core.outputs.give_up(lambda _row: False)  # every session has ended
        self.send_owed(wire, DRAIN_DEADLINE_S)
        if self.recording is not None:
            self.recording.ended()
            self.counted["recording_full"] = bool(self.recording.full)
        self._record_discarded()
        self._count()
        self.crossing.report(Counters(self.crossing.counters))

    def _record_discarded(self) -> None:
        """Record the messages that went into no step: late parts of a join, and rows of sessions that have ended."""
        if self.spec.trace:
            now_ns = time.monotonic_ns()
            for received in self.core.discarded:
                self.records.done(received, now_ns, now_ns, 0)
        self.core.discarded.clear()


def _others(sources: Iterable[Received], done: Iterable[Received]) -> list[Received]:
    """Return the messages in `sources` that are not in `done`, each once."""
    found = {id(received): received for received in sources}
    for received in done:
        found.pop(id(received), None)
    return list(found.values())
