"""Replace hosts that are lost while the run continues. Actors that share a process are lost and replaced together.

A lost host is fenced at once: it is killed, whatever its state, and all peers forget it. Messages that it still sends
are refused. The other hosts close or hold its sessions. If another replica has room for a session, the session starts
there again in a new epoch, from the gateway's log. Otherwise it waits for a spare, which already has its weights, or
for a restart of the same replica. An actor that is lost too often ends the run (`Restarts`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from ranvier.actors.errors import ActorFailed
from ranvier.actors.protocol.host_spec import HostSpec
from ranvier.actors.protocol.step_board import inside
from ranvier.actors.supervise.supervision import Watched
from ranvier.actors.supervise.supervisor import Supervisor

from ..plan.plan import Plan
from ..sessions.gateway import Gateway
from .members import Members


@dataclass(frozen=True, slots=True)
class Recovered:
    """Describe the recovery of one lost host.

    `actor` is the label of the lost host, `why` its failure, `by` the label of its replacement. The times are in
    seconds: `fence_s` from the failure until the host was fenced, then `load_s` until the replacement had loaded, then
    `link_s` until it had its links.
    """

    actor: str
    why: str
    by: str
    fence_s: float
    load_s: float
    link_s: float

    @property
    def seconds(self) -> float:
        return self.fence_s + self.load_s + self.link_s


class Recovery:
    """Recover the lost hosts of one run. `done` lists the recoveries."""

    def __init__(self, plan: Plan, supervisor: Supervisor, gateway: Gateway, members: Members) -> None:
        self.done: list[Recovered] = []
        self._supervisor = supervisor
        self._gateway = gateway
        self._members = members
        self._plan = plan
        self._spares: dict[tuple[str, ...], deque[list[HostSpec]]] = {each: deque() for each in plan.shared}
        """The spare processes, by the actors that each runs."""
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Replace lost hosts until `stop`."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for actors in self._plan.shared:
                    for _ in range(self._plan.graph.actors[actors[0]].section.spares):
                        nursery.start_soon(self._keep_spare, actors)
                known: set[str] = set()
                while True:
                    host = await self._supervisor.next_lost(known)
                    hosts = [host, *self._supervisor.supervision.sharing(host)]
                    known.update(each.spec.identity for each in hosts)
                    nursery.start_soon(self._replace, hosts, nursery)

    def stop(self) -> None:
        """Stop replacing hosts."""
        self._scope.cancel()

    async def _keep_spare(self, actors: tuple[str, ...]) -> None:
        """Keep one warm spare loaded, as long as the restart budget of its actors allows."""
        while True:
            specs = [self._members.another(actor) for actor in actors]
            try:
                await self._supervisor.join(*specs, spare=True)
                self._spares[actors].append(specs)
                await self._supervisor.until_taken(specs)
            except ActorFailed as error:
                if specs in self._spares[actors]:
                    self._spares[actors].remove(specs)
                await self._supervisor.leave(*specs)
                delay_s = self._supervisor.restart(error, specs[0])
                if delay_s is None:
                    return
                await trio.sleep(delay_s)

    async def _replace(self, hosts: list[Watched], nursery: trio.Nursery) -> None:
        """Replace a lost host, or all of a lost process. Try again as often as the restart budget allows.

        Only the host that is to blame counts against its budget.
        """
        hosts = sorted(hosts, key=lambda host: bool(host.because))
        first = hosts[0]
        assert first.lost is not None
        delay_s = self._supervisor.restart(first.lost, first.spec)
        if delay_s is None:
            return
        lost, newest = [host.spec for host in hosts], [host.spec for host in hosts]
        self._fence(hosts)
        nursery.start_soon(self._supervisor.leave, *lost)
        fenced_s = time.monotonic()
        spares = next(kept for actors, kept in self._spares.items() if lost[0].actor in actors)
        while True:
            try:
                if spares:
                    of_actor = {spec.actor: spec for spec in spares.popleft()}
                    specs = [of_actor[spec.actor] for spec in lost]
                    self._supervisor.take(specs)
                else:
                    await trio.sleep(delay_s)
                    newest = specs = [self._members.again(spec) for spec in newest]
                    await self._supervisor.join(*specs)
                loaded_s = time.monotonic()
                for spec, old in zip(specs, lost, strict=True):
                    await self._members.enter(spec, old.label)
                break
            except ActorFailed as error:
                for spec in specs:
                    self._members.forget(spec)
                await self._supervisor.leave(*specs)
                delay_s = self._supervisor.restart(error, specs[0])
                if delay_s is None:
                    return
        for old, spec in zip(lost, specs, strict=True):
            self._gateway.on_replaced(old.actor, old.replica, spec.replica)
        self._members.flush()
        times = fenced_s - first.lost_s, loaded_s - fenced_s, time.monotonic() - loaded_s
        for host, spec in zip(hosts, specs, strict=True):
            recovered = Recovered(host.spec.label, _why(host), spec.label, *times)
            self.done.append(recovered)
            self._supervisor.note("replaced", **asdict(recovered))

    def _fence(self, hosts: Sequence[Watched]) -> None:
        """Have everybody forget lost hosts, and end or hold their sessions."""
        for host in hosts:
            assert host.lost is not None
            # if the host was lost because of another loss, none of its sessions is to blame
            blamed = frozenset[int]() if host.because else inside(Path(host.spec.board))
            self._gateway.on_lost_replica(host.spec.actor, host.spec.replica, host.lost, blamed)
            self._members.forget(host.spec)
        self._members.flush()
        for host in hosts:
            self._supervisor.note("lost", actor=host.spec.label, what=_why(host))


def _why(host: Watched) -> str:
    assert host.lost is not None
    return host.lost.what
