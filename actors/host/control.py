"""Run the control thread of a host: it sends heartbeats, receives commands and writes trace records.

The thread runs trio and owns no data socket. It ends the process when the supervisor is gone, that is when the other
end of the lifeline is closed. No host outlives its supervisor.
"""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import trio

from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.wires.trio_wire import TrioWire
from ranvier.transport.wires.zeromq import ZeroWire

from ..protocol.control_protocol import (
    MAX_BYTES,
    AskTime,
    Explain,
    Heartbeat,
    HostMessage,
    Refused,
    Situation,
    Time,
    decode,
    encode,
    for_host,
)
from ..protocol.host_spec import SUPERVISOR, HostSpec
from ..protocol.refusals import Refusals, with_left_out
from ..trace.crossing import Crossing
from ..trace.trace_file import TraceFile

SHIP_INTERVAL_S = 0.4
"""Seconds between two writes of the trace. The ring fills more slowly than that even at the highest rate. Each write
costs the step thread's core about 100 µs."""
SHIP_AT_ONCE = 256
"""Records that are encoded in one go. Meanwhile the step thread waits for the interpreter lock, about 0.5 ms."""
FINISH_DEADLINE_S = 2.0


class ControlThread:
    """Run the control thread. It starts before the weights are loaded, and ends after the step thread."""

    def __init__(self, spec: HostSpec, crossing: Crossing, lifeline: int) -> None:
        self._spec = spec
        self._crossing = crossing
        self._lifeline = lifeline
        self._refusals = Refusals()
        self._ending = threading.Event()
        self._attached = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._attached.wait()

    def finish(self) -> None:
        """Write the remaining trace records and end the thread. The step thread calls this last."""
        self.end()
        self._thread.join(FINISH_DEADLINE_S)

    def end(self) -> None:
        """Let the thread begin to end."""
        self._ending.set()

    async def _main(self) -> None:
        spec = self._spec
        events_in, events_out = trio.open_memory_channel[HostMessage](
            math.inf
        )  # peers cause only refusals: rate-limited
        try:
            wire = TrioWire(ZeroWire(spec.identity, spec.control, max_frame_bytes=MAX_BYTES))
            wire.connect(SUPERVISOR, spec.supervisor)
            self._crossing.attach(events_in)
        finally:
            self._attached.set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._commands, wire)
                nursery.start_soon(self._lifeline_watch)
                nursery.start_soon(self._heartbeats, wire)
                nursery.start_soon(self._events, wire, events_out)
                await self._ship(spec)
                # the trace is written; send the last events of the step thread
                with trio.move_on_after(FINISH_DEADLINE_S / 2):
                    while self._crossing.unsent or events_out.statistics().current_buffer_used:
                        await trio.sleep(0.001)
                nursery.cancel_scope.cancel()
        finally:
            wire.close()

    async def _events(self, wire: TrioWire, events: trio.MemoryReceiveChannel[HostMessage]) -> None:
        async for message in events:
            wire.send(SUPERVISOR, encode(message))

    async def _commands(self, wire: TrioWire) -> None:
        while True:
            try:
                arrival = await wire.receive()
                if arrival.peer != SUPERVISOR:
                    raise ProtocolError(f"control: expected commands from {SUPERVISOR}, got one from {arrival.peer}")
                command = decode(arrival.header, for_host)
            except ProtocolError as error:
                left_out = self._refusals.one_more(time.monotonic())
                if left_out is not None:
                    self._crossing.report(Refused(with_left_out(str(error), left_out)))
                continue
            match command:
                case Explain():  # answered here, because the step thread may be stuck
                    describe = self._crossing.situation
                    situation = describe() if describe is not None else {}
                    wire.send(SUPERVISOR, encode(Situation(command.asked, situation)))
                case AskTime():
                    heard_ns = time.monotonic_ns()
                    wire.send(SUPERVISOR, encode(Time(command.sent_ns, heard_ns, time.monotonic_ns())))
                case _:
                    self._crossing.command(command)

    async def _lifeline_watch(self) -> None:
        await trio.lowlevel.wait_readable(self._lifeline)
        os._exit(3)  # readable means closed, since nothing is ever written: no supervisor waits for an orderly end

    async def _heartbeats(self, wire: TrioWire) -> None:
        crossing = self._crossing
        while True:
            since = crossing.stepping_since_ns
            stepping_s = (time.monotonic_ns() - since) / 1e9 if since else 0.0
            wire.send(SUPERVISOR, encode(Heartbeat(crossing.steps, stepping_s, crossing.queued, crossing.counters)))
            await trio.sleep(self._spec.supervision.heartbeat_interval_s)

    async def _ship(self, spec: HostSpec) -> None:
        """Write trace records until the step thread has ended and the ring is empty."""
        if not spec.trace:
            while not self._ending.is_set():
                await trio.sleep(0.01)
            return
        with TraceFile(
            Path(spec.run_dir), spec.label, spec.file, sample=spec.trace_sample, most_bytes=spec.trace_bytes
        ) as file:
            while True:
                ending = self._ending.is_set()
                shipped = file.write(self._crossing.ring.take(SHIP_AT_ONCE), self._crossing.ring.dropped)
                if not shipped:
                    if ending:
                        return
                    await trio.sleep(0.005 if self._crossing.steps == 0 else SHIP_INTERVAL_S)
                else:
                    await trio.lowlevel.checkpoint()
