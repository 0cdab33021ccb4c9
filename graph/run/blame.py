"""Who waits for whom in a run that goes on, in words, and who is to blame. Decisions alone: what was seen comes in.

Who is stopped, silent, loading, or long in one step is to blame by itself. Who waits for credit, or for an input of a join,
waits for somebody; if that one waits for nobody, it is to blame: it keeps what it took, or has never sent it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ranvier.actors.host.situation import STUCK_S
from ranvier.actors.protocol.host_spec import GATEWAY

QUEUES_APART = 4
"""A replica with so many times as many messages in its queue as the least of its fellows has too much to do."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one host. `process` is the state in /proc: R, S, D, T, Z; empty where it is not known. `situation` is
    what it said (actors/host/situation.py), None if it did not answer; `before` what it had said a moment earlier."""

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
    """Where its step thread is, as seen from outside, if it did not answer."""

    @property
    def actor(self) -> str:
        return self.label.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class AtGateway:
    """What the gateway knows: open sessions, and those whose clients have not taken what is there; what it could not send, as a
    situation has it; whether the disk of the run's folder is full."""

    sessions: Sequence[int]
    untaken: Mapping[int, int] = field(default_factory=dict)
    lost: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Replicas that are gone and not replaced yet, and the sessions that wait for that."""
    credit: Sequence[Sequence[Any]] = ()
    disk_full: bool = False


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing in words. `waits_for` is another host's label; None: it is to blame by itself, for that `reason`."""

    who: str
    reason: str
    words: str
    waits_for: str | None = None
    stack: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """All facts, those to blame first among them, and who waits for whom in a circle."""

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
    """Facts, and who is to blame.

    Args:
        feeds: which actors send to an input, by actor and port.
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
        guilty.append(Fact("client", "nobody asks", "no session is open: nobody has asked for anything"))
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
            Fact(GATEWAY, "disk full", "the disk of the run's folder is full: what is to be written there is lost")
        )
    for who, sessions in gateway.lost.items():
        waiting = f"session{'s' if len(sessions) > 1 else ''} {', '.join(map(str, sessions[:8]))}"
        made.append(Fact(who, "lost", f"it was lost, and {waiting} waits for the one in its place"))
    for session, count in gateway.untaken.items():
        made.append(
            Fact(
                "client",
                "client",
                f"the client of session {session} does not take what is there for it ({count} answers)",
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
                f"{' or '.join(labels) or GATEWAY}; it has {', '.join(present)}",
                labels[0] if labels else GATEWAY,
            ))  # fmt: skip
    return made


def _no_credit(label: str, edge: str, target: str, messages: int, since_s: float) -> Fact:
    return Fact(
        label, "no credit", f"{label} has waited {since_s:.1f} s for credit of {target} ({edge}: {messages} messages)", target
    )  # fmt: skip


def _passive(host: Seen | None, label: str, fact: Fact) -> Fact:
    """Somebody who waits for nobody is waited for."""
    now, before = (host.situation or {}, host.before or {}) if host is not None else ({}, {})
    steps = now.get("steps", 0) - before.get("steps", now.get("steps", 0))
    if steps or now.get("queued", 0):
        return Fact(
            label, "slow", f"it is at work, and {fact.who} waits for it: {steps} steps between two looks, {now['queued']} "
            "messages in its queue",
        )  # fmt: skip
    if fact.reason == "join":
        return Fact(label, "sent nothing", f"it has sent nothing of what {fact.who} waits for, and waits for nobody")
    return Fact(label, "gives no credit", f"it gives {fact.who} no credit, and waits for nobody: it keeps what it took")


def _on_the_way(hosts: Sequence[Seen], known: set[str]) -> list[Fact]:
    """Messages that do not arrive at who has nothing to do. Of hosts that are not stuck: who is reads no acknowledgements."""
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
                    f"{messages} messages ({nbytes} bytes) of {host.label} are on their way to {target}, which is idle"
                )
                made.append(Fact(edge, "on the way", words))
    return made


def _cycles(waiting: Sequence[Fact]) -> list[list[str]]:
    """Circles of waiting, each once, from its first in the order of names."""
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
