"""Decide, without I/O, which hosts are ready, late or dead, and what that means for the run.

Each event comes with its time. A host that fails before the run has begun ends the run: `failure` holds the error. A
host that fails later is `lost`, and its actor's restart policy decides whether it is restarted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ranvier.transport.format.errors import ProtocolError

from ..component.actor import REPLAYED
from ..errors import ActorFailed, Cause
from ..protocol.control_protocol import Counters, Failed, Heartbeat, HostMessage, Progress, Ready, StateChanged
from ..protocol.host_spec import HostLink, HostSpec
from ..protocol.lifecycle import IllegalTransition, Lifecycle, State
from ..protocol.training_spec import TrainingLink
from .restarts import Restarts

_PROGRESS = list(State)
LEAST_LATE_S = 0.25
"""A tick at most this many seconds after the one before is never late, however short the deadline is."""
LATE = 1 / 3
"""Share of a host's heartbeat deadline. If two ticks are further apart than that, the supervisor itself was blocked: by
Ctrl-Z, a debugger, or user code that blocks its loop."""


@dataclass(slots=True)
class Watched:
    """Hold what is known of one host. Times are seconds of the driver's clock."""

    spec: HostSpec
    life: Lifecycle
    started_s: float
    heard_s: float
    loaded: float = 0.0
    address: str | None = None
    capacity_tokens: int | None = None
    held_bytes: int = 0
    keeps: str = REPLAYED
    steps: int = 0
    stepping_s: float = 0.0
    queued: int = 0
    exited: int | None = None
    counters: Mapping[str, int] | None = None
    joining: bool = False
    """True for a host started during the run, until it runs. Whoever started it handles its failure."""
    spare: bool = False
    """True while a host has no part in the run yet, and no links."""
    leaving: bool = False
    lost: ActorFailed | None = None
    lost_s: float = 0.0
    because: str = ""
    """The other loss that caused this one; empty if there is none."""


def by_process(specs: Iterable[HostSpec]) -> list[list[HostSpec]]:
    """Return the hosts of each process."""
    found: dict[str, list[HostSpec]] = {}
    for spec in specs:
        found.setdefault(spec.process, []).append(spec)
    return list(found.values())


class Supervision:
    """Watch the hosts of one run."""

    def __init__(self, specs: Iterable[HostSpec], now_s: float) -> None:
        self.hosts: dict[str, Watched] = {}
        self._by_label: dict[str, Watched] = {}
        self._restarts: dict[str, Restarts] = {}
        self.begun = False
        """True once all hosts were running."""
        for spec in specs:
            self.add(spec, now_s)
        self.failure: ActorFailed | None = None
        self.stopping = False
        self._ticked_s = now_s

    def host(self, label: str) -> Watched | None:
        return self._by_label.get(label)

    # -- events -------------------------------------------------------------------------------------------------

    def on_message(self, key: str, message: HostMessage, now_s: float) -> None:
        """Process a control message of a host about itself.

        Raises:
            ProtocolError: the state does not exist, or cannot follow the current one.
        """
        host = self.hosts[key]
        host.heard_s = now_s
        match message:
            case StateChanged():
                try:
                    state = State(message.state)
                    if state is not host.life.state and not host.life.over:
                        host.life.to(state, message.why)
                except (ValueError, IllegalTransition) as error:
                    raise ProtocolError(f"control state of {host.spec.label}: {error}") from None
            case Progress():
                host.loaded = message.share
            case Ready():
                host.address, host.loaded = message.address, 1.0
                host.capacity_tokens, host.held_bytes = message.capacity_tokens, message.held_bytes
                host.keeps = message.keeps
            case Heartbeat():
                host.steps, host.stepping_s, host.queued = message.steps, message.stepping_s, message.queued
                host.counters = message.counters
            case Counters():
                host.counters = message.counters
            case Failed():
                self._fail(host, now_s, Cause.RAISED, message.error, message.traceback)

    def on_exit(self, key: str, code: int, stderr_tail: str, now_s: float, because: str = "") -> None:
        """Record the end of a host's process. A negative `code` is a signal. `because` is a loss that caused it."""
        host = self.hosts[key]
        host.exited = code
        if host.lost is None:
            host.because = because
        if self.stopping or host.leaving or host.life.state is State.STOPPED:
            return
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        why = f": {because}" if because else ""
        self._fail(host, now_s, Cause.DIED, f"its process {how} while {host.life.state.value}{why}", stderr_tail)

    def on_tick(self, now_s: float) -> None:
        """Fail the hosts that have exceeded a deadline.

        A late tick fails no host: the heartbeats of that time are still unread, so it extends the deadlines by that
        time.
        """
        stood_s, self._ticked_s = now_s - self._ticked_s, now_s
        # the host that is furthest behind fails first: a host that is ready and waits for it is not the cause
        for host in sorted(self.hosts.values(), key=lambda host: _PROGRESS.index(host.life.state)):
            limits = host.spec.supervision
            if host.exited is not None or self.stopping or host.leaving or host.lost is not None:
                continue
            if stood_s > max(LEAST_LATE_S, limits.heartbeat_deadline_s * LATE):
                host.heard_s, host.started_s = (min(now_s, at_s + stood_s) for at_s in (host.heard_s, host.started_s))
                continue
            silent_s, starting_s = now_s - host.heard_s, now_s - host.started_s
            waits = host.spare and host.life.state is State.READY
            if not waits and host.life.state in (State.STARTING, State.LOADING, State.READY):
                if starting_s > limits.start_deadline_s:
                    self._fail(
                        host, now_s, Cause.LATE,
                        f"not running {starting_s:.1f} s after its start (limit {limits.start_deadline_s} s), "
                        f"still {host.life.state.value}, {host.loaded:.0%} loaded",
                    )  # fmt: skip
            elif silent_s > limits.heartbeat_deadline_s:
                self._fail(
                    host, now_s, Cause.SILENT,
                    f"no heartbeat for {silent_s:.1f} s (limit {limits.heartbeat_deadline_s} s): hung or stopped",
                )  # fmt: skip
            elif host.stepping_s > limits.progress_deadline_s:
                self._fail(
                    host,
                    now_s,
                    Cause.LATE,
                    f"in one step for {host.stepping_s:.1f} s (limit {limits.progress_deadline_s} s): hung",
                )

    def _fail(self, host: Watched, now_s: float, cause: Cause, what: str, remote_traceback: str = "") -> None:
        if not host.life.over:
            host.life.to(State.FAILED, what)
        if self.stopping or host.lost is not None:
            return
        host.lost, host.lost_s = ActorFailed(host.spec.label, what, cause, remote_traceback=remote_traceback), now_s
        if not self.begun and not host.joining:
            self.failure = self.failure or host.lost
        for other in self.sharing(host):
            if other.lost is None and not other.leaving:
                other.because = f"{host.spec.label} in the same process was lost"
                self._fail(other, now_s, cause, f"{other.because}: {what}")

    def sharing(self, host: Watched) -> list[Watched]:
        """Return the other hosts that share the process of a host."""
        if host.spec.host is None:
            return []
        return [each for each in self.hosts.values() if each is not host and each.spec.process == host.spec.process]

    # -- during the run -------------------------------------------------------------------------------------------

    def add(self, spec: HostSpec, now_s: float, *, joining: bool = False, spare: bool = False) -> Watched:
        """Watch a host from its start."""
        host = Watched(spec, Lifecycle(spec.label), now_s, now_s, joining=joining, spare=spare)
        self.hosts[spec.identity] = self._by_label[spec.label] = host
        return host

    def remove(self, key: str) -> None:
        """Forget a host that has ended. Its label may belong to its replacement already."""
        host = self.hosts.pop(key, None)
        if host is not None and self._by_label.get(host.spec.label) is host:
            del self._by_label[host.spec.label]

    def restart(self, failed: ActorFailed, spec: HostSpec, now_s: float) -> float | None:
        """Return the seconds to wait before a lost host, or its lost replacement, is restarted.

        Returns None if it is not restarted: the run has failed, or its actor's budget is used up and the run now fails.
        A loss that was caused by another loss does not count against the budget.
        """
        if self.failure is not None:
            return None
        host = self.hosts.get(spec.identity)
        if host is not None and host.because and spec.restart.max:
            return 0.0
        restarts = self._restarts.setdefault(spec.actor, Restarts(spec.restart))
        delay_s = restarts.take(now_s)
        if delay_s is None:
            self.failure = failed.but(str(restarts)) if spec.restart.max else failed
        return delay_s

    def is_lost(self, key: str) -> bool:
        """Return whether a host is gone, lost or leaving. Nothing may wait for it then."""
        host = self.hosts.get(key)
        return host is None or host.lost is not None or host.leaving

    # -- questions ----------------------------------------------------------------------------------------------

    @property
    def all_loaded(self) -> bool:
        return all(host.address is not None for host in self.hosts.values())

    @property
    def all_running(self) -> bool:
        return all(host.life.state is State.RUNNING for host in self.hosts.values())

    @property
    def loaded(self) -> float:
        """Return the share of the weights that is loaded, the mean over all hosts, from 0 to 1."""
        return sum(host.loaded for host in self.hosts.values()) / max(1, len(self.hosts))

    @property
    def capacity_tokens(self) -> int | None:
        """Return how many positions one session may have: at each actor, it must fit at some replica. None: no limit."""
        limits: dict[str, int] = {}
        for host in self.hosts.values():
            if host.capacity_tokens is not None:
                limits[host.spec.actor] = max(limits.get(host.spec.actor, 0), host.capacity_tokens)
        return min(limits.values(), default=None)

    @property
    def counters(self) -> dict[str, Mapping[str, int]]:
        """Return the counters of each host, by its label."""
        return {host.spec.label: host.counters for host in self.hosts.values() if host.counters is not None}

    @property
    def quiet(self) -> bool:
        """Return whether every host was idle at its last heartbeat."""
        return not any(host.stepping_s or host.queued for host in self.hosts.values())

    @property
    def steps(self) -> int:
        """Return the steps of all hosts together, as of their last heartbeats."""
        return sum(host.steps for host in self.hosts.values())

    def neighbours(
        self, links: Iterable[HostLink | TrainingLink], gateway: str, gateway_address: str
    ) -> dict[str, str]:
        """Return the address of each peer that `links` lead to. All these peers must have loaded."""
        addresses = {gateway: gateway_address}
        for key, host in self.hosts.items():
            if host.address is not None:  # None while the host loads
                addresses[key] = host.address
        # a host with a link to itself is its own peer
        peers = {str(link.link.target if link.outgoing else link.link.source) for link in links}
        return {peer: addresses[peer] for peer in sorted(peers)}
