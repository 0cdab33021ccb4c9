"""Pass requests from the server's thread to a run's thread, and tokens back.

The server runs under asyncio, the run under trio, each in a thread of its own. A request goes to the run as a call, and
becomes a task there. Tokens of all requests go back through one queue. The first that is put into it wakes the server's thread,
and those that follow before it is awake travel with it: at 200 streams, one wake-up serves many tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import trio

from ranvier.actors.component.session import Sampling
from ranvier.actors.errors import Expired, Overloaded
from ranvier.transport.format.errors import LinkClosed, RanvierError

from ..run.request_checks import check_ids
from ..run.run import Run
from ..sessions.generation import Generation, Token
from ..sessions.text_codec import TextCodec
from .problems import Problem, busy, unavailable
from .turns import Turns

if TYPE_CHECKING:
    from .stream_log import StreamLog

T = TypeVar("T")
PATIENCE_S = 5.0
"""Time after which an actor that is lost makes the server unhealthy."""
MOST_KNOWN = 2048
"""Requests that the trace can be asked for."""
PACE_KEPT = 32
"""Requests whose durations say how long one that waits will have to wait."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Describe a generation. The prompt is token ids already."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()
    logprobs: int | None = None
    stop_tokens: Sequence[int] | None = None
    answered: Sequence[int] = ()
    """Tokens of the answer that an earlier generation has made; this one goes on after them."""
    grammar: Mapping[str, Any] | None = None
    traceparent: str | None = None
    key: str = ""
    """Whose request it is, for the turns of the keys."""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """Tell where a request is in the trace: the sessions that have worked on it, more than one if its client came back."""

    key: str
    first: int
    """Position of the answer's first token."""
    sessions: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ended:
    """Tell that an answer is complete, and why: "stop" or "length"."""

    reason: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """Tell that a request has begun, or waits for its turn."""


Event = Token | Accepted | Ended | BaseException


class Reply:
    """Hold the answers to one request while they grow, on the server's thread: one, or as many as `n` asks for.

    Iterate over what comes, with the number of its answer: `async for index, event in reply`. Close it if nobody wants the
    rest.
    """

    def __init__(self, bridge: Bridge, asked: Mapping[int, Asked]) -> None:
        self._bridge = bridge
        self._events: deque[tuple[int, Token | Ended | BaseException]] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._answers = {index: Answer(self, index, each) for index, each in asked.items()}
        self._not_accepted = set(asked)
        for answer in self._answers.values():
            bridge.begin(answer)

    def put(self, index: int, event: Event) -> None:
        """Add what came from the run."""
        self._not_accepted.discard(index)
        if not isinstance(event, Accepted):
            self._events.append((index, event))
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    @property
    def pending(self) -> bool:
        """Return whether the next event is there already."""
        return bool(self._events)

    def __aiter__(self) -> Reply:
        return self

    async def __anext__(self) -> tuple[int, Token | Ended]:
        if not self._answers:
            raise StopAsyncIteration
        while not self._events:
            await self._more()
        index, event = self._events.popleft()
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Ended):
            del self._answers[index]
        return index, event

    async def _more(self) -> None:
        self._wake = asyncio.get_running_loop().create_future()
        await self._wake

    async def accepted(self) -> None:
        """Wait until all answers have begun, or wait for their turns. Raise the error of one that is refused."""
        while self._not_accepted:
            await self._more()
        error = next((event for _, event in self._events if isinstance(event, BaseException)), None)
        if error is not None:
            raise error

    def close(self) -> None:
        """End the generations now and free their caches, as far as they are not over. Idempotent."""
        for answer in self._answers.values():
            self._bridge.close(answer)
        self._answers.clear()


class Answer:
    """Hold one generation of a reply. All but `reply`, `index` and `asked` belongs to the run's thread."""

    def __init__(self, reply: Reply, index: int, asked: Asked) -> None:
        self.reply, self.index, self.asked = reply, index, asked
        self.began_s = time.monotonic()
        self.closed = False
        self.scope = trio.CancelScope()
        self.turn = trio.Event()


@dataclass(slots=True)
class Counts:
    """Count what one model's requests came to, for /metrics."""

    answered: int = 0
    refused: int = 0
    left: int = 0
    failed: int = 0
    tokens: int = 0
    durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=PACE_KEPT))


class Bridge:
    """Connect the server's thread to one run. Create it on the run's thread, in a nursery that the run outlives."""

    def __init__(self, run: Run, nursery: trio.Nursery, queue: int, deadline_s: float | None = None) -> None:
        self.run = run
        self.counts = Counts()
        self.log: StreamLog | None = None
        """Streams are written down here, if they shall outlive the server."""
        self._nursery = nursery
        self._deadline_s = deadline_s
        self._token = trio.lowlevel.current_trio_token()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: deque[tuple[Answer, Event]] = deque()
        self._woken = False
        self._turns: Turns[Answer] = Turns(queue)
        self._open: set[Answer] = set()
        self._running = 0
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._stopped: BaseException | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the server's loop. Called on the server's thread, before the first request."""
        self._loop = loop

    # -- on the server's thread -------------------------------------------------------------------------------------

    def begin(self, answer: Answer) -> None:
        """Begin a generation of a reply."""
        if not self._soon(lambda: self._nursery.start_soon(self._serve, answer)):
            answer.reply.put(answer.index, LinkClosed("the run is over"))

    def close(self, answer: Answer) -> None:
        self._soon(lambda: self._close(answer))

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Await an async function in the run's thread, and return its result, or raise its error.

        If the caller is cancelled, so is the function.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        scope = trio.CancelScope()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not done.done():
                done.set_result(cast(T, result)) if error is None else done.set_exception(error)

        async def called() -> None:
            result, failed = None, None
            with scope:
                try:
                    result = await function()
                except Exception as error:
                    failed = error
            with contextlib.suppress(RuntimeError):  # the server's loop has ended
                loop.call_soon_threadsafe(settle, result, failed)

        if not self._soon(lambda: self._nursery.start_soon(called)):
            raise LinkClosed("the run is over")
        try:
            return await done
        except asyncio.CancelledError:
            self._soon(scope.cancel)
            raise

    def _soon(self, call: Callable[[], object]) -> bool:
        try:
            self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            return False
        return True

    @property
    def codec(self) -> TextCodec | None:
        """Return the model's tokenizer, if it has one."""
        graph = self.run.plan.graph
        return self.run.codec if graph.generates or graph.embeds else None

    @property
    def context(self) -> int:
        """Return how many tokens a request may have, its answer included."""
        graph = self.run.plan.graph
        if graph.generates or graph.checkpoint is None:
            return self.run.most_after(0)
        return graph.checkpoint.config.context

    @property
    def template(self) -> str:
        """Return the chat template that tools are given to; "" if there is none."""
        codec = self.codec
        return codec.templates.get("tool_use", codec.chat_template or "") if codec is not None else ""

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out.

        Raises:
            RequestError: the model has no tokenizer.
        """
        return self.run.codec.decode(tokens)

    def asked_by(self, request_id: str, key: str) -> Known | None:
        """Return where a request of this key is in the trace; None if it is not known any more, or another key's."""
        known = self._known.get(request_id)
        return known if known is not None and known.key == key else None

    async def lost(self) -> str:
        """Return what keeps the run from serving, in words; empty: nothing."""

        async def look() -> str:
            return self.run.lost_for(PATIENCE_S)

        try:
            return await self.call(look)
        except RanvierError as error:
            return str(error)

    async def tokens(self, prompt: str | Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Return the token ids of a prompt, with the options and the errors of `Run.tokens`."""
        return await asyncio.to_thread(self.run.tokens, prompt, **options)

    async def embedded(self, tokens: Sequence[int]) -> Any:
        """Return the vector of a text's tokens, from a graph that embeds (`Graph.embeds`).

        Raises:
            RequestError: a token is not in the vocabulary, or there are too many.
        """
        import torch

        graph = self.run.plan.graph
        check_ids(graph, tokens, 0)
        made = await self.call(lambda: self.run.call(token=torch.tensor(tokens)))
        return made["embedding"].float().numpy()

    # -- on the run's thread ----------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Return how many requests wait for room."""
        return len(self._turns)

    @property
    def open(self) -> int:
        """Return how many requests are open, those that wait included."""
        return len(self._open)

    def stop(self, why: BaseException) -> None:
        """End all open answers with an error, and all that follow."""
        self._stopped = why
        for answer in list(self._open):
            self._post(answer, why)
            self._close(answer)

    async def _serve(self, answer: Answer) -> None:
        """Begin a generation as soon as there is room, and pass its tokens on, until its client leaves."""
        if answer.closed:
            return
        self._open.add(answer)
        try:
            with answer.scope:
                if self._stopped is not None:
                    raise self._stopped
                if lost := self.run.lost_for(PATIENCE_S):
                    raise unavailable(lost, PATIENCE_S)
                generation = None
                with trio.move_on_after(self._left_s(answer)):
                    generation = await self._begun(answer)
                if generation is None:
                    raise Expired("the deadline passed before there was room for the request")
                self._post(answer, Accepted())
                self._note(answer.asked, generation)
                began = time.monotonic()
                try:
                    async for token in generation:
                        self.counts.tokens += 1
                        self._post(answer, token)
                finally:
                    generation.close()
                    self._running -= 1
                    self.counts.durations_s.append(time.monotonic() - began)
                self.counts.answered += 1
                self._post(answer, Ended(generation.result.finish_reason))
        except Exception as error:
            self.counts.failed += not isinstance(error, Problem)
            self._post(answer, error)
        finally:
            self._open.discard(answer)
            self._turns.drop(answer.asked.key, answer)
            self._next_turn()

    async def _begun(self, answer: Answer) -> Generation:
        """Return the generation once there is room for it. Nobody overtakes those who wait.

        Raises:
            Problem: too many requests wait already.
            Overloaded: there is no room although nothing runs.
        """
        if not self._turns:
            with contextlib.suppress(Overloaded):
                return self._generation(answer)
            if not self._running:  # nothing will end and make room
                return self._generation(answer)
        if not self._turns.put(answer.asked.key, answer):
            self.counts.refused += 1
            waiting = len(self._turns)
            raise busy(f"{waiting} requests wait already; try again later", self._wait_s(waiting + 1))
        self._post(answer, Accepted())
        while True:
            await answer.turn.wait()
            answer.turn = trio.Event()
            try:
                generation = self._generation(answer)
            except Overloaded:
                if not self._running:  # nothing will end and make room
                    raise
                continue
            self._turns.take()
            self._next_turn()
            return generation

    def _generation(self, answer: Answer) -> Generation:
        asked, left_s = answer.asked, self._left_s(answer)
        generation = self.run.generate(
            list(asked.prompt), max_tokens=asked.max_tokens, sampling=asked.sampling, stop=asked.stop,
            stop_tokens=asked.stop_tokens, logprobs=asked.logprobs, deadline_s=max(1e-3, left_s) if left_s < math.inf else None,
            traceparent=asked.traceparent, answered=asked.answered, grammar=asked.grammar,
        )  # fmt: skip
        self._running += 1
        return generation

    def _note(self, asked: Asked, generation: Generation) -> None:
        """Note which session works on a request."""
        if asked.request_id and generation.session:
            if len(self._known) >= MOST_KNOWN:
                self._known.popitem(last=False)
            checkpoint = self.run.plan.graph.checkpoint
            decodes = checkpoint is not None and checkpoint.config.encoder is not None  # the prompt is the encoder's
            known = self._known.setdefault(asked.request_id, Known(asked.key, 1 if decodes else len(asked.prompt)))
            known.sessions.append(generation.session)

    def _left_s(self, answer: Answer) -> float:
        """Return the time that an answer has until its deadline."""
        return math.inf if self._deadline_s is None else answer.began_s + self._deadline_s - time.monotonic()

    def _next_turn(self) -> None:
        following = self._turns.next()
        if following is not None:
            following.turn.set()

    def _wait_s(self, place: int) -> float:
        """Estimate how long a request at this place of the queue waits, from the last answers."""
        durations = self.counts.durations_s
        mean_s = sum(durations) / len(durations) if durations else 1.0
        return place * mean_s / max(1, self._running)

    def _close(self, answer: Answer) -> None:
        answer.closed = True
        self.counts.left += 1
        answer.scope.cancel()

    def _post(self, answer: Answer, event: Event) -> None:
        self._outbox.append((answer, event))
        if not self._woken and self._loop is not None:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the server's loop has ended, and all its answers with it
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """Give everything that has come to the answers. Called on the server's thread."""
        self._woken = False
        while self._outbox:
            answer, event = self._outbox.popleft()
            answer.reply.put(answer.index, event)
