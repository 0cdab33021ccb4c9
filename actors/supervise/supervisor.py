"""Start hosts, receive their messages, check their deadlines, and stop or kill them. This module runs in trio.

The decisions are in supervision.py. The supervisor owns the control socket of the run folder. It knows hosts by their
identity, so that a lost host is not confused with its replacement. Callers use labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from ranvier.transport.format.errors import ProtocolError
from ranvier.transport.wires.trio_wire import TrioWire
from ranvier.transport.wires.zeromq import ZeroWire

from ..errors import ActorFailed
from ..protocol.clocks import Clock
from ..protocol.control_protocol import (
    MAX_BYTES,
    Alarm,
    Answer,
    AskTime,
    Command,
    Connect,
    Counters,
    Failed,
    Heartbeat,
    HostMessage,
    Linked,
    Ready,
    Refused,
    Request,
    Saved,
    SessionFailed,
    Situation,
    StateChanged,
    Stop,
    Time,
    decode,
    encode,
    for_supervisor,
)
from ..protocol.host_spec import SUPERVISOR, HostLink, HostSpec
from ..protocol.lifecycle import State
from ..protocol.refusals import Refusals, with_left_out
from ..protocol.step_board import inside
from ..protocol.training_spec import TrainingLink
from .launcher import Launcher
from .questions import Questions
from .supervision import Supervision, Watched, by_process

if TYPE_CHECKING:
    import structlog

TICK_S = 0.1
NEVER_STARTED = 127
"""Exit code of a host whose process was never started, as in shells."""
OnSessionFailed = Callable[[str, SessionFailed], None]
"""Called with the label of the host, and its message."""
OnRequest = Callable[[str, Any], None]
"""Called with the name of a client, and its request."""


class Supervisor:
    """Supervise all hosts of one run.

    `failed` is set when the run fails; `supervision.failure` is the reason. `on_request` holds a handler for each kind
    of request from clients of the control socket. A handler is called with the client's name and the request.
    """

    def __init__(
        self,
        specs: Sequence[HostSpec],
        launcher: Launcher,
        control: str,
        logs: Path,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._launcher = launcher
        self._logs = logs
        self._log = log
        self.on_session_failed: OnSessionFailed = lambda _label, _failed: None
        self.supervision = Supervision(specs, time.monotonic())
        self.failed = trio.Event()
        self._changed = trio.Event()
        self._linked: set[tuple[str, str]] = set()
        self.detour: Callable[[str, str, str], str] = lambda _source, _target, address: address
        """A function of source, target and the target's address. It returns the address that the source connects to."""
        self.on_forgotten: Callable[[str], None] = lambda _peer: None
        """A function that is called with the identity of a host that the run forgets."""
        self.on_saved: Callable[[str, int], None] = lambda _label, _round: None
        """A function that is called when a training host has saved its shard, with its label and the rounds done."""
        self.clocks: dict[str, Clock] = {}
        """The clock of each host relative to that of this process, by identity."""
        self.on_clock: Callable[[], None] = lambda: None
        """A function that is called when the estimate of a host's clock has improved."""
        self.on_request: dict[type[Request], OnRequest] = {}
        self.alarms: list[dict[str, Any]] = []
        """Edges that carried NaN or infinity, the earliest first."""
        self._refusals = Refusals()
        self.refusals = 0
        """Number of messages and commands refused so far, logged or only counted."""
        self._questions = Questions(self.send)
        self._wire = TrioWire(ZeroWire(SUPERVISOR, control, max_frame_bytes=MAX_BYTES))
        for spec in specs:
            self._wire.connect(spec.identity, spec.control)

    @property
    def pids(self) -> Mapping[str, int]:
        return self._launcher.pids

    async def run(self) -> None:
        """Start the hosts, and watch them until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            nursery.start_soon(self._reap)
            nursery.start_soon(self._watch)
            for specs in by_process(host.spec for host in self.supervision.hosts.values()):
                await self._start(specs)

    async def _start(self, specs: Sequence[HostSpec]) -> None:
        try:
            await self._launcher.start(specs)
        except ActorFailed:
            for spec in specs:
                self.supervision.hosts[spec.identity].exited = NEVER_STARTED
            raise
        for spec in specs:
            self._log.info("starting", actor=spec.label)

    async def until_loaded(self, progress: Callable[[float], None]) -> None:
        """Wait until every host has loaded its weights and opened its inbox.

        Raises:
            ActorFailed: a host failed.
        """
        await self._until(lambda: self.supervision.all_loaded, progress)

    async def until_running(self, gateway: str, gateway_address: str) -> None:
        """Send every host the addresses of its neighbours, and wait until all links are open.

        Raises:
            ActorFailed: a host failed.
        """
        for host in self.supervision.hosts.values():
            self.connect(host.spec, host.spec.all_links, gateway, gateway_address)
        await self._until(lambda: self.supervision.all_running, lambda _: None)
        self.supervision.begun = True

    def connect(
        self,
        spec: HostSpec,
        links: Sequence[HostLink | TrainingLink],
        gateway: str,
        gateway_address: str,
        instead_of: str | None = None,
    ) -> None:
        """Send a host its links and its neighbours' addresses. `instead_of` is the label of the host it replaces."""
        own = spec.identity
        listening = self.supervision.neighbours(links, gateway, gateway_address)
        peers = {peer: self.detour(own, peer, address) for peer, address in listening.items()}
        serving = tuple(link for link in links if isinstance(link, HostLink))
        training = tuple(link for link in links if isinstance(link, TrainingLink))
        self.send([own], Connect(peers, serving, training, instead_of))

    # -- during the run -----------------------------------------------------------------------------------------

    async def join(self, *specs: HostSpec, spare: bool = False) -> None:
        """Start one more host, or several that share a process, and wait until they have loaded.

        Raises:
            ActorFailed: a host, or the run, failed.
        """
        for spec in specs:
            self._wire.connect(spec.identity, spec.control)
            self.supervision.add(spec, time.monotonic(), joining=True, spare=spare)
        await self._start(specs)
        for spec in specs:
            await self._until_loaded(self.supervision.hosts[spec.identity])

    async def _until_loaded(self, host: Watched) -> None:
        await self._until_it(host, lambda: host.address is not None)

    async def until_linked(self, hosts: Sequence[str], peer: str) -> None:
        """Wait until each of these hosts has reported its link with `peer`, or is lost.

        Raises:
            ActorFailed: `peer`, or the run, failed.
        """
        await self._until_it(
            self.supervision.hosts[peer],
            lambda: all((host, peer) in self._linked or self.supervision.is_lost(host) for host in hosts),
        )
        self._linked = {(host, other) for host, other in self._linked if other != peer}

    async def until_joined(self, spec: HostSpec) -> None:
        """Wait until a host that was started during the run has all its links open. From then on it belongs to the run.

        Raises:
            ActorFailed: the host, or the run, failed.
        """
        host = self.supervision.hosts[spec.identity]
        await self._until_it(host, lambda: host.life.state is State.RUNNING)
        host.joining = False

    async def next_lost(self, known: Container[str]) -> Watched:
        """Wait for a lost host whose identity is not in `known`, and return it.

        Joining hosts are left out, because whoever started them handles their loss. So are leaving hosts.
        """
        while True:
            for key, host in self.supervision.hosts.items():
                if host.lost is not None and not host.joining and not host.leaving and key not in known:
                    return host
            await self._changed.wait()

    def take(self, specs: Iterable[HostSpec]) -> None:
        """Give the hosts of a spare process their part in the run. Their start deadline begins now."""
        for spec in specs:
            host = self.supervision.hosts[spec.identity]
            host.spare, host.started_s = False, time.monotonic()
        self._notify()

    async def until_taken(self, specs: Sequence[HostSpec]) -> None:
        """Wait until the hosts of a spare process are given their part in the run (see `take`).

        Raises:
            ActorFailed: a spare, or the run, failed before.
        """
        host = self.supervision.hosts[specs[0].identity]
        await self._until_it(host, lambda: not host.spare)

    def restart(self, failed: ActorFailed, spec: HostSpec) -> float | None:
        """Return the delay of a restart in seconds, or None. See `Supervision.restart`."""
        delay_s = self.supervision.restart(failed, spec, time.monotonic())
        self._notify()
        return delay_s

    async def leave(self, *specs: HostSpec) -> None:
        """Stop a host, or all that share a process, kill them if they exceed their stop deadline, and forget them.

        A lost host is killed at once.
        """
        hosts = [self.supervision.hosts[spec.identity] for spec in specs if spec.identity in self.supervision.hosts]
        for host in hosts:
            host.leaving = True
        if all(host.exited is None and host.lost is None for host in hosts):
            self.send([host.spec.identity for host in hosts], Stop())
            with trio.move_on_after(specs[0].supervision.stop_deadline_s):
                await self._until_exited(hosts)
        for host in hosts:
            if host.exited is None:
                await self._launcher.kill(host.spec.identity)
        await self._until_exited(hosts)
        for host in hosts:
            self.supervision.remove(host.spec.identity)
            self._wire.disconnect(host.spec.identity)

    async def _until_exited(self, hosts: Sequence[Watched]) -> None:
        while any(host.exited is None for host in hosts):
            await self._changed.wait()

    async def _until_it(self, host: Watched, holds: Callable[[], bool]) -> None:
        while not holds():
            lost = host.lost or self.supervision.failure
            if lost is not None:
                raise lost
            await self._changed.wait()

    async def _until(self, holds: Callable[[], bool], progress: Callable[[float], None]) -> None:
        while True:
            if self.supervision.failure is not None:
                raise self.supervision.failure
            progress(self.supervision.loaded)
            if holds():
                return
            await self._changed.wait()

    def send(self, keys: Iterable[str], command: Command) -> None:
        """Send a command to hosts by their identities. Hosts that are gone are left out."""
        command.sent_ns = time.monotonic_ns()
        data = encode(command)
        for key in keys:
            if key in self.supervision.hosts:
                self._wire.send(key, data)

    def send_to(self, labels: Iterable[str], command: Command) -> None:
        """Send a command to hosts by their labels. Hosts that are gone are left out."""
        hosts = [self.supervision.host(label) for label in labels]
        self.send([host.spec.identity for host in hosts if host is not None], command)

    async def situations(self, within_s: float) -> Mapping[str, Mapping[str, Any] | None]:
        """Ask each host why it waits (questions.py). Return the answers by identity."""
        asked = [key for key, host in self.supervision.hosts.items() if host.exited is None]
        return await self._questions.ask(asked, within_s)

    def answer(self, client: str, answer: Answer) -> None:
        """Answer a client's request. The answer to a client that has gone is dropped."""
        self._wire.send(client, encode(answer))

    async def stop(self) -> None:
        """Stop all hosts, and kill those that exceed the longest stop deadline."""
        self.supervision.stopping = True
        hosts = self.supervision.hosts.values()
        self.send([host.spec.identity for host in hosts], Stop())
        deadline_s = max((host.spec.supervision.stop_deadline_s for host in hosts), default=0.0)
        with trio.move_on_after(deadline_s):
            await self._until_exited(list(hosts))
        for key, host in list(self.supervision.hosts.items()):
            if host.exited is None:
                self._log.warning("killed", actor=host.spec.label, state=host.life.state.value)
                await self._launcher.kill(key)

    def close(self) -> None:
        self._wire.close()

    # -- tasks --------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            try:
                arrival = await self._wire.receive()
                message = decode(arrival.header, for_supervisor)
                if isinstance(message, Request):
                    self._on_request(arrival.peer, message)
                elif arrival.peer in self.supervision.hosts:
                    self._take(arrival.peer, message)
                else:
                    raise ProtocolError(
                        f"control: expected messages of this run's hosts, got {message.kind} from {arrival.peer!r}"
                    )
            except ProtocolError as error:
                self.refused(SUPERVISOR, str(error))

    def note(self, event: str, **fields: Any) -> None:
        """Write a warning to the run's log."""
        self._log.warning(event, **fields)

    def refused(self, by: str, what: str) -> None:
        """Log a refused message, or only count it if there are too many."""
        self.refusals += 1
        left_out = self._refusals.one_more(time.monotonic())
        if left_out is not None:
            self._log.warning("refused", actor=by, what=with_left_out(what, left_out))

    def _on_request(self, client: str, request: Request) -> None:
        on_request = self.on_request.get(type(request))
        if on_request is None:
            raise ProtocolError(
                f"control: expected a request that this run answers, got {request.kind} from {client!r}"
            )
        on_request(client, request)

    def _take(self, key: str, message: HostMessage) -> None:
        label = self.supervision.hosts[key].spec.label
        match message:
            case SessionFailed():
                self._log.error("session failed", actor=label, **_fields(message))
                self.on_session_failed(label, message)
            case Linked():
                self._linked.add((key, message.peer))
            case Alarm():
                alarm = {"actor": label, **_fields(message)}
                self._log.error("alarm", **alarm)
                self.alarms.append(alarm)
                self.alarms.sort(key=lambda alarm: alarm["at_ns"])
            case Situation():
                self._questions.on_answer(key, message)
            case Time():
                self._on_time(key, label, message)
            case Saved():
                self.on_saved(label, message.round)
            case Refused():
                self.refused(label, message.what)
            case _:
                self._on_life(key, label, message)
        self._notify()

    def _on_time(self, key: str, label: str, message: Time) -> None:
        clock = self.clocks.get(key)
        if clock is None:
            raise ProtocolError(f"control time of {label}: expected no answer before a question, got one")
        if clock.on_answer(message.asked_ns, message.heard_ns, message.answered_ns, time.monotonic_ns()):
            self.on_clock()

    def _on_life(self, key: str, label: str, message: HostMessage) -> None:
        """Process a message of a host about itself. From time to time, ask for its clock."""
        self.supervision.on_message(key, message, time.monotonic())
        if isinstance(message, StateChanged | Ready | Heartbeat) and self.clocks.setdefault(key, Clock()).asks():
            self.send([key], AskTime())
        if isinstance(message, StateChanged | Ready | Failed | Counters):
            self._log.info(message.kind, actor=label, **_fields(message))

    async def _reap(self) -> None:
        while True:
            keys, code, because = await self._launcher.wait()
            hosts = [self.supervision.hosts[key] for key in keys if key in self.supervision.hosts]
            if not hosts:
                continue
            if code >= 0:
                await self._last_words(hosts)
            # first the one to blame: the others are lost because of it
            hosts.sort(key=lambda host: (not host.life.over, not inside(Path(host.spec.board))))
            for host in hosts:
                self._log.info("exited", actor=host.spec.label, code=code)
                tail = self._stderr_tail(host.spec.log_name)
                self.supervision.on_exit(host.spec.identity, code, tail, time.monotonic(), because)
            self._notify()

    async def _last_words(self, hosts: Sequence[Watched]) -> None:
        """Wait at most 0.2 s for the report that a failing host sends before its process ends."""
        with trio.move_on_after(0.2):
            while not any(host.life.over for host in hosts) and not self.supervision.stopping:
                await self._changed.wait()

    def _stderr_tail(self, name: str) -> str:
        try:
            return (self._logs / f"{name}.err").read_text(errors="replace")[-4000:]
        except OSError:
            return ""

    async def _watch(self) -> None:
        while True:
            await trio.sleep(TICK_S)
            self.supervision.on_tick(time.monotonic())
            left_out = self._refusals.overdue(time.monotonic())
            if left_out:
                self._log.warning("refused", actor=SUPERVISOR, what=f"{left_out} more, left out")
            if self.supervision.failure is not None or any(h.lost for h in self.supervision.hosts.values()):
                self._notify()

    def _notify(self) -> None:
        if self.supervision.failure is not None and not self.failed.is_set():
            self._log.error("run failed", actor=self.supervision.failure.actor, error=str(self.supervision.failure))
            self.failed.set()
        self._changed.set()
        self._changed = trio.Event()


def _fields(message: HostMessage) -> dict[str, Any]:
    """Return the fields of a message for the log, without its kind."""
    return msgspec.structs.asdict(message)
