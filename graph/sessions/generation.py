"""What a client holds of its session: a stream of tokens, and what it came to."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from ranvier.actors.component.session import SessionInfo
from ranvier.actors.errors import Expired

from .gateway import Gateway
from .stream import Delivered, Stream
from .text_stream import TextStream

Wakes = dict[Stream, trio.Event]
"""The clients that wait, by their stream; the gateway's driver sets an event when there is something for them."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `text` is what it completes (often a word, "" in the middle of a letter or a stop string)."""

    id: int
    position: int
    text: str
    logits: memoryview[float] | None = None
    """float32, one for each token of the vocabulary, if asked for."""
    durable: bool = True
    """Whether it is in the run's journal, where there is one. False on a full disk: then it would not outlive the process."""


@dataclass(slots=True)
class Result:
    """What a generation has come to so far. Times are seconds from the request to the first and the last token."""

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: tokens after the first, over the time after the first."""
        spent = self.last_token_s - self.first_token_s
        return (len(self.token_ids) - 1) / spent if spent > 0 and len(self.token_ids) > 1 else 0.0


class Source(Protocol):
    """Where a generation gets its tokens from."""

    async def event(self) -> Delivered | str:
        """What happens next; a string is the end and its reason. Raises the error that it ended with."""

    def close(self) -> None:
        """Nobody wants more. Idempotent."""


class Over:
    """A request that had ended before its run was lost, for whoever comes back for its tokens."""

    def __init__(self, end: str | Exception) -> None:
        self._end = end

    async def event(self) -> str:
        await trio.lowlevel.checkpoint()
        if isinstance(self._end, Exception):
            raise self._end
        return self._end

    def close(self) -> None:
        """There is nothing to give up."""


class Later:
    """A request that waits for room: it has a source once there is some."""

    def __init__(self) -> None:
        self._source: Source | None = None
        self._there = trio.Event()
        self.closed = False

    def begin(self, source: Source) -> None:
        """There is room now, or there never will be."""
        self._source = source
        if self.closed:
            source.close()
        self._there.set()

    async def event(self) -> Delivered | str:
        """Wait for room, and then for what happens next; a string is the end and its reason. Raises the error that it ended
        with."""
        await self._there.wait()
        assert self._source is not None
        return await self._source.event()

    def close(self) -> None:
        """Nobody wants more. Idempotent."""
        self.closed = True
        if self._source is not None:
            self._source.close()


class Client:
    """One session at the gateway. Closed early, it is cancelled and its caches are freed everywhere."""

    def __init__(self, gateway: Gateway, stream: Stream, flush: Callable[[], None], wakes: Wakes) -> None:
        self._gateway = gateway
        self._flush = flush
        self._wakes = wakes
        self.stream = stream
        flush()

    async def event(self) -> Delivered | str:
        """What happens next; a string is the end and its reason.

        Raises:
            ActorFailed: the session was lost.
            Expired: its deadline has passed.
        """
        stream = self.stream
        while not stream.events:
            wake = self._wakes[stream] = trio.Event()
            await wake.wait()
        event = stream.events.popleft()
        if not isinstance(event, Delivered):
            self._wakes.pop(stream, None)
        if isinstance(event, Exception):
            raise event
        return event

    def close(self) -> None:
        """Give the session up if it is not over. Idempotent."""
        self._wakes.pop(self.stream, None)
        if not self.stream.over:
            self._gateway.cancel(self.stream)
            self._flush()


class Generation:
    """The tokens of one request, as an asynchronous iterator. `result` grows with it and is complete at its end.

    One that is not read to its end is cancelled by `close`, or when it is let go of. It begins once its prompt is known as
    token ids (`begin`), or is refused.
    """

    def __init__(self, text: TextStream) -> None:
        self._client: Source | None = None
        self._refusal: Exception | None = None
        self._begun: trio.Event | None = None
        self._text = text
        self._began = time.monotonic()
        self.closed = False
        self.result = Result(0)
        self.deadline_ns = 0
        """When it ends with `Expired` though it has not begun: the prompts before it may take their time. 0: never."""
        self.request_id = ""
        """What the request is called in the run's journal, if there is one: with it, it can be resumed after a crash."""
        self.is_durable: Callable[[], bool] = lambda: True
        self._again: deque[Token] = deque()

    def begin(self, client: Source, info: SessionInfo, prompt_tokens: int) -> None:
        """The request is a session of the gateway now, or one that is over already."""
        self._client, self._info = client, info
        self.result.prompt_tokens = prompt_tokens
        self._wake()

    def recorded(self, first: int, tokens: Sequence[int], after: int | None) -> None:
        """Take tokens that a journal has, the first of them at position `first`: those after the position `after` are given
        again, those up to it only count."""
        for position, token in enumerate(tokens, first):
            made = self._token(Delivered(position, token))
            if after is None or position > after:
                self._again.append(made)
            if self._text.stopped:  # the gateway, which knows no stop strings, was ahead of the client
                return

    def refuse(self, why: Exception) -> None:
        """The request will not begin: its reader gets the reason."""
        self._refusal = self._refusal or why
        self._wake()

    def _wake(self) -> None:
        if self._begun is not None:
            self._begun.set()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        if self._again:
            await trio.lowlevel.checkpoint()
            return self._again.popleft()
        if self.result.finish_reason:
            raise StopAsyncIteration
        while self._client is None:
            if self._refusal is not None:
                raise self._refusal
            if self.closed:
                raise StopAsyncIteration
            self._begun = trio.Event()
            left_s = (self.deadline_ns - time.monotonic_ns()) / 1e9 if self.deadline_ns else math.inf
            with trio.move_on_after(max(0.0, left_s)):
                await self._begun.wait()
                continue
            self.closed = True
            self.refuse(Expired("the deadline has passed before the prompt was known as token ids"))
        event = await self._client.event()
        if isinstance(event, str):
            self.result.finish_reason = event
            raise StopAsyncIteration
        return self._token(event)

    def _token(self, event: Delivered) -> Token:
        result, text = self.result, self._text
        result.token_ids.append(event.token)
        result.last_token_s = time.monotonic() - self._began
        if len(result.token_ids) == 1:
            result.first_token_s = result.last_token_s
        piece = text.add(event.token)
        if self._info.finished(len(result.token_ids), event.token):
            piece += text.rest()
        result.text = text.text
        if text.stopped:
            result.finish_reason = "stop"
            self.close()
        logits = memoryview(event.logits).cast("f") if event.logits is not None else None
        return Token(event.token, event.position, piece, logits, self.is_durable())

    def close(self) -> None:
        """End the session now, or do not begin it. Idempotent."""
        self.closed = True
        if self._client is not None:
            self._client.close()
        else:
            self._wake()

    def __del__(self) -> None:
        # Needs no event loop: the hosts are told by a message. A run that is over has no stream left to close.
        self.close()
