"""Give a client its session: a stream of tokens, and the result so far."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import trio

from ranvier.actors.component.inside import Read
from ranvier.actors.component.session import SessionInfo
from ranvier.actors.errors import Expired
from ranvier.transport.format.message import Buffer

from .gateway import Gateway
from .stream import Delivered, Stream
from .text_stream import TextStream

if TYPE_CHECKING:
    import torch

Wakes = dict[Stream, trio.Event]
"""Events of waiting clients, by stream.

The gateway's driver sets an event when the stream has something for its client.
"""


@dataclass(frozen=True, slots=True)
class Token:
    """Hold one generated token. `text` is the text that it completes.

    That is often a word, and "" in the middle of a character or of a possible stop string.
    """

    id: int
    position: int
    text: str
    logits: memoryview[float] | None = None
    """float32 logits, one for each token of the vocabulary, if requested."""
    logprob: float | None = None
    """The natural logarithm of the token's probability by the model, before penalties and temperature, if requested."""
    top_logprobs: Mapping[int, float] = field(default_factory=dict)
    """The same for the likeliest tokens by id, as many as requested, the likeliest first."""
    reads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Holds what the request reads inside the model, float32 by place, at the position before: the token was made from it."""
    durable: bool = True
    """True if the token is in the run's journal, or if there is no journal.

    False on a full disk: a crash would lose the token.
    """


@dataclass(slots=True)
class Result:
    """Hold the result of a generation so far. Times are seconds from the request to the first and the last token."""

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Return the speed of decoding: tokens after the first, divided by the time after the first."""
        spent = self.last_token_s - self.first_token_s
        return (len(self.token_ids) - 1) / spent if spent > 0 and len(self.token_ids) > 1 else 0.0


class Source(Protocol):
    """Provide the tokens of a generation."""

    async def event(self) -> Delivered | str:
        """Return the next event; a string is the reason of the end. Raise the error that ended the session, if any."""

    def close(self) -> None:
        """Stop: nobody wants more events. Idempotent."""


class Over:
    """Represent a request that had ended before its run was lost, for a client that comes back for its tokens."""

    def __init__(self, end: str | Exception) -> None:
        self._end = end

    async def event(self) -> str:
        await trio.lowlevel.checkpoint()
        if isinstance(self._end, Exception):
            raise self._end
        return self._end

    def close(self) -> None:
        """Do nothing: there is nothing to stop."""


class Later:
    """Represent a request that waits for room. It gets a source once there is room."""

    def __init__(self) -> None:
        self._source: Source | None = None
        self._there = trio.Event()
        self.closed = False

    def begin(self, source: Source) -> None:
        """Set the source: there is room now, or there never will be."""
        self._source = source
        if self.closed:
            source.close()
        self._there.set()

    async def event(self) -> Delivered | str:
        """Wait for room, then return the next event; a string is the reason of the end.

        Raise the error that ended the session, if any.
        """
        await self._there.wait()
        assert self._source is not None
        return await self._source.event()

    def close(self) -> None:
        """Stop: nobody wants more events. Idempotent."""
        self.closed = True
        if self._source is not None:
            self._source.close()


class Client:
    """Represent one session at the gateway. Closing it early cancels it and frees its caches everywhere."""

    def __init__(self, gateway: Gateway, stream: Stream, flush: Callable[[], None], wakes: Wakes) -> None:
        self._gateway = gateway
        self._flush = flush
        self._wakes = wakes
        self.stream = stream
        flush()

    async def event(self) -> Delivered | str:
        """Return the next event; a string is the reason of the end.

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
        """Cancel the session if it is not over. Idempotent."""
        self._wakes.pop(self.stream, None)
        if not self.stream.over:
            self._gateway.cancel(self.stream)
            self._flush()


class Generation:
    """Iterate over the tokens of one request, asynchronously. `result` grows with them and is complete at the end.

    A generation that is not read to its end is cancelled by `close`, or when it is garbage-collected. It begins once
    its prompt is tokenized (`begin`), or it is refused (`refuse`).
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
        """Time on the monotonic clock when the request ends with `Expired` even if it has not begun; 0: never.

        A request may wait long before it begins, since prompts are tokenized one after the other.
        """
        self.request_id = ""
        """Name of the request in the run's journal, if there is one.

        A client can resume it by this name after a crash.
        """
        self.is_durable: Callable[[], bool] = lambda: True
        self._again: deque[Token] = deque()

    def begin(self, client: Source, info: SessionInfo, prompt_tokens: int) -> None:
        """Set the source of tokens: the request is now a session of the gateway, or was over already."""
        self._client, self._info = client, info
        self.result.prompt_tokens = prompt_tokens
        self._wake()

    @property
    def session(self) -> int:
        """Return the number of the request's session, as traces have it; 0 if it has not begun."""
        return self._info.session if self._client is not None else 0

    @property
    def reads(self) -> Mapping[str, torch.Tensor]:
        """Return what the request has read inside the model so far, float32 [positions, W] by place."""
        stream = self._client.stream if isinstance(self._client, Client) else None
        if stream is None or stream.readings is None:
            return {}
        return stream.readings.tensors(max(0, min(stream.awaited - 1, stream.readings.known)))

    def recorded(self, first: int, tokens: Sequence[int], after: int | None) -> None:
        """Take the tokens of a journal; the first of them is at position `first`.

        Tokens after position `after` are delivered again (None: all). Tokens up to `after` only go into the result.
        """
        for position, token in enumerate(tokens, first):
            made = self._token(Delivered(position, token))
            if after is None or position > after:
                self._again.append(made)
            if self._text.stopped:  # the gateway ignores stop strings, so it was ahead of the client
                return

    def refuse(self, why: Exception) -> None:
        """Refuse the request: its reader gets `why` as an exception."""
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
            self.refuse(Expired("the deadline passed before the prompt was tokenized"))
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
        logprob, top = logprobs_of(event.logprobs) if event.logprobs is not None else (None, {})
        reads = _tensors(self._info.reads, event.reads) if event.reads else {}
        return Token(event.token, event.position, piece, logits, logprob, top, reads, self.is_durable())

    def close(self) -> None:
        """End the session now, or prevent its start. Idempotent."""
        self.closed = True
        if self._client is not None:
            self._client.close()
        else:
            self._wake()

    def __del__(self) -> None:
        # Needs no event loop: hosts are notified by a message. A run that is over has no stream left to close.
        self.close()


def _tensors(reads: Sequence[Read], values: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """Return what was read at one position, by place."""
    import torch

    shapes = {read.place.name: read.shape for read in reads}
    return {
        place: torch.frombuffer(bytearray(data), dtype=torch.float32).view(shapes[place])
        for place, data in values.items()
    }


def logprobs_of(data: Buffer) -> tuple[float, dict[int, float]]:
    """Return the log-probability of a token, and those of the likeliest ones by id, from what the head has sent."""
    pairs = memoryview(data).cast("B").cast("f")
    return pairs[1], {int(pairs[i]): pairs[i + 1] for i in range(2, len(pairs), 2) if pairs[i] >= 0}
