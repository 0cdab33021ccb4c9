"""Imitate faults of networks with tcp proxies between a sender and the inbox that it connects to.

`ChaosProxy` sees the bytes of a connection, which are encrypted. It can delay, throttle, slice, cut, reset or swallow them.
`MessageProxy`, behind it, sees messages. It can repeat and reorder them, and flip bits of their tensors. A network's own
checksums do not detect bits that changed before the checksums were computed.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import trio

from ..format.errors import ProtocolError
from ..format.host_id import host_id
from ..links.wire import Arrival
from . import curve
from .endpoint import parse
from .trio_wire import TrioWire
from .zeromq import ZeroWire

READ_BYTES = 1 << 16
THROTTLED_PIECES = 20
"""Pieces per second that a link with a limited rate passes on."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Describe what goes wrong on a link.

    Bytes pass in order, after `latency_s` and up to `jitter_s` more, at `bytes_per_s` at most (0: no limit). Writes are cut
    into pieces of `slice_bytes`. From `cut_after_s` on, for `cut_for_s`, there is no connection. Each connection is reset once
    `reset_after_bytes` have passed, most likely in the middle of a frame. From `hole_after_s` on, for `hole_for_s`, all sent
    bytes vanish, and the connections of that time stay dead forever without being closed. `cut_after_s` and `hole_after_s`
    count from the start of the proxy. `flip`, `repeat` and `reorder` are shares of messages, 0 to 1.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: int = 0
    slice_bytes: int = 0
    cut_after_s: float = 0.0
    cut_for_s: float = 0.0
    reset_after_bytes: int = 0
    hole_after_s: float = 0.0
    hole_for_s: float = 0.0
    flip: float = 0.0
    repeat: float = 0.0
    reorder: float = 0.0
    seed: int = 0

    @property
    def of_messages(self) -> bool:
        """Return whether single messages are changed, which needs the keys of both ends."""
        return bool(self.flip or self.repeat or self.reorder)


class ChaosProxy:
    """Pass connections on to the inbox at `target`, with `faults`. Senders connect to `address`.

    `counters` counts what the proxy did.

    Raises:
        OSError: no port is free.
    """

    def __init__(self, target: str, faults: Faults, counters: Counter[str]) -> None:
        self.counters = counters
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._target = parse(target)
        self._faults = faults
        self._chance = random.Random(faults.seed)
        self._began_s = time.monotonic()
        self._cut_until_s = 0.0
        self._connections: set[_Connection] = set()
        self._scope = trio.CancelScope()

    def stop(self) -> None:
        """Stop `run`, which ends all connections."""
        self._scope.cancel()

    async def run(self) -> None:
        """Serve connections until `stop` or a cancellation."""
        self._listener.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener))
        with self._scope:
            await self._run(listener)

    async def _run(self, listener: trio.SocketListener) -> None:
        async with trio.open_nursery() as nursery, listener:
            if self._faults.cut_for_s:
                nursery.start_soon(self._cut)
            if self._faults.hole_for_s:
                nursery.start_soon(self._swallow)
            while True:
                stream = await listener.accept()
                nursery.start_soon(self._serve, stream)

    def _within(self, after_s: float, for_s: float) -> bool:
        return 0 <= time.monotonic() - self._began_s - after_s < for_s

    async def _cut(self) -> None:
        await trio.sleep(self._faults.cut_after_s)
        self.cut()

    def cut(self) -> None:
        """End all connections, and lose the bytes that are on their way."""
        for connection in list(self._connections):
            self.counters["cut"] += 1
            connection.end()

    def cut_for(self, seconds: float) -> None:
        """End all connections now, and refuse new ones for some time."""
        self._cut_until_s = time.monotonic() + seconds
        self.cut()

    async def _swallow(self) -> None:
        await trio.sleep(self._faults.hole_after_s)
        for connection in list(self._connections):
            self.counters["swallowed"] += 1
            connection.dead = True

    async def _serve(self, near: trio.SocketStream) -> None:
        faults = self._faults
        with contextlib.ExitStack() as stack:
            stack.callback(near.socket.close)
            cut = faults.cut_for_s and self._within(faults.cut_after_s, faults.cut_for_s)
            if cut or time.monotonic() < self._cut_until_s:
                self.counters["refused"] += 1
                return
            try:
                far = await trio.open_tcp_stream(self._target.location, self._target.port)
            except OSError:  # nobody listens there (yet, or any more); ZeroMQ tries again
                return
            stack.callback(far.socket.close)
            connection = _Connection(near, far, self._chance, self.counters, faults)
            connection.dead = bool(faults.hole_for_s) and self._within(faults.hole_after_s, faults.hole_for_s)
            self._connections.add(connection)
            stack.callback(self._connections.discard, connection)
            await connection.run()


class _Connection:
    """Pass on one tcp connection through the proxy."""

    def __init__(
        self,
        near: trio.SocketStream,
        far: trio.SocketStream,
        chance: random.Random,
        counters: Counter[str],
        faults: Faults,
    ) -> None:
        self.dead = False
        self._near, self._far = near, far
        self._chance, self._counters, self._faults = chance, counters, faults
        self._scope = trio.CancelScope()
        self._passed = 0

    def end(self) -> None:
        self._scope.cancel()

    async def run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, self._near, self._far)
                nursery.start_soon(self._pump, self._far, self._near)
                await trio.sleep_forever()

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        later_in, later = trio.open_memory_channel[tuple[float, bytes]](1 << 16)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, later, sink)
            while data := await self._received(source):
                if self.dead:
                    continue
                faults = self._faults
                delay_s = faults.latency_s + faults.jitter_s * self._chance.random()
                self._counters["delayed"] += delay_s > 0
                await later_in.send((trio.current_time() + delay_s, data))
            self.end()  # one side has closed

    async def _received(self, source: trio.SocketStream) -> bytes:
        try:
            return bytes(await source.receive_some(READ_BYTES))
        except trio.BrokenResourceError:  # reset by the other side
            return b""

    async def _deliver(self, later: trio.MemoryReceiveChannel[tuple[float, bytes]], sink: trio.SocketStream) -> None:
        step = self._faults.slice_bytes or self._faults.bytes_per_s // THROTTLED_PIECES or READ_BYTES
        async for due_s, data in later:
            await trio.sleep_until(due_s)
            self._counters["sliced"] += len(data) > step
            for start in range(0, len(data), step):
                if self.dead:
                    return
                try:
                    await sink.send_all(data[start : start + step])
                except trio.BrokenResourceError:
                    self.end()
                    return
                self._count(min(step, len(data) - start))
                if self._faults.bytes_per_s:
                    self._counters["throttled"] += 1
                    await trio.sleep(min(step, len(data) - start) / self._faults.bytes_per_s)

    def _count(self, nbytes: int) -> None:
        every, before = self._faults.reset_after_bytes, self._passed
        self._passed += nbytes
        if every and self._passed >= every > before:
            self._counters["reset"] += 1
            for stream in (self._near, self._far):  # no orderly close: bytes on their way are lost
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.end()


class MessageProxy:
    """Flip bits of the messages from `source` to `target`, and repeat and reorder messages. Senders connect to `address`.

    Connections are encrypted, so the proxy holds the keys of both ends. It acts as the target towards the source, and as the
    source towards the target.

    Args:
        source, target: identities.
        address: where the target listens.
        faults: only `flip`, `repeat`, `reorder` and `seed` are used here.
        keys: the folder of the run's keys.
        counters: counts what the proxy did.

    Raises:
        AddressError, ResourceError: no port or no descriptor is free.
    """

    def __init__(
        self, source: str, target: str, address: str, faults: Faults, keys: Path, counters: Counter[str]
    ) -> None:
        self._target, self._faults, self._counters = target, faults, counters
        self._chance = random.Random(faults.seed)
        self._held: Arrival | None = None
        self._scope = trio.CancelScope()
        self._near, self._far = (
            ZeroWire(me, "tcp://127.0.0.1:0", max_frame_bytes=1 << 40, keys=curve.read(keys, host_id(me).actor))
            for me in (target, source)
        )
        self._far.connect(target, address)
        self.address = self._near.address

    def stop(self) -> None:
        """Stop `run`, which closes both wires."""
        self._scope.cancel()

    async def run(self) -> None:
        """Pass messages on until `stop` or a cancellation."""
        near = TrioWire(self._near)
        try:
            with self._scope:
                while True:
                    try:
                        self._pass_on(await near.receive())
                    except ProtocolError:  # frames that do not form a message are dropped
                        self._counters["refused"] += 1
        finally:
            near.close()
            self._far.close()

    def _pass_on(self, arrival: Arrival) -> None:
        faults = self._faults
        if arrival.buffers and len(arrival.buffers[-1]) and self._happens("flipped", faults.flip):
            *others, last = arrival.buffers
            changed = bytearray(last)
            changed[self._chance.randrange(len(changed))] ^= 1 << self._chance.randrange(8)
            arrival = Arrival(arrival.peer, arrival.header, (*others, bytes(changed)))
        if self._held is not None:
            held, self._held = self._held, None
            self._send(arrival, held)
        elif self._happens("reordered", faults.reorder):
            self._held = arrival
        elif self._happens("repeated", faults.repeat):
            self._send(arrival, arrival)
        else:
            self._send(arrival)

    def _send(self, *arrivals: Arrival) -> None:
        for arrival in arrivals:
            self._far.send(self._target, bytes(arrival.header), [bytes(buffer) for buffer in arrival.buffers])

    def _happens(self, what: str, share: float) -> bool:
        if not share or self._chance.random() >= share:
            return False
        self._counters[what] += 1
        return True
