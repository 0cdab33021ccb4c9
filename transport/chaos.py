"""A proxy for tcp that does to a connection what networks do: slow, slice, cut, reset, swallow; flip bits, repeat and
reorder messages. It stands between a sender and the inbox that it connects to.

What it does to messages it does to ZMTP's frames (https://rfc.zeromq.org/spec/23/), so there must be no encryption; flipped
bits are those of tensors, as a network's own checksums let through what was changed before they were made.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from .endpoint import parse

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4
READ_BYTES = 1 << 16
THROTTLED_PIECES = 20
"""A link with a limit passes on so many pieces a second."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong on a link. Times are seconds from the start of the proxy; shares are of messages, 0 to 1.

    `latency_s` and up to `jitter_s` more pass before bytes go on, in order, no more than `bytes_per_s` (0: any).
    Writes are cut into pieces of `slice_bytes`. From `cut_after_s` on, for `cut_for_s`, there is no connection. Each
    connection is reset once `reset_after_bytes` have passed, most likely in the middle of a frame. From
    `hole_after_s` on, for `hole_for_s`, all that is sent vanishes, and the connections of that time stay dead for
    ever without being closed.
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


class ChaosProxy:
    """One link with `faults`, to the inbox at `target`. `counters` says what was done; `address` is where to connect to.

    Raises:
        OSError: there is no port for it.
    """

    def __init__(self, target: str, faults: Faults) -> None:
        self.counters: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._target = parse(target)
        self._faults = faults
        self._chance = random.Random(faults.seed)
        self._began_s = time.monotonic()
        self._connections: set[_Connection] = set()
        self._scope = trio.CancelScope()

    def stop(self) -> None:
        """Let go of everything."""
        self._scope.cancel()

    async def run(self) -> None:
        """Until `stop`, or cancelled."""
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
        """End all its connections, whatever is on its way."""
        for connection in list(self._connections):
            self.counters["cut"] += 1
            connection.end()

    async def _swallow(self) -> None:
        await trio.sleep(self._faults.hole_after_s)
        for connection in list(self._connections):
            self.counters["swallowed"] += 1
            connection.dead = True

    async def _serve(self, near: trio.SocketStream) -> None:
        faults = self._faults
        with contextlib.ExitStack() as stack:
            stack.callback(near.socket.close)
            if faults.cut_for_s and self._within(faults.cut_after_s, faults.cut_for_s):
                self.counters["refused"] += 1
                return
            try:
                far = await trio.open_tcp_stream(self._target.place, self._target.port)
            except OSError:  # nobody listens there (yet, or any more); ZeroMQ tries again
                return
            stack.callback(far.socket.close)
            connection = _Connection(near, far, self._chance, self.counters, faults)
            connection.dead = bool(faults.hole_for_s) and self._within(faults.hole_after_s, faults.hole_for_s)
            self._connections.add(connection)
            stack.callback(self._connections.discard, connection)
            await connection.run()


class _Connection:
    """One tcp connection through the proxy."""

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
                nursery.start_soon(
                    self._pump, self._near, self._far, _Messages(self._chance, self._counters, self._faults)
                )
                nursery.start_soon(self._pump, self._far, self._near, None)
                await trio.sleep_forever()

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, messages: _Messages | None) -> None:
        later_in, later = trio.open_memory_channel[tuple[float, bytes]](1 << 16)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, later, sink)
            while data := await self._received(source):
                if self.dead:
                    continue
                if messages is not None:
                    data = messages.changed(data)
                faults = self._faults
                delay_s = faults.latency_s + faults.jitter_s * self._chance.random()
                self._counters["delayed"] += delay_s > 0
                await later_in.send((trio.current_time() + delay_s, data))
            self.end()  # one side has closed

    async def _received(self, source: trio.SocketStream) -> bytes:
        try:
            return bytes(await source.receive_some(READ_BYTES))
        except trio.BrokenResourceError:  # reset by its end
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
            for stream in (self._near, self._far):  # no farewell: what is on its way is lost
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.end()


class _Messages:
    """The messages of one direction, as their bytes come: passed on, and some of them changed."""

    def __init__(self, chance: random.Random, counters: Counter[str], faults: Faults) -> None:
        self._chance, self._counters, self._faults = chance, counters, faults
        self._plain = not (faults.flip or faults.repeat or faults.reorder)
        self._pending = bytearray()
        self._greeting_left = GREETING_BYTES
        self._parts: list[bytearray] = []
        self._held = b""

    def changed(self, data: bytes) -> bytes:
        """What to send in place of the next bytes."""
        if self._plain:
            return data
        self._pending += data
        return b"".join(self._passed_on())

    def _passed_on(self) -> Iterator[bytes]:
        if (
            self._greeting_left
        ):  # in pieces, as it comes: each end waits for the other's version before it says the rest
            greeting = bytes(self._pending[: self._greeting_left])
            self._greeting_left -= len(greeting)
            del self._pending[: len(greeting)]
            yield greeting
        while (size := self._frame_bytes()) and len(self._pending) >= size:
            frame = self._pending[:size]
            del self._pending[:size]
            if frame[0] & COMMAND:
                yield bytes(frame)
                continue
            self._parts.append(frame)
            if not frame[0] & MORE:
                yield from self._message()
                self._parts = []

    def _frame_bytes(self) -> int:
        """Of the next frame with its head; 0: not known yet."""
        if len(self._pending) < 9:
            return 2 + self._pending[1] if len(self._pending) > 1 and not self._pending[0] & LONG else 0
        if self._pending[0] & LONG:
            return 9 + int.from_bytes(self._pending[1:9], "big")
        return 2 + self._pending[1]

    def _happens(self, what: str, share: float) -> bool:
        if not share or self._chance.random() >= share:
            return False
        self._counters[what] += 1
        return True

    def _message(self) -> Iterator[bytes]:
        faults = self._faults
        head = 9 if self._parts[-1][0] & LONG else 2
        if len(self._parts) > 1 and len(self._parts[-1]) > head and self._happens("flipped", faults.flip):
            at = self._chance.randrange(head, len(self._parts[-1]))
            self._parts[-1][at] ^= 1 << self._chance.randrange(8)
        whole = b"".join(self._parts)
        if self._held:
            yield whole + self._held
            self._held = b""
        elif self._happens("reordered", faults.reorder):
            self._held = whole
        elif self._happens("repeated", faults.repeat):
            yield whole + whole
        else:
            yield whole
