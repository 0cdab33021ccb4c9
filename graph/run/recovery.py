"""Replace hosts that are lost while the run continues.

A lost host is fenced at once: it is killed, whatever its state, and all peers forget it. Messages that it still sends
are refused. The other hosts close or hold its sessions. If another replica has room for a session, the session starts
there again in a new epoch, from the gateway's log. Otherwise it waits for a spare, which already has its weights, or
for a restart of the same replica. An actor that is lost too often ends the run (`Restarts`).
"""

from __future__ import annotations

import time
from collections import deque
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
        self._wanted = {name: actor.section.spares for name, actor in plan.graph.actors.items()}
        self._spares: dict[str, deque[HostSpec]] = {name: deque() for name in self._wanted}
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Replace lost hosts until `stop`."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for actor, wanted in self._wanted.items():
                    for _ in range(wanted):
                        nursery.start_soon(self._keep_spare, actor)
                known: set[str] = set()
                while True:
                    host = await self._supervisor.next_lost(known)
                    known.add(host.spec.identity)
                    nursery.start_soon(self._replace, host, nursery)

    def stop(self) -> None:
        """Stop replacing hosts."""
        self._scope.cancel()

    async def _keep_spare(self, actor: str) -> None:
        """Keep one warm spare loaded, as long as the restart budget of its actor allows."""
        while True:
            spec = self._members.another(actor)
            try:
                await self._supervisor.join(spec, spare=True)
                self._spares[actor].append(spec)
                await self._supervisor.until_taken(spec)
            except ActorFailed as error:
                if spec in self._spares[actor]:
                    self._spares[actor].remove(spec)
                await self._supervisor.leave(spec)
                delay_s = self._supervisor.restart(error, spec)
                if delay_s is None:
                    return
                await trio.sleep(delay_s)

    async def _replace(self, host: Watched, nursery: trio.Nursery) -> None:
        """Replace a lost host. Try again as often as the restart budget of its actor allows."""
        lost, failure, lost_s = host.spec, host.lost, host.lost_s
        assert failure is not None
        what = failure.what
        delay_s = self._supervisor.restart(failure, lost)
        if delay_s is None:
            return
        # if the host was lost because of another loss, none of its sessions is to blame
        blamed = frozenset[int]() if host.because else inside(Path(lost.board))
        self._gateway.on_lost_replica(lost.actor, lost.replica, failure, blamed)
        self._members.forget(lost)
        self._members.flush()
        nursery.start_soon(self._supervisor.leave, lost)
        self._supervisor.note("lost", actor=lost.label, what=what)
        fenced_s, newest = time.monotonic(), lost
        while True:
            try:
                if self._spares[lost.actor]:
                    spec = self._spares[lost.actor].popleft()
                    self._supervisor.take(spec)
                else:
                    await trio.sleep(delay_s)
                    newest = spec = self._members.again(newest)
                    await self._supervisor.join(spec)
                loaded_s = time.monotonic()
                await self._members.enter(spec, lost.label)
                break
            except ActorFailed as error:
                self._members.forget(spec)
                await self._supervisor.leave(spec)
                delay_s = self._supervisor.restart(error, spec)
                if delay_s is None:
                    return
        self._gateway.on_replaced(lost.actor, lost.replica, spec.replica)
        self._members.flush()
        times = fenced_s - lost_s, loaded_s - fenced_s, time.monotonic() - loaded_s
        recovered = Recovered(lost.label, what, spec.label, *times)
        self.done.append(recovered)
        self._supervisor.note("replaced", **asdict(recovered))
