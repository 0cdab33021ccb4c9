"""A host that serves: it joins and batches what comes, takes steps, sends what they make. See process.py for its life."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ranvier.transport.ends import Received
from ranvier.transport.errors import ProtocolError
from ranvier.transport.header import Row
from ranvier.transport.zeromq import ZeroWire

from . import taps
from .actor import Batch, keeps
from .core import HostCore, Work
from .join import Overdue
from .lifecycle import State
from .loading import load
from .open_sessions import Onlooker, OpenSessions
from .process import ACK_DELAY_S, TICK_S, Process, live
from .recording import Recording
from .session import SessionInfo
from .snapshots import Snapshots
from .spans import Spans
from .spec import HostLink, HostSpec

DRAIN_DEADLINE_S = 1.0


def main(spec: HostSpec, lifeline: int) -> int:
    """The whole life of a host; returns the exit code. `lifeline` is a descriptor that ends when the supervisor does."""
    return live(Host, spec, lifeline)


class Host(Process):
    """The step thread's side: load, link up, step until told to stop."""

    recording: Recording | None = None

    def prepare(self) -> Mapping[str, Any]:
        spec = self.spec
        self.core = HostCore(spec.inputs, spec.outputs, (), self.exchange, spec.batch_tokens, spec.needed, spec.batches)
        self.counted = self.core.counters
        actor = self.actor = load(spec, self.progress)
        self.spans = Spans(self.exchange, self.records)
        onlookers: list[Onlooker] = [self.spans] if spec.trace else []
        if spec.record is not None:
            self.recording = Recording(spec, spec.record)
            onlookers.append(self.recording)
        self.sessions = OpenSessions(actor, self.core, onlookers)
        state = Path(spec.snapshot_of(spec.label))
        self.snapshots = Snapshots.of(actor, state, spec.restart.snapshot_s)
        return {
            "capacity_tokens": actor.capacity_tokens(), "held_bytes": actor.held_bytes(), "keeps": keeps(actor)
        }  # fmt: skip

    def work(self, wire: ZeroWire) -> None:
        self._steps(wire)
        self._drain(wire)

    def on_message(self, received: Received) -> None:
        self.core.on_message(received)

    def on_place(self, instead_of: str | None) -> None:
        if self.snapshots is not None and instead_of is not None:
            state = Path(self.spec.snapshot_of(instead_of))
            if self.recording is not None:
                self.recording.restored(state)
            self.snapshots.restore(state)

    def add_links(self, plain: Sequence[Mapping[str, Any]]) -> None:
        links = [HostLink.from_plain(each) for each in plain]
        for spec in dict.fromkeys(link.link for link in links):  # one to ourselves has both its ends here
            self.exchange.add(spec)
        for link in links:
            self.core.add(link)
            if link.tap is not None and link.outgoing and link.link.edge not in self.core.outputs.taps:
                self.core.outputs.taps[link.link.edge] = taps.make(
                    link.tap, link.link, self.spec.tap_folder, self.records.tapped, self._alarm
                )

    def _alarm(self, edge: str, row: Row, share: float, at_ns: int) -> None:
        self.crossing.tell("alarm", edge=edge, session=row.session, position=row.position, share=share, at_ns=at_ns)

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
                if self.recording is not None:
                    self.recording.flush()
                self._flush(wire)
                self._count()
            while crossing.commands:
                if not self.obey_next():
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

    def _step(self, work: Work) -> None:
        crossing = self.crossing
        started_ns = crossing.stepping_since_ns = time.monotonic_ns()
        spans = self.spans.begin(work.batch.rows)
        done, failures = None, {}
        try:
            outputs, finished_ns = self._stepped(work.batch)
            done = self.core.finish(work)  # so that its credit rides along with the outputs, or goes before them
            self.core.complete(work, outputs, finished_ns)
        except Exception as error:
            finished_ns = time.monotonic_ns()
            if done is None:
                done = self.core.finish(work)
            failures = self._step_failed(work, error)
        assert self.wire is not None
        self._flush(self.wire)  # the next stage first, then our own books
        crossing.steps += 1
        crossing.queued = self.core.queued
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

    def _stepped(self, batch: Batch) -> tuple[Mapping[str, torch.Tensor | Batch], int]:
        """What the actor makes of a batch, and when it was done. It is kept where that is asked for, and so is a step that
        fails."""
        batch = batch.aligned()
        try:
            outputs = self.actor.step(batch)
        except Exception as error:
            if self.recording is not None:
                self.recording.stepped(batch, error)
            raise
        finished_ns = time.monotonic_ns()
        if self.recording is not None:
            self.recording.stepped(batch, outputs)
        if self.snapshots is not None:
            self.snapshots.on_step()
        return outputs, finished_ns

    def _step_failed(self, work: Work, error: Exception) -> dict[int, Exception]:
        """End the sessions that the failure is due to, which are returned; the others of the batch get their step alone."""
        if len(work.batch.rows) == 1:
            self.session_failed(work.batch.rows[0], error)
            return {work.batch.rows[0].session: error}
        failures = {}
        for single in self.core.alone(work):
            try:
                self.core.complete(single, *self._stepped(single.batch))
            except Exception as own:
                self.session_failed(single.batch.rows[0], own)
                failures[single.batch.rows[0].session] = own
        return failures

    def _give_up_overdue(self) -> None:
        limit_s = self.spec.supervision.join_deadline_s
        for row, present, missing, _ in self.core.overdue(time.monotonic_ns() - int(limit_s * 1e9)):
            self.session_failed(
                row,
                TimeoutError(
                    f"the join waited over {limit_s:g} s: expected {', '.join(missing)}, got only {', '.join(present)}"
                ),
            )

    def session_failed(self, row: Row, error: Exception) -> None:
        self.sessions.close(row.session)
        super().session_failed(row, error)

    def failed(self, error: BaseException) -> None:
        if self.recording is not None:
            self.recording.flush()  # the last steps before a failure are those that are wanted
        super().failed(error)

    def lost_rows(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            self.session_failed(row, error)

    def held_up(self, before_ns: int) -> Iterable[Overdue]:
        return self.core.overdue(before_ns)

    # -- commands -----------------------------------------------------------------------------------------------

    def obey(self, kind: str, fields: Mapping[str, Any]) -> bool:
        """False: stop."""
        if kind == "open":
            try:
                info = SessionInfo.from_plain(fields["info"])
            except (KeyError, TypeError, ValueError) as error:
                self.refused(ProtocolError(f"control open: {type(error).__name__}: {error}"))
                return True
            try:
                self.sessions.open(info)
            except Exception as error:
                self.session_failed(Row(info.session, info.epoch, 0, 0), error)
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
        self.add_links(fields["links"])
        self.exchange.open()
        self.crossing.tell("linked", peer=peer)

    def _unlink(self, peer: str) -> None:
        """A replica has left."""
        assert self.wire is not None
        self.core.remove(peer)
        self.exchange.remove(peer)
        self.wire.disconnect(peer)

    # -- the end ------------------------------------------------------------------------------------------------

    def _drain(self, wire: ZeroWire) -> None:
        """Send what is owed and wait until what was sent is acknowledged, but not for long."""
        self._to(State.DRAINING)
        self.core.outputs.give_up(lambda _row: False)  # every session is over
        self.send_owed(wire, DRAIN_DEADLINE_S)
        if self.recording is not None:
            self.recording.ended()
            self.counted["recording_full"] = bool(self.recording.full)
        self._record_discarded()
        self._count()
        self.crossing.tell("counters", counters=self.crossing.counters)

    def _record_discarded(self) -> None:
        """Messages that went into no step: losers of a join, rows of sessions that are over."""
        if self.spec.trace:
            now_ns = time.monotonic_ns()
            for received in self.core.discarded:
                self.records.done(received, now_ns, now_ns, 0)
        self.core.discarded.clear()


def _others(sources: Iterable[Received], done: Iterable[Received]) -> list[Received]:
    """Each once, but those."""
    found = {id(received): received for received in sources}
    for received in done:
        found.pop(id(received), None)
    return list(found.values())
