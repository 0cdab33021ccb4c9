"""Represent a running graph: the calls of its user, and the I/O of its gateway. `launch.py` starts and ends it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import trio

from ranvier.actors.component.session import Sampling
from ranvier.actors.errors import describe
from ranvier.actors.protocol.control_protocol import SessionFailed
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.trace import spans
from ranvier.transport.format.errors import LinkClosed, ProtocolError
from ranvier.transport.format.header import Row
from ranvier.transport.format.host_id import replica_id
from ranvier.transport.links.exchange import RefusedMessage
from ranvier.transport.links.link_state import Received

from ..inside import patches
from ..inside.ops import Op, Wish
from ..observe.blame import Answer
from ..plan.plan import Plan
from ..sessions.gateway import Gateway
from ..sessions.generation import Generation, Wakes
from ..sessions.journal import Began, Journal, Resumed
from ..sessions.stream import Stream
from ..sessions.text_codec import ChatOptions, TextCodec
from ..sessions.text_process import TextProcess
from .hosts import Hosts
from .looking import Looking
from .members import Members
from .quiet import Quiet
from .recovery import Recovered, Recovery
from .request_checks import listed, no_tokenizer
from .requests import Requests
from .run_folder import RunFolder
from .scaling import Scaling

if TYPE_CHECKING:
    import torch


class Run(Looking):
    """Represent a running graph. `launch` makes it."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        hosts: Hosts,
        gateway: Gateway,
        codec: TextCodec | None,
        text: TextProcess | None,
        journal: Journal | None,
    ) -> None:
        self.plan = plan
        self.folder = folder
        self._hosts = hosts
        self._supervisor = hosts.supervisor
        self._own = hosts.end
        self._gateway = gateway
        self._codec = codec
        self._wakes: Wakes = {}
        self._over = False
        self._ended: LinkClosed | None = None
        self._quiet = Quiet(hosts.supervisor.supervision, plan.graph.file.supervision)
        self.metrics: str | None = None
        """The address at which Prometheus can read this run's /metrics, if any."""
        self._requests = Requests(
            plan.graph, gateway, codec, text, self.flush, self._wakes,
            lambda: hosts.supervisor.supervision.capacity_tokens, folder.path, journal,
        )  # fmt: skip
        gateway.on_ended = self._on_ended
        gateway.on_delivered = self._requests.on_delivered
        hosts.supervisor.on_session_failed = self._on_session_failed
        hosts.why.watch(gateway, self._wakes)
        hosts.status.watch(gateway)
        hosts.status.more = self._counts
        members = Members(plan, folder, hosts.supervisor, gateway, hosts.end.wire, self.flush)
        self._scaling = Scaling(plan, hosts.supervisor, gateway, members)
        self._recovery = Recovery(plan, hosts.supervisor, gateway, members)

    async def begin(self, nursery: trio.Nursery, left: Resumed | None) -> None:
        """Open the links with the hosts that have loaded, and begin to serve. `launch` calls this.

        `left` is the journal of a lost run whose requests continue here.

        Raises:
            ActorFailed: a host was lost meanwhile.
        """
        for spec in self._hosts.specs:
            host = self._supervisor.supervision.hosts[spec.identity]
            self._gateway.placement.join(spec.actor, spec.replica, host.capacity_tokens, host.keeps)
        nursery.start_soon(self._failure)
        nursery.start_soon(self._requests.prepare)
        nursery.start_soon(self._hosts.why.before_deadlines)
        await nursery.start(self._scaling.run)
        await self._hosts.link(nursery, self)
        nursery.start_soon(self._recovery.run)
        if left is not None:
            nursery.start_soon(self._requests.lost.make_room)
            self._requests.lost.go_on(left)
            left.close()

    @property
    def dir(self) -> Path:
        """Return the run folder."""
        return self.folder.path

    @property
    def hashes(self) -> Began | None:
        """Return the hashes of graph and model, if the run has a journal."""
        return self._requests.journal.run if self._requests.journal is not None else None

    @property
    def pids(self) -> Mapping[str, int]:
        """Return the process ids of the hosts on this machine, by identity (`actor.replica.epoch`)."""
        return self._supervisor.pids

    @property
    def alarms(self) -> Sequence[Mapping[str, Any]]:
        """Return the edges whose tap has seen NaN or infinity, the earliest first.

        Each entry has `actor`, `edge`, `session`, `position`, and the `share` of such elements.
        """
        return self._supervisor.alarms

    def status(self) -> dict[str, Any]:
        """Return hosts, open sessions and counters, as known at this moment, without asking a host.

        Raises:
            LinkClosed: the run is over. Every other call raises this, too.
        """
        self._check_open()
        return self.snapshot()

    def lost_for(self, seconds: float) -> str:
        """Return which actors have been lost for longer than this, in words; "" if there are none."""
        now_s, down = time.monotonic(), self._gateway.placement.replicas
        return "; ".join(
            f"{host.spec.label} is lost for {now_s - host.lost_s:.0f} s: {host.lost.what}"
            for host in self._supervisor.supervision.hosts.values()
            if host.lost is not None and now_s - host.lost_s > seconds and down[host.spec.actor][host.spec.replica].down
        )

    def snapshot(self) -> dict[str, Any]:
        """Return the same as `status`, but also while the run ends. The metrics server uses this."""
        return {**self._hosts.status.snapshot(), "counters": self.counters, **self._counts()}

    def _counts(self) -> dict[str, Any]:
        return {
            "recoveries": len(self.recoveries), "requests": self._gateway.accepted, "tokens": self._gateway.delivered,
            "restarts": Counter(replica_id(each.actor).actor for each in self.recoveries),
        }  # fmt: skip

    def _check_open(self) -> None:
        if self._ended is not None:
            raise self._ended

    @property
    def recoveries(self) -> Sequence[Recovered]:
        """Return the hosts that were lost and replaced so far."""
        return self._recovery.done

    @property
    def codec(self) -> TextCodec:
        """Return the model's tokenizer.

        Raises:
            RequestError: the graph does not generate text, or its model has no tokenizer.
        """
        if self._codec is None:
            raise no_tokenizer(self.plan.graph)
        return self._codec

    # -- requests -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[dict[str, str]] | Sequence[int],
        *,
        max_tokens: int = 128,
        raw: bool = False,
        sampling: Sampling | Literal["model"] | None = None,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        logits: bool = False,
        logprobs: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
        traceparent: str | None = None,
        answered: Sequence[int] = (),
        grammar: Mapping[str, Any] | None = None,
        edits: Sequence[Op] = (),
        reads: Sequence[str | Wish] = (),
    ) -> Generation:
        """Generate tokens: `async for token in run.generate(…)` yields each token as soon as it exists.

        Args:
            prompt: a user's message, a list of chat messages, or token ids as they are.
            max_tokens: at most this many new tokens.
            raw: use a string as it is, without the chat template.
            sampling: how tokens are chosen. None: greedily. "model": as the model's own files say.
            stop: strings that end the stream; they are not part of the text.
            stop_tokens: ids that end the stream (they appear in `token_ids`); None: the model's own.
            logits: return the logits with every token.
            logprobs: return the log-probability of every token, and those of so many likeliest ones (0 to 20).
            tools: JSON schemas of functions that the model may call, for the chat template.
            documents: documents with `title` and `text`, for the chat template.
            template: the name of one of the model's chat templates. None: `tool_use` if there are tools and the model has
                such a template, else its default.
            template_arguments: further variables of the template, such as `{"enable_thinking": False}`.
            deadline_s: seconds from now after which the stream ends with `Expired`, whatever its state.
            traceparent: the W3C trace context of the caller, whose trace the request's spans join. Without one, the
                spans form a separate trace if the graph has `telemetry.otlp`.
            answered: tokens of the answer that another generation of this prompt has made. This one yields the tokens after
                them: with the same arguments, those that would have followed; none if the answer is complete.
            grammar: which texts the answer may be: `{"json": schema}`, `{"regex": pattern}`, or `{"lark": grammar}` in
                llguidance's notation. The answer ends where the text is complete.
            edits: changes inside the model for this request, made by the functions of `ranvier.ops`, in this order.
            reads: places inside the model, such as `hidden 1-30`: each token brings their values at the position that it was
                made from (`Token.reads`), and `Generation.reads` has those of all positions. A place is read after its edits.

        Raises:
            RequestError: an argument is wrong, or the graph does not generate tokens. While iterating: a prompt of text
                is empty or too long, which shows when it has been tokenized.
            Overloaded: there is no room now (for text: while iterating).
            ActorFailed: an actor was lost (here, or while iterating).
            Expired: the deadline passed (while iterating).
        """
        self._check_open()
        return self._requests.generate(
            prompt, max_tokens=max_tokens, raw=raw, sampling=sampling, stop=stop, stop_tokens=stop_tokens, logits=logits,
            logprobs=logprobs, chat=ChatOptions(tools, documents, template, template_arguments or {}),
            deadline_s=deadline_s, traceparent=traceparent, answered=answered, grammar=grammar,
            edits=(*patches.of(self), *listed("edits", edits)), reads=reads,
        )  # fmt: skip

    def tokens(
        self,
        prompt: str | Sequence[dict[str, Any]],
        *,
        raw: bool = False,
        special: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids that `generate` makes of a prompt of text or of chat messages, with the same arguments.

        Without `special`, a raw text gets none of the model's special tokens around it.

        The call blocks for at most a second, and for as long as earlier prompts take. Any thread may call it.

        Raises:
            RequestError: the graph does not generate text, or its model has no tokenizer.
            CheckpointError: the template is missing or wrong, refuses the messages, or takes too long.
        """
        self._check_open()
        chat = ChatOptions(tools, documents, template, template_arguments or {})
        return self._requests.tokens(prompt, raw, chat, special)

    def most_after(self, prompt_tokens: int) -> int:
        """Return how many tokens may follow a prompt of so many, in the model's context and in a KV cache; 0: none.

        Raises:
            RequestError: the graph does not generate tokens.
        """
        self._check_open()
        return self._requests.most_after(prompt_tokens)

    @property
    def resumed(self) -> Sequence[str]:
        """Return the ids of the resumed run's requests, as their clients know them (`Generation.request_id`).

        This includes both requests that continue here and requests that had already ended.
        """
        return self._requests.lost.resumed

    def resume(self, request_id: str, after: int | None = None) -> Generation:
        """Return the tokens of a request of the resumed run, those from the journal first.

        Args:
            request_id: its id in the journal (`Generation.request_id`).
            after: the `Token.position` of the last token that the client has seen. Only later tokens are returned.
                None: return all tokens.

        Raises:
            RequestError: there is no such request, or another client has resumed it.
        """
        self._check_open()
        return self._requests.lost.resume(request_id, after)

    async def call(self, traceparent: str | None = None, /, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Send one tensor to each input port of the gateway, and wait for one from each output port.

        `generate` describes `traceparent`.

        Raises:
            RequestError: the names are not the gateway's ports, or a tensor does not fit its edge.
            ActorFailed: an actor was lost.
        """
        self._check_open()
        return await self._requests.call(inputs, traceparent)

    async def scale(self, actor: str, replicas: int) -> str:
        """Change the number of an actor's replicas while the run continues. Return what was done, in words.

        A replica that joins takes sessions as soon as it runs. A replica that leaves ends when its last session is
        over.

        Raises:
            RequestError: there is no such actor, or it cannot have this number of replicas.
            ActorFailed: a new replica failed before it joined; the run continues without it.
        """
        self._check_open()
        return await self._scaling.scale(actor, replicas)

    def cut(self, source: str, target: str, seconds: float) -> int:
        """Cut the tcp links between two actors for some time, on purpose. Return how many were cut.

        The run must have been launched with `cuttable`.
        """
        self._check_open()
        return self._hosts.detours.cut(source, target, seconds)

    async def why(self) -> Answer:
        """Return who waits for whom at this moment, and who is to blame, as `ranvier why` prints it."""
        self._check_open()
        return await self._hosts.why.ask()

    # -- the gateway's I/O --------------------------------------------------------------------------------------

    def _on_session_failed(self, label: str, failed: SessionFailed) -> None:
        self._gateway.on_session_failed(label, failed)
        self.flush()

    def _on_ended(self, stream: Stream, outcome: str | Exception) -> None:
        """Note the end of a session in the journal, and record the root span of a traced request."""
        self._requests.on_ended(stream, outcome)
        context = spans.TraceContext(stream.asked.traceparent) if stream.asked.traceparent else None
        if context is not None and context.sampled:
            row = Row(stream.info.session, stream.info.epoch, 0, len(stream.log))
            self._own.records.span(
                stream.accepted_ns, time.monotonic_ns(), row, context.trace.hex(), context.span.hex(), stream.caller, [], 0,
                spans.words(outcome),
            )  # fmt: skip

    def flush(self) -> None:
        """Carry out the gateway's decisions."""
        if self._over:
            return
        commands, self._gateway.commands = self._gateway.commands, []  # a command that cannot be sent is not retried
        for command, labels in commands:
            self._supervisor.send_to(labels, command)
        self._gateway.exchange.drain(self._own.wire.send)
        self._requests.write()
        for stream, wake in self._wakes.items():
            if stream.events:
                wake.set()
        self._scaling.look()

    def end(self) -> None:
        """End all sessions.

        Messages are still received and acknowledged until `silence`, because a stopping host waits for that.
        """
        self._recovery.stop()
        over = self._ended = LinkClosed("the run is over")
        self._gateway.on_failure(over)
        self._requests.refuse(over)
        self.flush()

    def silence(self) -> None:
        """Stop sending."""
        self._over = True

    @property
    def due_ns(self) -> int | None:
        """Return when the gateway has something to do, or None."""
        return self._gateway.due_ns

    def on_due(self, now_ns: int) -> None:
        """Do the gateway's work that is due now."""
        self._gateway.on_due(now_ns)

    def on_tick(self) -> None:
        """End requests that will never be answered, and write journal lines that a full disk has delayed."""
        since_ns = self._quiet.since_ns(time.monotonic_ns())
        if since_ns is not None:
            self._gateway.on_quiet(since_ns, self.plan.graph.file.supervision.join_deadline_s)
        self._requests.catch_up()

    def on_message(self, received: Received) -> None:
        """Take a message for the gateway."""
        try:
            self._gateway.on_message(received)
        except Exception as error:  # the error ends the sessions in that message, not the run
            edge = received.link.spec.name
            self.on_refused(
                RefusedMessage(
                    f"edge {edge}: the gateway cannot process a message: {describe(error)}", received.header.rows
                )
            )

    def on_refused(self, error: ProtocolError) -> None:
        """Log a refused message, and end its sessions with the error."""
        self._supervisor.refused(GATEWAY, str(error))
        if isinstance(error, RefusedMessage):
            for row in error.rows:
                self._gateway.on_lost(row, error)

    async def _failure(self) -> None:
        await self._supervisor.failed.wait()
        failure = self._supervisor.supervision.failure
        assert failure is not None
        self._gateway.on_failure(failure)
        self.flush()

    @property
    def counters(self) -> dict[str, dict[str, int]]:
        """Return what each process has counted, by `actor.replica`.

        Examples are rows that came late or were refused, second copies, and waits for credit.
        """
        own = {**self._gateway.exchange.counters, **self._own.wire.wire.counters}
        own |= self._requests.counters
        own |= {f"{name}_not_written": times for name, times in self.folder.lost.items()}
        return {**self._hosts.counters, f"{GATEWAY}.0": own}
