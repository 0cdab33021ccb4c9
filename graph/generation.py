"""What a client holds of its session: a stream of tokens, and what it came to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from ranvier.actors.session import SessionInfo

from .gateway import Gateway
from .stream import Delivered, Stream, Tensors
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


class Client:
    """One session at the gateway. Closed early, it is cancelled and its caches are freed everywhere."""

    def __init__(
        self,
        gateway: Gateway,
        info: SessionInfo,
        inputs: Tensors,
        flush: Callable[[], None],
        wakes: Wakes,
        deadline_s: float | None = None,
        caller: str = "",
    ) -> None:
        self._gateway = gateway
        self._flush = flush
        self._wakes = wakes
        deadline_ns = time.monotonic_ns() + int(deadline_s * 1e9) if deadline_s is not None else 0
        self.stream = gateway.submit(info, inputs, deadline_ns, caller)
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

    One that is not read to its end is cancelled by `close`, or when it is let go of.
    """

    def __init__(self, client: Client, text: TextStream, prompt_tokens: int) -> None:
        self._client = client
        self._text = text
        self._info = client.stream.info
        self._began = time.monotonic()
        self.result = Result(prompt_tokens)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        if self.result.finish_reason:
            raise StopAsyncIteration
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
        return Token(event.token, event.position, piece, logits)

    def close(self) -> None:
        """End the session now."""
        self._client.close()

    def __del__(self) -> None:
        # Needs no event loop: the hosts are told by a message. A run that is over has no stream left to close.
        if hasattr(self, "_client"):
            self.close()
