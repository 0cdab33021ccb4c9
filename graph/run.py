"""A run: the plan, running. What a user asks of it, and the gateway's hands; `launch.py` starts and ends it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ranvier.actors import spans
from ranvier.actors.checkpoint import ModelConfig
from ranvier.actors.session import Sampling, SessionInfo
from ranvier.actors.spec import GATEWAY
from ranvier.actors.supervisor import Supervisor
from ranvier.transport.errors import LinkClosed, ProtocolError
from ranvier.transport.exchange import RefusedMessage
from ranvier.transport.header import Row

from . import template
from .chaos import Detours
from .errors import RequestError
from .gateway import Gateway, token_tensor
from .generation import Client, Generation, Wakes
from .members import Members
from .own_end import OwnEnd
from .plan import Plan
from .recovery import Recovered, Recovery
from .run_folder import RunFolder
from .scaling import Scaling
from .status import Status
from .stream import Stream, Tensors
from .text_stream import TextStream
from .tokenizer import TextCodec
from .wait_for import Answer
from .why import Why

if TYPE_CHECKING:
    import torch

TICK_S = 1.0
ACK_DELAY_S = 0.002


class Run:
    """A graph that is running. Made by `launch`."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        supervisor: Supervisor,
        own: OwnEnd,
        gateway: Gateway,
        codec: TextCodec | None,
        detours: Detours,
        why: Why,
        status: Status,
    ) -> None:
        self.plan = plan
        self.folder = folder
        self._supervisor = supervisor
        self._own = own
        self._gateway = gateway
        self._codec = codec
        self._detours = detours
        self._wakes: Wakes = {}
        self._over = False
        self._quiet_since_ns = 0
        self._steps = -1
        self._why = why
        self._status = status
        self.metrics: str | None = None
        """Where Prometheus reads this run's /metrics, if anywhere."""
        why.gateway, why.taken_from = gateway, self._wakes
        gateway.on_ended = self._on_ended
        members = Members(plan, folder, supervisor, gateway, own.wire, self._flush)
        self._scaling = Scaling(plan, supervisor, gateway, members)
        self._recovery = Recovery(plan, supervisor, gateway, members)

    @property
    def dir(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def pids(self) -> Mapping[str, int]:
        """The processes of the hosts, by identity (`actor.replica.epoch`), where they run on this machine."""
        return self._supervisor.pids

    @property
    def alarms(self) -> Sequence[Mapping[str, Any]]:
        """Edges whose tap has seen NaN or infinities, the first one first: `actor`, `edge`, `session`, `position`, and the
        `share` of the elements."""
        return self._supervisor.alarms

    def status(self) -> dict[str, Any]:
        """Hosts, open sessions, counters: what is known at this moment without asking anybody."""
        return {
            **self._status.snapshot(), "counters": self.counters, "recoveries": len(self.recoveries),
            "requests": self._gateway.accepted, "tokens": self._gateway.delivered,
        }  # fmt: skip

    @property
    def recoveries(self) -> Sequence[Recovered]:
        """The hosts that were lost so far and have been replaced."""
        return self._recovery.done

    @property
    def codec(self) -> TextCodec:
        """The model's tokenizer.

        Raises:
            RequestError: the graph does not generate text, or its model brings no tokenizer.
        """
        if self._codec is None:
            raise RequestError(f"graph {self.plan.graph.name} has no tokenizer; give token ids and use `stop_tokens`")
        return self._codec

    def chat_tokens(self, messages: Sequence[dict[str, str]] | str) -> list[int]:
        """Token ids of a chat (a string: one message of the user), by the model's own template."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        codec = self.codec
        if codec.chat_template is None:
            raise RequestError("the model brings no chat template; use a raw prompt")
        text = template.render(codec.chat_template, messages, codec.bos_token, codec.eos_token)
        return codec.encode(text, special=False)

    # -- requests -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[dict[str, str]] | Sequence[int],
        *,
        max_tokens: int = 128,
        raw: bool = False,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        logits: bool = False,
        deadline_s: float | None = None,
        traceparent: str | None = None,
    ) -> Generation:
        """Generate tokens: `async for token in run.generate(…)` gives each as soon as it is there.

        Args:
            prompt: a user's message, a list of chat messages, or token ids as they are.
            max_tokens: at most so many new tokens.
            raw: take a string as it is, without the chat template.
            sampling: how tokens are chosen; greedy if None.
            stop: strings that end the stream; they are not shown.
            stop_tokens: ids that end the stream (shown in `token_ids`); the model's own if None.
            logits: give the logits with every token.
            deadline_s: seconds from now after which the stream ends with `Expired`, wherever it is.
            traceparent: the W3C trace context of whoever asks: the request's spans join that trace. Without one they are a
                trace of their own, where the graph says `telemetry.otlp`.

        Raises:
            RequestError: the prompt is empty or too long, or the graph does not generate.
            Overloaded: no room now.
            ActorFailed: an actor was lost (here, or while iterating).
            Expired: the deadline passed (while iterating).
        """
        graph = self.plan.graph
        if not graph.generates or graph.checkpoint is None:
            raise RequestError(f"graph {graph.name} does not generate tokens; use call()")
        config = graph.checkpoint.config
        ids = self._prompt_ids(prompt, raw)
        self._check_prompt(ids, max_tokens, config)
        if stop and self._codec is None:
            raise RequestError("stop strings need the model's tokenizer, and it brings none; use stop_tokens")
        log: tuple[int, ...] = tuple(ids)
        inputs: Tensors = {}
        if config.encoder is not None and not any(e.source == GATEWAY and e.out == "prompt" for e in graph.edges):
            raise RequestError(f"graph {graph.name} has no encoder_embedding, so nothing takes the prompt")
        if config.encoder is not None:  # the prompt is the encoder's; the decoder begins with a token of its own
            log, inputs = (config.encoder.start_token,), {"prompt": token_tensor(ids, "prompt")}
        root, caller = self._traced(traceparent)
        info = SessionInfo(
            session=0,
            epoch=0,
            traceparent=root,
            capacity=len(ids) + max_tokens,
            log=log,
            max_tokens=max_tokens,
            stop_tokens=tuple(config.eos_tokens if stop_tokens is None else stop_tokens),
            sampling=sampling or Sampling(),
            logits=logits,
        )
        if deadline_s is not None and not deadline_s > 0:
            raise RequestError(f"deadline_s: expected over 0, got {deadline_s}")
        client = Client(self._gateway, info, inputs, self._flush, self._wakes, deadline_s, caller)
        return Generation(client, TextStream(self._codec, stop), len(ids))

    def _traced(self, traceparent: str | None) -> tuple[str, str]:
        """The trace context of a request's root span, empty if nobody traces it, and the span that it comes from."""
        file = self.plan.graph.file
        if not file.trace or (traceparent is None and file.telemetry.otlp is None):
            return "", ""  # spans are read from the trace
        try:
            return spans.root(traceparent)
        except ValueError as error:
            raise RequestError(str(error)) from None

    async def score(self, ids: Sequence[int], *, traceparent: str | None = None) -> list[float]:
        """The log-probability (natural logarithm) of each token of `ids` but the first, given all before it.

        Raises:
            RequestError: fewer than two tokens or too many, or the graph is no language model.
            Overloaded: no room now.
            ActorFailed: an actor was lost.
        """
        graph = self.plan.graph
        if not graph.generates or graph.checkpoint is None:
            raise RequestError(f"graph {graph.name} is no language model; it has nothing to score")
        config = graph.checkpoint.config
        if config.encoder is not None:
            raise RequestError(f"graph {graph.name} is an encoder–decoder model; score is for causal ones")
        self._check_prompt(list(ids), 1, config, spare=1)
        if len(ids) < 2:
            raise RequestError("score: expected at least two tokens, got 1")
        root, caller = self._traced(traceparent)
        info = SessionInfo(session=0, epoch=0, capacity=len(ids), log=tuple(ids), score=True, traceparent=root)
        with contextlib.closing(Client(self._gateway, info, {}, self._flush, self._wakes, caller=caller)) as client:
            await client.event()
        return list(client.stream.scores)

    async def call(self, traceparent: str | None = None, /, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Send one tensor to each input port of the gateway, wait for one from each output port. `traceparent`: see
        `generate`.

        Raises:
            RequestError: the names are not the gateway's ports, or a tensor does not fit its edge.
            ActorFailed: an actor was lost.
        """
        from ranvier.transport.tensors import dtype_name, from_buffer, to_buffer

        ports = {edge.out for edge in self.plan.graph.edges if edge.source == GATEWAY}
        if inputs.keys() != ports:
            raise RequestError(f"call: expected the inputs {sorted(ports)}, got {sorted(inputs)}")
        for edge in self.plan.graph.edges:
            if edge.source == GATEWAY:
                tensor = inputs[edge.out]
                rows = {"tokens": tensor.shape[0] if tensor.dim() else 1, "rows": 1}
                dtype = dtype_name(tensor.dtype)
                try:
                    edge.spec.check(edge.name, dtype, tuple(tensor.shape), rows)
                except ProtocolError as error:
                    raise RequestError(str(error)) from None
        root, caller = self._traced(traceparent)
        info = SessionInfo(session=0, epoch=0, capacity=0, traceparent=root)
        tensors = {port: to_buffer(port, tensor) for port, tensor in inputs.items()}
        with contextlib.closing(
            Client(self._gateway, info, tensors, self._flush, self._wakes, caller=caller)
        ) as client:
            while not isinstance(await client.event(), str):
                pass
        outputs = client.stream.outputs
        return {port: from_buffer(meta, buffer) for port, (meta, buffer) in outputs.items()}

    def _prompt_ids(self, prompt: str | Sequence[dict[str, str]] | Sequence[int], raw: bool) -> list[int]:
        if isinstance(prompt, str):
            checkpoint = self.plan.graph.checkpoint
            raw = raw or (checkpoint is not None and checkpoint.config.encoder is not None)
            return self.codec.encode(prompt, special=True) if raw else self.chat_tokens(prompt)
        messages = [item for item in prompt if isinstance(item, dict)]
        tokens = [item for item in prompt if isinstance(item, int)]
        if len(messages) == len(prompt) > 0:
            return self.chat_tokens(messages)
        if len(tokens) == len(prompt):
            return tokens
        kinds = ", ".join(sorted({type(item).__name__ for item in prompt}))
        raise RequestError(
            f"prompt: expected text, a list of chat messages, or a list of token ids, got a list of {kinds}"
        )

    def _check_prompt(self, ids: list[int], max_tokens: int, config: ModelConfig, spare: int = 0) -> None:
        context = config.context + spare
        vocab = config.vocab if config.encoder is None else config.encoder.source_vocab
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        if max_tokens < 1:
            raise RequestError(f"max_tokens: expected at least 1, got {max_tokens}")
        if config.encoder is not None:  # each end has the context for itself
            if max(len(ids), max_tokens) > context:
                raise RequestError(
                    f"the prompt has {len(ids)} tokens and {max_tokens} are asked for, but either end of the model holds "
                    f"{context}; shorten one of them"
                )
        elif len(ids) + max_tokens > context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and {max_tokens} are asked for, but the model's context is {context}; "
                "shorten one of them"
            )
        wrong = next((token for token in ids if not 0 <= token < vocab), None)
        if wrong is not None:
            raise RequestError(f"token {wrong} is not in the vocabulary of {vocab}")
        capacity = self._supervisor.supervision.capacity_tokens
        if capacity is not None and len(ids) + max_tokens > capacity:
            raise RequestError(
                f"the request needs {len(ids) + max_tokens} tokens of KV cache, an actor holds {capacity}; raise cache_tokens"
            )

    async def scale(self, actor: str, replicas: int) -> str:
        """Bring an actor to so many replicas while the run goes on: what was done, in words.

        One that joins takes sessions from when it runs; one that leaves ends when its last session is over.

        Raises:
            RequestError: no such actor, or it cannot have so many.
            ActorFailed: a replica that should have joined did not; the run goes on without it.
        """
        return await self._scaling.scale(actor, replicas)

    async def why(self) -> Answer:
        """Who waits for whom at this moment, in words, and who is to blame: what `ranvier why` says of a run."""
        return await self._why.ask()

    # -- the gateway's hands ------------------------------------------------------------------------------------

    def on_session_failed(self, label: str, fields: Mapping[str, Any]) -> None:
        self._gateway.on_session_failed(label, fields)
        self._flush()

    def _on_ended(self, stream: Stream, outcome: str | Exception) -> None:
        """The root span of a request that somebody traces."""
        context = spans.TraceContext(stream.asked.traceparent) if stream.asked.traceparent else None
        if context is not None and context.sampled:
            row = Row(stream.info.session, stream.info.epoch, 0, len(stream.log))
            self._own.records.span(
                stream.accepted_ns, time.monotonic_ns(), row, context.trace.hex(), context.span.hex(), stream.caller, [], 0,
                spans.words(outcome),
            )  # fmt: skip

    def _flush(self) -> None:
        """Carry out what the gateway decided."""
        if self._over:
            return
        for kind, fields, labels in self._gateway.commands:
            self._supervisor.tell(labels, kind, **fields)
        self._gateway.commands.clear()
        for outgoing in self._gateway.exchange.outbox:
            outgoing.buffers = self._own.wire.send(outgoing.peer, outgoing.header, outgoing.buffers)
        self._gateway.exchange.outbox.clear()
        for stream, wake in self._wakes.items():
            if stream.events:
                wake.set()
        self._scaling.look()

    def _close(self) -> None:
        """What clients still hold of their sessions ends. Messages are taken in and acknowledged until `_silence`: a host
        that is told to stop waits for that."""
        self._recovery.stop()
        self._gateway.on_failure(LinkClosed("the run is over"))
        self._flush()

    def _silence(self) -> None:
        """Nothing is sent any more."""
        self._over = True

    async def _listen(self) -> None:
        gateway = self._gateway
        exchange = gateway.exchange
        while True:
            arrival = None
            wait_s = ACK_DELAY_S if exchange.owes() else TICK_S
            due_ns = gateway.due_ns
            if due_ns is not None:
                wait_s = min(wait_s, max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            with trio.move_on_after(wait_s):
                try:
                    arrival = await self._own.wire.receive()
                except ProtocolError as error:
                    self._refused(error)
            if arrival is not None:
                try:
                    received = exchange.on_arrival(arrival)
                except ProtocolError as error:
                    self._refused(error)
                else:
                    if received is not None:
                        gateway.on_message(received)
                        self._own.done(received)
            elif exchange.owes():
                exchange.idle()
            else:
                exchange.tick()
                self._give_up_unanswered()
            if due_ns is not None and time.monotonic_ns() >= due_ns:
                gateway.on_due(time.monotonic_ns())
            self._flush()

    def _give_up_unanswered(self) -> None:
        """Sessions that nobody works on any more: an actor has left an output out."""
        supervision, now_ns = self._supervisor.supervision, time.monotonic_ns()
        limits = self.plan.graph.file.supervision
        if not supervision.quiet or supervision.steps != self._steps or not self._quiet_since_ns:
            self._quiet_since_ns, self._steps = now_ns, supervision.steps
        # what a host has just begun, its next heartbeat tells
        quiet_s = (now_ns - self._quiet_since_ns) / 1e9 - 2 * limits.heartbeat_interval_s
        if quiet_s > limits.join_deadline_s:
            self._gateway.on_quiet(self._quiet_since_ns, limits.join_deadline_s)

    def _refused(self, error: ProtocolError) -> None:
        """Log it, and tell the clients whose answer it was."""
        self._supervisor.refused(GATEWAY, str(error))
        if isinstance(error, RefusedMessage):
            for row in error.rows:
                self._gateway.on_lost(row, error)

    async def _failure(self) -> None:
        await self._supervisor.failed.wait()
        failure = self._supervisor.supervision.failure
        assert failure is not None
        self._gateway.on_failure(failure)
        self._flush()

    @property
    def counters(self) -> dict[str, dict[str, int]]:
        """What each process has counted, by `actor.replica`: rows that came late or were refused, second copies, waits for
        credit, …"""
        counted = {label: dict(own) for label, own in self._supervisor.supervision.counters.items()}
        if done := self._detours.counters:
            counted["chaos"] = dict(done)
        return {**counted, f"{GATEWAY}.0": {**self._gateway.exchange.counters, **self._own.wire.wire.counters}}
