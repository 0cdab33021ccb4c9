"""Send an answer as server-sent events, and keep it for a client that lost its connection.

A stream has a number for each event and keeps what it has sent. A client that leaves frees its caches at once. If it comes
back in time, with the request's id and the number of the last event that it has, it gets the events after that one, and then
the tokens that follow: a new generation goes on after the tokens that were made.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from ..bridge.bridge import Asked, Bridge, Ended, Reply
from ..bridge.problems import STOPPING, problem_of, unknown
from ..bridge.stream_log import (
    MOST_BODY_BYTES,
    MOST_KEPT,
    PIECES_PER_LINE,
    Complete,
    Endpoint,
    Grew,
    Opened,
    Origin,
    Piece,
    Record,
    StreamLog,
    piece_of,
)
from ..endpoints.answers import Answers

Left = tuple[Record, StreamLog]
"""A stream of an earlier server, and the log that has it now."""
SILENCE_S = 0.9
"""After this time without an event, a comment shows the client and its proxies that the connection lives."""
COMMENT = b": working\n"
"""No empty line ends it: with numbered events, clients such as OpenAI's own would take that for an event without data."""
LAST = b"data: [DONE]\n\n"
BEGIN: Message = {
    "type": "http.response.start", "status": 200, "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
    ],
}  # fmt: skip
END: Message = {"type": "http.response.body", "body": b"", "more_body": False}


class Stream:
    """Hold one answer that is sent as events."""

    def __init__(self, bridge: Bridge, asked: Mapping[int, Asked], maker: Answers, origin: Origin) -> None:
        self.origin = origin
        self.left_s = 0.0
        """Time on the monotonic clock when its client left; 0: it is there."""
        self._bridge = bridge
        self._asked = dict(asked)
        self._maker = maker
        self._sent: list[bytes] = []
        self._made: dict[int, list[int]] = {index: [] for index in asked}
        self._done = False
        self._reply: Reply | None = None
        self._farewell = b""
        """The last event if the server stops. It has no number: the next server sends the rest instead."""
        self._reading = asyncio.Lock()
        self._newest: object = None
        """The connection that has come last. It replaces those before it."""
        self._writer: asyncio.Future[None] | None = None
        self._log: StreamLog | None = None
        self._fresh: list[Piece] = []
        """These pieces came and are not in the log yet."""

    def write_down(self, endpoint: Endpoint, body: bytes) -> None:
        """Write the request, and then the answer as it grows, into the run's log, if it has one."""
        log = self._bridge.log
        if log is not None and len(body) <= MOST_BODY_BYTES and log.add(Opened(self.origin, endpoint, body.decode())):
            self._log = log

    def take_up(self, record: Record) -> None:
        """Take what an earlier server has written down of the stream. The log of this run has it already."""
        self._keep(self._maker.begin())
        try:
            for piece in record.pieces():
                self._take(piece.index, piece.event)
        except Exception as error:  # the answer ended with this error before, too
            self._over(problem_of(error).body)
        if record.complete is not None and not self._done:
            self._over(record.complete.error)
        self._log = self._bridge.log
        self.left_s = time.monotonic()

    def forget(self) -> None:
        """Drop the stream from the log: nobody may ask for it any more."""
        if self._bridge.log is not None:
            self._bridge.log.forget(self.origin.request_id)
        self._log = None

    def start(self) -> None:
        """Ask for the answers, or for what is missing of them."""
        missing = {index: replace(each, answered=tuple(self._made[index])) for index, each in self._asked.items()}
        self._reply = Reply(self._bridge, missing)
        if not self._sent:
            self._keep(self._maker.begin())

    async def accepted(self) -> None:
        """Wait until the request has begun, or waits for its turn: a request that is refused gets a status of its own.

        Raises:
            Problem: it was refused.
        """
        assert self._reply is not None
        try:
            await self._reply.accepted()
        except Exception as error:
            self.leave()
            raise problem_of(error) from error

    def _take(self, index: int, event: Any) -> None:
        if isinstance(event, Ended):
            del self._asked[index]
        else:
            self._made[index].append(event.id)
        if self._log is not None:
            self._fresh.append(piece_of(index, event))
        self._keep(self._maker.add(index, event))

    def _over(self, error: dict[str, Any] | None) -> None:
        self._keep(self._maker.end() if error is None else self._maker.error(error))
        self._done = True

    def _keep(self, events: list[Any]) -> None:
        for event in events:
            self._sent.append(b"id: %d\n%b" % (len(self._sent), self._event(event)))

    def _event(self, event: Any) -> bytes:
        name = b"event: %b\n" % event["type"].encode() if self._maker.named else b""
        return b"%bdata: %b\n\n" % (name, msgspec.json.encode(event))

    async def _grow(self) -> bool:
        """Wait for more, and take all that is there. Return whether the answer is complete."""
        assert self._reply is not None
        error = None
        try:
            self._take(*await anext(self._reply))
            while self._reply.pending:
                self._take(*await anext(self._reply))
        except StopAsyncIteration:
            self._over(None)
        except Exception as failed:
            error = problem_of(failed).body
            if error["error"]["code"] == STOPPING and self._log is not None:
                self._farewell = b"".join(map(self._event, self._maker.error(error)))
            else:
                self._over(error)
        self._write_fresh(error)
        self._done = self._done or bool(self._farewell)
        return self._done

    def _write_fresh(self, error: dict[str, Any] | None) -> None:
        """Write down what came, before it is sent. If that fails, nothing more of this stream is: its log has no gaps."""
        fresh, self._fresh = self._fresh, []
        name = self.origin.request_id
        for at in range(0, len(fresh), PIECES_PER_LINE):
            if self._log is not None and not self._log.add(Grew(name, fresh[at : at + PIECES_PER_LINE])):
                self._log = None
        if self._log is not None and self._done:
            self._log.add(Complete(name, error))

    async def send(self, receive: Receive, send: Send, after: int) -> None:
        """Send the events after number `after`, until the answer is complete, or the client leaves or comes back anew.

        Raises:
            Problem: there is no room to go on now. Nothing was sent.
        """
        me = self._newest = object()
        if self._writer is not None:  # the client came back before its old connection was known to be lost
            self._writer.cancel()
        async with self._reading:
            if self._newest is not me:
                await send(BEGIN)
                await send(END)
                return
            if not self._done and self._reply is None:
                self.start()
                await self.accepted()
            self.left_s = 0.0
            await send(BEGIN)
            self._writer = writer = asyncio.ensure_future(self._write(send, after))
            watch = asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait([writer, watch], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (writer, watch):
                    task.cancel()
                await asyncio.wait([writer, watch])
                self._writer = None
                self.leave()
            if not writer.cancelled():
                writer.result()  # an error of ours must not look like the end of a stream
            elif watch.cancelled():  # the client has another connection, and this one is open still
                await send(END)

    def leave(self) -> None:
        """Free the caches: no client reads the answer now."""
        self.left_s = time.monotonic()
        if self._reply is not None:
            self._reply.close()
            self._reply = None

    async def _write(self, send: Send, after: int) -> None:
        at, loop = max(0, after + 1), asyncio.get_running_loop()
        spoke_s = loop.time()

        async def speak() -> None:
            while True:
                await asyncio.sleep(max(0.0, spoke_s + SILENCE_S - loop.time()))
                if loop.time() >= spoke_s + SILENCE_S:
                    await write(COMMENT)

        async def write(data: bytes) -> None:
            nonlocal spoke_s
            spoke_s = loop.time()
            await send({"type": "http.response.body", "body": data, "more_body": True})

        speaking = asyncio.ensure_future(speak())
        try:
            while True:
                if at < len(self._sent):
                    data, at = b"".join(self._sent[at:]), len(self._sent)
                    await write(data)
                elif self._done:
                    break
                else:
                    await self._grow()
        finally:
            speaking.cancel()
        last = b"" if self._maker.named or self._farewell else LAST
        await send({**END, "body": self._farewell + last})


async def collected(reply: Reply, maker: Answers, receive: Receive) -> bool:
    """Give all events of a reply to a maker. Return false, and free the caches, if the client leaves before the end.

    Raises:
        Problem: the request was refused, or an answer failed.
    """

    async def collect() -> None:
        async for index, event in reply:
            maker.add(index, event)

    collecting, watch = asyncio.ensure_future(collect()), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([collecting, watch], return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return False
        collecting.result()
    except Exception as error:
        raise problem_of(error) from error
    finally:
        reply.close()
        for task in (collecting, watch):
            task.cancel()
    return True


async def _gone(receive: Receive) -> None:
    """Return once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Kept:
    """Hold the streams whose clients may come back, for `window_s` after they left, or after this server began.

    `left` are those of an earlier server.
    """

    def __init__(self, window_s: float, left: Mapping[str, Left]) -> None:
        self._window_s = window_s
        self._streams: OrderedDict[str, Stream] = OrderedDict()
        self._left = dict(left)
        self._began_s = time.monotonic()

    def add(self, stream: Stream) -> None:
        """Keep a stream."""
        name = stream.origin.request_id
        self._left.pop(name, None)
        self.forget()
        if self._window_s <= 0:
            return
        away = [each for each in self._streams.values() if each.left_s]
        if len(away) >= MOST_KEPT:  # the oldest of the key that has the most makes room
            most, _ = Counter(each.origin.owner for each in away).most_common(1)[0]
            self._drop(next(each for each in away if each.origin.owner == most))
        self._streams[name] = stream

    def _drop(self, stream: Stream) -> None:
        del self._streams[stream.origin.request_id]
        stream.forget()

    def forget(self) -> None:
        """Drop the streams whose clients left too long ago."""
        now_s = time.monotonic()
        if now_s - self._began_s > self._window_s:
            for name, (_, log) in self._left.items():
                log.forget(name)
            self._left.clear()
        for stream in list(self._streams.values()):
            if stream.left_s and now_s - stream.left_s > self._window_s:
                self._drop(stream)

    def left(self, request_id: str, owner: str) -> Record | None:
        """Return what an earlier server has left of a stream, to the key that asked for it."""
        self.forget()
        record, _ = self._left.get(request_id, (None, None))
        return record if record is not None and record.opened.origin.owner == owner else None

    def find(self, request_id: str, owner: str) -> Stream:
        """Return a stream to the key that asked for it.

        Raises:
            Problem: there is none, or it is another key's, which is not told.
        """
        self.forget()
        stream = self._streams.get(request_id)
        if stream is None or stream.origin.owner != owner:
            raise unknown(f"no stream {request_id!r:.60} is kept; ask again")
        return stream


class Events:
    """Be an answer of HTTP that sends a stream. Starlette calls it."""

    def __init__(self, stream: Stream, after: int = -1) -> None:
        self._stream, self._after = stream, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._stream.send(receive, send, self._after)
