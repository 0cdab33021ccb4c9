"""Decide who waits for whom in a live run, and who is to blame, from observations alone (no I/O).

A host that is stopped, silent, loading, or long in one step is to blame by itself. A host that waits for credit, or for
an input of a join, waits for another host. If that host waits for nobody, it is to blame: it keeps the messages that it
received, or has not sent the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ranvier.actors.errors import counted
from ranvier.actors.host.situation import STUCK_S
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.transport.format.host_id import replica_id

QUEUES_APART = 4
"""A replica is overloaded if at least `QUEUES_APART * (n + 1)` messages are in its queue.

n is the length of the shortest queue among the actor's other replicas.
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """Hold what was observed of one host.

    `process` is the process state in /proc: R, S, D, T or Z; it is empty if unknown. `situation` is the host's own
    report (actors/host/situation.py); it is None if the host did not answer. `before` is the host's report from a
    moment earlier.
    """

    label: str
    pid: int | None
    process: str
    state: str
    loaded: float
    since_start_s: float
    silent_s: float
    lost: str | None
    situation: Mapping[str, Any] | None
    before: Mapping[str, Any] | None = None
    outside: Sequence[str] = ()
    """Lines that its step thread executes, as seen from outside, if the host did not answer."""

    @property
    def actor(self) -> str:
        return replica_id(self.label).actor


@dataclass(frozen=True, slots=True)
class AtGateway:
    """Hold what the gateway knows.

    `sessions` are the open sessions. `untaken` counts the answers that a client has not taken yet, by session. `credit`
    lists the messages that wait for credit, as in a host's report (`situation.credit`). `disk_full` tells whether the
    disk of the run's folder is full.
    """

    sessions: Sequence[int]
    untaken: Mapping[int, int] = field(default_factory=dict)
    lost: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The sessions that wait for a replacement, by the label of the lost replica."""
    credit: Sequence[Sequence[Any]] = ()
    disk_full: bool = False


@dataclass(frozen=True, slots=True)
class Fact:
    """State one finding in words.

    `who` is a host, an edge, the gateway or a client. `waits_for` is the label of the host that `who` waits for. It is
    None if `who` waits for nobody: then `who` is to blame for that `reason`, or idle.
    """

    who: str
    reason: str
    words: str
    waits_for: str | None = None
    stack: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold all facts: `culprits` are to blame, `waiting` are waiting or idle, `cycles` are circles of waiting."""

    culprits: Sequence[Fact]
    waiting: Sequence[Fact]
    cycles: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [f"because of {fact.who}: {fact.words}" for fact in self.culprits]
        for fact in self.culprits:
            lines += [f"    {line}" for line in fact.stack]
        lines += [f"a circle: {' waits for '.join(cycle)}" for cycle in self.cycles]
        lines += [fact.words for fact in self.waiting]
        return "\n".join(lines) or "nobody waits for anybody: every actor is at work"

    def to_plain(self) -> dict[str, Any]:
        return {
            "culprits": [{"who": f.who, "reason": f.reason, "words": f.words, "stack": list(f.stack)} for f in self.culprits],
            "waiting": [{"who": f.who, "for": f.waits_for, "reason": f.reason, "words": f.words} for f in self.waiting],
            "cycles": [list(cycle) for cycle in self.cycles],
        }  # fmt: skip


def explain(hosts: Sequence[Seen], gateway: AtGateway, feeds: Mapping[tuple[str, str], Sequence[str]]) -> Answer:
    """Find who waits for whom, and who is to blame.

    Args:
        hosts: what was observed of each host.
        gateway: what the gateway knows.
        feeds: the actors that send to an input, by actor and port.
    """
    guilty = [fact for host in hosts for fact in _by_itself(host)] + _overloaded(hosts) + _of_gateway(gateway)
    stuck = {fact.who for fact in guilty}
    blamed = set(stuck)
    waiting = [fact for host in hosts if host.label not in blamed for fact in _for_others(host, hosts, feeds)]
    waiting += [_no_credit(GATEWAY, *each) for each in gateway.credit]
    waits = {fact.who for fact in waiting}
    for fact in waiting:
        other = fact.waits_for
        if other is not None and other not in blamed | waits:
            blamed.add(other)
            guilty.append(_passive(next((host for host in hosts if host.label == other), None), other, fact))
    guilty += _on_the_way([host for host in hosts if host.label not in stuck], blamed | waits)
    if not guilty and not waiting and not gateway.sessions:
        guilty.append(Fact("client", "nobody asks", "no session is open: no client has sent a request"))
    rest = [
        Fact(host.label, "idle", f"{host.label} has had nothing to do for {host.situation['idle_s']:.1f} s")
        for host in hosts
        if host.label not in blamed | waits and host.situation and host.situation.get("idle_s", 0.0) > STUCK_S
    ]
    return Answer(guilty, waiting + rest, _cycles(waiting))


def _by_itself(host: Seen) -> list[Fact]:
    label, pid = host.label, f"pid {host.pid}"

    def fact(reason: str, words: str, stack: Sequence[str] = ()) -> list[Fact]:
        return [Fact(label, reason, words, stack=stack)]

    if host.lost is not None:
        return fact("lost", f"it was lost ({host.lost}), and is replaced")
    if host.process == "T":
        return fact("stopped", f"it is stopped ({pid}), silent for {host.silent_s:.1f} s; send it SIGCONT, or kill it")
    if host.state in ("starting", "loading"):
        stack = host.situation["stack"] if host.situation and host.situation.get("stack") else ()
        return fact(
            "loading", f"it is {host.state}, {host.loaded:.0%} loaded after {host.since_start_s:.1f} s ({pid})", stack
        )
    if host.situation is None:
        if host.process == "D":
            return fact("disk", f"it waits for the disk ({pid}), silent for {host.silent_s:.1f} s")
        return fact(
            "silent", f"it does not answer ({pid}), silent for {host.silent_s:.1f} s: a call that does not return holds its "
            "interpreter", host.outside,
        )  # fmt: skip
    stepping_s = host.situation.get("stepping_s", 0.0)
    if stepping_s > STUCK_S:
        return fact("in a step", f"it has been in one step for {stepping_s:.1f} s ({pid})", host.situation["stack"])
    return []


def _overloaded(hosts: Sequence[Seen]) -> list[Fact]:
    made = []
    for host in hosts:
        others = [o.situation["queued"] for o in hosts if o.actor == host.actor and o is not host and o.situation]
        if not host.situation or not others:
            continue
        own, least = host.situation["queued"], min(others)
        if own >= QUEUES_APART * (least + 1):
            made.append(
                Fact(host.label, "overloaded", f"{own} messages wait in its queue, {least} in that of another replica")
            )
    return made


def _of_gateway(gateway: AtGateway) -> list[Fact]:
    made = []
    if gateway.disk_full:
        made.append(
            Fact(GATEWAY, "disk full", "the disk of the run's folder is full: data that is written there now is lost")
        )
    for who, sessions in gateway.lost.items():
        waiting = (
            f"session{'s' if len(sessions) > 1 else ''} {', '.join(map(str, sessions[:8]))}"
            f"{f' and {len(sessions) - 8} more' if len(sessions) > 8 else ''} "
            f"wait{'s' if len(sessions) == 1 else ''}"
        )
        made.append(Fact(who, "lost", f"it was lost, and {waiting} for its replacement"))
    for session, count in gateway.untaken.items():
        made.append(
            Fact(
                "client",
                "client",
                f"the client of session {session} does not take its answers ({count} waiting)",
            )
        )
    return made


def _for_others(host: Seen, hosts: Sequence[Seen], feeds: Mapping[tuple[str, str], Sequence[str]]) -> list[Fact]:
    situation, label = host.situation or {}, host.label
    made = [_no_credit(label, *each) for each in situation.get("credit", ())]
    for session, position, present, missing, since_s in situation.get("joins", ())[:1]:
        if since_s < STUCK_S:
            continue
        for port in missing:
            labels = [other.label for other in hosts if other.actor in feeds.get((host.actor, port), ())]
            made.append(Fact(
                label, "join",
                f"{label} has waited {since_s:.1f} s for {port} of session {session}, position {position}, from "
                f"{' or '.join(labels) or GATEWAY}; it has received {', '.join(present)}",
                labels[0] if labels else GATEWAY,
            ))  # fmt: skip
    return made


def _no_credit(label: str, edge: str, target: str, messages: int, since_s: float) -> Fact:
    return Fact(
        label, "no credit", f"{label} has waited {since_s:.1f} s for credit of {target} ({edge}: "
        f"{counted(messages, 'message')})", target,
    )  # fmt: skip


def _passive(host: Seen | None, label: str, fact: Fact) -> Fact:
    """Blame a host that another host waits for, although it waits for nobody itself."""
    now, before = (host.situation or {}, host.before or {}) if host is not None else ({}, {})
    steps = now.get("steps", 0) - before.get("steps", now.get("steps", 0))
    if steps or now.get("queued", 0):
        return Fact(
            label, "slow", f"it is at work, and {fact.who} waits for it: {counted(steps, 'step')} between "
            f"two reports, {counted(now['queued'], 'message')} in its queue",
        )  # fmt: skip
    if fact.reason == "join":
        return Fact(label, "sent nothing", f"it has not sent the input that {fact.who} waits for, and waits for nobody")
    return Fact(
        label, "gives no credit",
        f"it gives {fact.who} no credit, and waits for nobody: it keeps the messages that it received",
    )  # fmt: skip


def _on_the_way(hosts: Sequence[Seen], known: set[str]) -> list[Fact]:
    """Find messages on the way to a host that is idle.

    `hosts` are those that are not stuck: a stuck host does not read acknowledgements, so its report proves nothing.
    """
    idle = {
        host.label for host in hosts
        if host.label not in known and host.situation and host.situation.get("idle_s", 0.0) > STUCK_S
    }  # fmt: skip
    made = []
    for host in hosts:
        earlier = {tuple(each[:2]) for each in (host.before or {}).get("unread", ())}
        for edge, target, messages, nbytes in (host.situation or {}).get("unread", ()):
            if target in idle and (edge, target) in earlier:
                words = (
                    f"{counted(messages, 'message')} ({nbytes} bytes) "
                    f"{'are' if messages != 1 else 'is'} on the way from {host.label} to {target}, which is idle"
                )
                made.append(Fact(edge, "on the way", words))
    return made


def _cycles(waiting: Sequence[Fact]) -> list[list[str]]:
    """Find circles of waiting, each once, beginning with the name that sorts first."""
    follows: dict[str, list[str]] = {}
    for fact in waiting:
        if fact.waits_for is not None:
            follows.setdefault(fact.who, []).append(fact.waits_for)
    found: set[tuple[str, ...]] = set()

    def go(path: list[str]) -> None:
        for other in follows.get(path[-1], ()):
            if other in path:
                circle = path[path.index(other) :]
                first = circle.index(min(circle))
                found.add((*circle[first:], *circle[:first]))
            elif other in follows:
                go([*path, other])

    for who in follows:
        go([who])
    return [[*circle, circle[0]] for circle in sorted(found)]
