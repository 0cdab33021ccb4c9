"""Manage the generations of a run: begin them from prompts, or continue them from the journal of a lost run."""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec
import trio

from ranvier.actors.component.session import Grammar, Sampling, SessionInfo
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.trace import spans
from ranvier.transport.format.message import stable

from ..check.checked import Graph
from ..file.errors import RequestError, TooLong
from ..inside import places
from ..inside.ops import Op, Wish
from ..sessions import journal
from ..sessions.gateway import Gateway
from ..sessions.generation import Client, Generation, Over, Wakes
from ..sessions.grammars import Grammars
from ..sessions.journal import Asked, Ended, Journal
from ..sessions.stream import Stream, Tensors
from ..sessions.text_codec import ChatOptions, TextCodec
from ..sessions.text_process import TextProcess
from ..sessions.text_stream import TextStream
from ..sessions.wire_rows import token_tensor
from .before_start import check_inputs
from .lost_requests import LostRequests
from .request_checks import (
    check_ids,
    checked_answered,
    checked_chat,
    checked_logprobs,
    checked_prompt,
    checked_sampling,
    ids_of,
    listed,
    no_tokenizer,
    positions_of,
    positive,
    whole,
)

if TYPE_CHECKING:
    import torch


class _Request(NamedTuple):
    """Hold the options of a generation, without its prompt. `root` and `caller` belong to its trace."""

    max_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...] | None
    logits: bool
    deadline_ns: int
    root: str
    caller: str
    key: str
    stop: tuple[str, ...]
    logprobs: int | None
    answered: tuple[int, ...]
    grammar: Grammar | None
    edits: tuple[Op, ...]
    reads: tuple[str | Wish, ...]


class _Waiting(NamedTuple):
    """Hold a request whose prompt is still text or chat messages."""

    generation: Generation
    prompt: str | list[dict[str, Any]]
    raw: bool
    chat: ChatOptions
    request: _Request


class Requests:
    """Manage the generations of one run.

    `flush` carries out the gateway's decisions. `capacity` returns how many positions one session may have in the KV
    caches; None: no limit. `folder` is the run folder. `journal` is the run's journal, if the graph asks for
    one.
    """

    def __init__(
        self,
        graph: Graph,
        gateway: Gateway,
        codec: TextCodec | None,
        text: TextProcess | None,
        flush: Callable[[], None],
        wakes: Wakes,
        capacity: Callable[[], int | None],
        folder: Path,
        journal: Journal | None,
    ) -> None:
        self.journal = journal
        self._graph = graph
        self.gateway = gateway
        self.codec = codec
        self._text = text
        self.flush = flush
        self._wakes = wakes
        self._capacity = capacity
        self.folder = folder
        self.grammars = Grammars(codec, folder)
        self._waiting_in, self._waiting = trio.open_memory_channel[_Waiting](math.inf)
        self.lost = LostRequests(self)
        self._preparing: Generation | None = None
        self._over: Exception | None = None
        self._not_durable: set[str] = set()

    @property
    def _process(self) -> TextProcess:
        if self._text is None:
            raise no_tokenizer(self._graph)
        return self._text

    def tokens(
        self, prompt: str | Sequence[dict[str, Any]], raw: bool, chat: ChatOptions, special: bool
    ) -> list[int]:  # fmt: skip
        """Return the token ids of a prompt. See `Run.tokens`."""
        asked = checked_prompt(prompt)
        if isinstance(asked, list) and not all(isinstance(each, dict) for each in asked):
            raise RequestError("prompt: expected text or a list of chat messages, got token ids")
        if self._text is None:
            raise no_tokenizer(self._graph)
        return self._ids(cast(str | list[dict[str, Any]], asked), raw, checked_chat(chat), special)

    def generate(
        self,
        prompt: str | Sequence[dict[str, str]] | Sequence[int],
        *,
        max_tokens: int,
        raw: bool,
        sampling: Sampling | str | None,
        stop: Sequence[str],
        stop_tokens: Sequence[int] | None,
        logits: bool,
        logprobs: int | None,
        chat: ChatOptions,
        deadline_s: float | None,
        traceparent: str | None,
        answered: Sequence[int],
        grammar: Mapping[str, Any] | None,
        edits: Sequence[Op],
        reads: Sequence[str | Wish],
    ) -> Generation:
        """Begin a generation. See `Run.generate`.

        It begins at once if its prompt is token ids, else when the prompt has been tokenized.
        """
        graph = self._graph
        if not graph.generates or graph.checkpoint is None:
            raise RequestError(f"graph {graph.name} does not generate tokens; use call()")
        chat = checked_chat(chat)
        most = self._most(max_tokens)
        request = _Request(
            most,
            checked_sampling(graph, sampling, most),
            tuple(whole("stop_tokens", token) for token in listed("stop_tokens", stop_tokens))
            if stop_tokens is not None
            else None,
            bool(logits),
            time.monotonic_ns() + int(positive("deadline_s", deadline_s) * 1e9) if deadline_s is not None else 0,
            *self.traced(traceparent),
            secrets.token_hex(8) if self.journal is not None else "",
            self._stop_strings(stop),
            checked_logprobs(logprobs),
            checked_answered(graph, answered, most),
            self.grammars.of(grammar) if grammar is not None else None,
            tuple(listed("edits", edits)),
            tuple(listed("reads", reads)),
        )
        places.check_names(graph, request.edits, request.reads)
        if request.grammar is not None and request.sampling.min_tokens:
            raise RequestError("min_tokens: a grammar says where the answer ends; leave one of them out")
        ends = graph.checkpoint.config.eos_tokens if request.stop_tokens is None else request.stop_tokens
        if request.grammar is not None and not ends:
            raise RequestError(
                "stop_tokens: a grammar needs the tokens that end an answer (ignore_eos leaves them out)"
            )
        generation = Generation(TextStream(self.codec, request.stop, request.sampling.min_tokens))
        generation.request_id = request.key
        generation.is_durable = self.is_durable
        asked = checked_prompt(prompt)
        if isinstance(asked, list) and not isinstance(next(iter(asked), 0), dict):
            self._begin(generation, cast(list[int], asked), request)
        else:
            if self._over is not None:
                raise self._over
            if self._text is None:
                raise no_tokenizer(graph)
            generation.deadline_ns = request.deadline_ns
            self._waiting_in.send_nowait(
                _Waiting(generation, cast(str | list[dict[str, Any]], asked), raw, chat, request)
            )
        return generation

    def _most(self, max_tokens: int) -> int:
        """Check `max_tokens` as far as possible without the prompt.

        Raises:
            RequestError: `max_tokens` is not a whole number, or exceeds the model's context.
        """
        assert self._graph.checkpoint is not None
        most, context = whole("max_tokens", max_tokens), self._graph.checkpoint.config.context
        if not 1 <= most <= context:
            raise RequestError(f"max_tokens: expected 1 to the model's context of {context}, got {most}")
        return most

    def _stop_strings(self, stop: Sequence[str]) -> tuple[str, ...]:
        """Check stop strings.

        Raises:
            RequestError: a stop string is not a string, or the model has no tokenizer.
        """
        strings = tuple(listed("stop", stop))
        wrong = next((each for each in strings if not isinstance(each, str)), None)
        if wrong is not None:
            raise RequestError(f"stop: expected strings, got {type(wrong).__name__}; give ids as stop_tokens")
        if any("\ud800" <= letter <= "\udfff" for each in strings for letter in each):
            raise RequestError("stop: expected text, got lone surrogates; decode the bytes first")
        if strings and self.codec is None:
            raise RequestError("stop strings need a tokenizer, and the model has none; use stop_tokens")
        return strings

    def _begin(self, generation: Generation, ids: list[int], request: _Request) -> None:
        """Submit a request whose prompt is known as token ids.

        Raises:
            RequestError, Overloaded, ActorFailed: see `generate`.
        """
        graph = self._graph
        assert graph.checkpoint is not None
        config = graph.checkpoint.config
        self.check(ids, request.max_tokens)
        log: tuple[int, ...] = tuple(ids)
        inputs: Tensors = {}
        if config.encoder is not None and not any(e.source == GATEWAY and e.out == "prompt" for e in graph.edges):
            raise RequestError(f"graph {graph.name} has no actor for the prompt; add one of kind encoder_embedding")
        if config.encoder is not None:  # the encoder gets the prompt; the decoder begins with its start token
            log, inputs = (config.encoder.start_token,), {"prompt": token_tensor(ids, "prompt")}
        info = SessionInfo(
            session=0,
            epoch=0,
            traceparent=request.root,
            capacity=len(ids) + request.max_tokens,
            log=log,
            max_tokens=request.max_tokens,
            stop_tokens=tuple(config.eos_tokens) if request.stop_tokens is None else request.stop_tokens,
            sampling=request.sampling,
            logits=request.logits,
            logprobs=request.logprobs,
            grammar=request.grammar,
            edits=places.edits_of(graph, request.edits, len(log), len(ids) + request.max_tokens),
            reads=places.reads_of(graph, request.reads, len(log), len(ids) + request.max_tokens),
        )
        deadline_s = time.time() + (request.deadline_ns - time.monotonic_ns()) / 1e9 if request.deadline_ns else 0.0
        source = tuple(ids) if inputs else ()
        asked = journal.of_request(request.key, info, request.stop, deadline_s, source=source)
        asked = msgspec.structs.replace(asked, tokens=request.answered)
        answered = request.answered
        if answered and info.finished(len(answered), answered[-1]):
            generation.begin(Over(info.reason(answered[-1])), info, len(ids))
        else:
            client = self.submit(info, inputs, asked, request.deadline_ns, request.caller)
            generation.begin(client, client.stream.info, len(ids))
        generation.recorded(len(log), answered, len(log) + len(answered))

    async def prepare(self) -> None:
        """Turn prompts that are text into token ids, in order of arrival, and begin their requests.

        A hostile template may take a second. The gateway continues to work meanwhile.
        """
        async for generation, prompt, raw, chat, request in self._waiting:
            if generation.closed:
                continue
            self._preparing = generation
            try:
                ids = await trio.to_thread.run_sync(self._ids, prompt, raw, chat, abandon_on_cancel=True)
                if not generation.closed:
                    self._begin(generation, ids, request)
            except Exception as error:  # an error of one prompt must not stop the other requests
                generation.refuse(error)
            self._preparing = None

    def _ids(
        self, prompt: str | list[dict[str, Any]], raw: bool, chat: ChatOptions, special: bool = True
    ) -> list[int]:  # fmt: skip
        return ids_of(self._graph, self._process, prompt, raw, chat, special)

    def refuse(self, why: Exception) -> None:
        """End, with this error, all requests that have not begun.

        These are requests whose prompts are still text, requests that wait for room, and all future requests.
        """
        self._over = why
        self.lost.refuse(why)
        if self._preparing is not None:
            self._preparing.refuse(why)
        with contextlib.suppress(trio.WouldBlock):
            while True:
                self._waiting.receive_nowait().generation.refuse(why)

    def most_after(self, prompt_tokens: int) -> int:
        """Return how many tokens may follow a prompt. See `Run.most_after`."""
        checkpoint, capacity = self._graph.checkpoint, self._capacity()
        if not self._graph.generates or checkpoint is None:
            raise RequestError(f"graph {self._graph.name} does not generate tokens; use call()")
        inside = prompt_tokens if checkpoint.config.encoder is None else 0
        most = checkpoint.config.context - inside
        return max(0, most if capacity is None else min(most, capacity - prompt_tokens))

    def check(self, ids: list[int], max_tokens: int, spare: int = 0) -> None:
        """Check that a prompt and `max_tokens` fit into the model and into a KV cache.

        `spare` is added to the model's context.

        Raises:
            RequestError: they do not fit, or a token is not in the vocabulary.
        """
        check_ids(self._graph, ids, max_tokens, spare)
        capacity = self._capacity()
        if capacity is not None and len(ids) + max_tokens > capacity:
            raise TooLong(
                f"the request needs {len(ids) + max_tokens} tokens of KV cache, an actor holds {capacity}; raise cache_tokens"
            )

    async def call(self, inputs: Mapping[str, torch.Tensor], traceparent: str | None) -> dict[str, torch.Tensor]:
        """Send tensors by input port, and return those of the output ports. See `Run.call`."""
        from ranvier.transport.format.tensors import from_buffer, to_buffer

        check_inputs(self._graph, inputs)
        root, caller = self.traced(traceparent)
        info = SessionInfo(
            session=0, epoch=0, capacity=positions_of(self._graph, inputs, self._capacity()), traceparent=root
        )
        tensors = {}
        for port, tensor in inputs.items():
            try:
                meta, buffer = to_buffer(port, tensor)
            except ValueError as error:
                raise RequestError(f"call: {error}") from None
            tensors[port] = meta, stable(buffer)  # the caller may overwrite it, and it may have to be sent again
        with contextlib.closing(self.client(info, caller, tensors)) as client:
            while not isinstance(await client.event(), str):
                pass
        outputs = client.stream.outputs
        return {port: from_buffer(meta, buffer) for port, (meta, buffer) in outputs.items()}

    def client(self, info: SessionInfo, caller: str, inputs: Tensors | None = None) -> Client:
        """Submit a session that is no generation, and return its client. Raise the errors of `Gateway.submit`."""
        return Client(self.gateway, self.gateway.submit(info, inputs, caller=caller), self.flush, self._wakes)

    def traced(self, traceparent: str | None) -> tuple[str, str]:
        """Return the trace context of a request's root span, and the caller's span; both are empty without tracing.

        Raises:
            RequestError: `traceparent` is not valid.
        """
        file = self._graph.file
        if not file.trace or (traceparent is None and file.telemetry.otlp is None):
            return "", ""  # spans are read from the trace
        try:
            return spans.root(traceparent)
        except ValueError as error:
            raise RequestError(str(error)) from None

    # -- the journal --------------------------------------------------------------------------------------------

    def submit(
        self, info: SessionInfo, inputs: Tensors, asked: Asked, deadline_ns: int = 0, caller: str = ""
    ) -> Client:
        """Submit a session, and add it to the journal before its client gets anything.

        Raises:
            Overloaded, ActorFailed: see `Gateway.submit`. Then nothing is written to the journal.
        """
        key = asked.id if self.journal is not None else ""
        stream = self.gateway.submit(info, inputs, deadline_ns, caller, key, asked.tokens)
        self.note(asked)
        return Client(self.gateway, stream, self.flush, self._wakes)

    def note(self, line: Asked | Ended) -> None:
        if self.journal is not None:
            self.journal.add(line)

    def on_delivered(self, stream: Stream, position: int, token: int) -> None:
        """Add a token to the journal, before its client gets it."""
        if self.journal is not None and stream.key:
            self.journal.add(journal.Made(stream.key, position, token))

    def on_ended(self, stream: Stream, outcome: str | Exception) -> None:
        """Add the end of a session to the journal, and wake `make_room`."""
        if stream.key:
            failed = isinstance(outcome, Exception)
            self.note(Ended(stream.key, "" if failed else str(outcome), str(outcome) if failed else ""))
        self.lost.one_is_over()

    def write(self) -> None:
        """Write the new lines of the journal, before any client is woken."""
        if self.journal is not None and not self.journal.flush():
            self._not_durable.update(stream.key for stream in self.gateway.streams.values() if stream.key)

    def catch_up(self) -> None:
        """Write the journal lines that a full disk has delayed."""
        if self.journal is not None:
            self.journal.catch_up()

    @property
    def counters(self) -> dict[str, int]:
        """Return the number of requests that were not durable for a while, if there is a journal."""
        return {"requests_not_durable": len(self._not_durable)} if self.journal is not None else {}

    def is_durable(self) -> bool:
        return self.journal is None or self.journal.durable
