"""Replicas that join and leave while the run goes on.

Joining: the new host loads its weights; everyone it will speak with learns where it is; then it opens its links, and
sessions that begin later may be given to it. Leaving: no session is given to it any more; when its last one is over it
is told to stop, and everyone forgets it. A session stays with the replicas it began with.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import trio

from ranvier.actors.errors import ActorFailed
from ranvier.actors.spec import GATEWAY, HostSpec
from ranvier.actors.supervisor import Supervisor
from ranvier.transport.errors import RanvierError
from ranvier.transport.trio_wire import TrioWire

from .errors import RequestError
from .gateway import Gateway
from .plan import Plan
from .run_folder import RunFolder

MOST_REPLICAS = 64
T = TypeVar("T")


class _Leaving:
    """A replica that is to leave."""

    def __init__(self, actor: str, replica: int) -> None:
        self.actor = actor
        self.replica = replica
        self._gone = trio.Event()

    @property
    def label(self) -> str:
        return f"{self.actor}.{self.replica}"

    def gone(self) -> None:
        self._gone.set()

    async def wait(self) -> None:
        """Until it has left."""
        await self._gone.wait()


class Scaling:
    """The replicas of one run. `flush` carries out what the gateway decided."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        supervisor: Supervisor,
        gateway: Gateway,
        wire: TrioWire,
        flush: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._supervisor = supervisor
        self._gateway = gateway
        self._wire = wire
        self._flush = flush
        self._next = {actor: len(replicas) for actor, replicas in plan.live.items()}
        self._one_at_a_time = trio.Lock()
        self._nursery: trio.Nursery
        self._over = trio.Event()
        self._asked_in, self._asked = trio.open_memory_channel[tuple[str, Mapping[str, Any]]](100)
        supervisor.on_command = self._on_command

    # -- clients of the control socket --------------------------------------------------------------------------

    def _on_command(self, client: str, _kind: str, fields: Mapping[str, Any]) -> None:
        try:
            self._asked_in.send_nowait((client, fields))
        except trio.WouldBlock:
            self._supervisor.answer(client, "wrong", "too many commands at once; try later")

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do what is asked, until cancelled. Joins and leaves are done here, so that whoever asked may go away."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            async for client, fields in self._asked:
                nursery.start_soon(self._answer, client, fields)

    async def _answer(self, client: str, fields: Mapping[str, Any]) -> None:
        try:
            self._supervisor.answer(client, "done", await self.scale(fields["actor"], fields["replicas"]))
        except RanvierError as error:
            self._supervisor.answer(client, "wrong", str(error))

    async def _in_background(self, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Wait for work that goes on if the waiting is cancelled."""
        done = trio.Event()
        outcome: list[T | RanvierError] = []

        async def do() -> None:
            try:
                outcome.append(await work(*arguments))
            except RanvierError as error:
                outcome.append(error)
            done.set()

        self._nursery.start_soon(do)
        await done.wait()
        [came] = outcome
        if isinstance(came, RanvierError):
            raise came
        return came

    # -- scaling ------------------------------------------------------------------------------------------------

    async def scale(self, actor: str, replicas: int) -> str:
        """See `Run.scale`."""
        self._check(actor, replicas)
        joined, left = await self._in_background(self._change, actor, replicas)
        for gone in left:
            await gone.wait()
        what = [f"{actor}.{replica} joined" for replica in joined] + [f"{gone.label} left" for gone in left]
        return f"{actor} has {replicas} replica{'s' if replicas > 1 else ''}: {', '.join(what) or 'as before'}"

    async def _change(self, actor: str, replicas: int) -> tuple[list[int], list[_Leaving]]:
        """Those that have joined, and those that are to leave: they do so when their last session is over."""
        async with self._one_at_a_time:
            active = self._gateway.placement.active(actor)
            joined = [await self._join(actor) for _ in range(replicas - len(active))]
            left = []
            for replica in reversed(active[replicas:]):
                self._gateway.placement.leave(actor, replica)
                leaving = _Leaving(actor, replica)
                self._nursery.start_soon(self._leave, leaving)
                left.append(leaving)
            return joined, left

    def _check(self, actor: str, replicas: int) -> None:
        actors = self._plan.graph.actors
        if actor not in actors:
            raise RequestError(f"scale: no actor {actor!r}; there are {', '.join(actors)}")
        copies = actors[actor].policy.copies
        if not copies <= replicas <= MOST_REPLICAS:
            why = f" (policy hedge: {copies})" if copies > 1 else ""
            raise RequestError(f"scale {actor}: expected {copies} to {MOST_REPLICAS} replicas{why}, got {replicas}")
        if replicas > 1 and not actors[actor].may_repeat:
            raise RequestError(
                f"scale {actor}: its endpoint {actors[actor].section.endpoint} can be bound once; remove it, or its port"
            )

    @property
    def _live(self) -> dict[str, list[int]]:
        return {actor: sorted(replicas) for actor, replicas in self._gateway.placement.replicas.items()}

    async def _join(self, actor: str) -> int:
        replica = self._next[actor]
        self._next[actor] += 1
        live = self._live
        live[actor] = [*live[actor], replica]
        spec = self._plan.host(actor, replica, live, self._folder.path, self._folder.sockets)
        try:
            address = await self._supervisor.join(spec)
            await self._introduce(spec, address, live)
            self._supervisor.connect(spec, self._gateway.exchange.me, self._wire.wire.address)
            await self._supervisor.until_joined(spec)
        except ActorFailed:
            await self._supervisor.leave(spec)  # before the others forget it: it may still speak to them
            self._forget(spec, [host.spec.label for host in self._supervisor.supervision.hosts.values()])
            raise
        host = self._supervisor.supervision.hosts[spec.identity]
        self._gateway.placement.join(actor, replica, host.capacity_tokens)
        return replica

    async def _introduce(self, spec: HostSpec, address: str, live: Mapping[str, list[int]]) -> None:
        """Everyone who will speak with the new replica makes ready for it."""
        labels = []
        for host in list(self._supervisor.supervision.hosts.values()):
            links = self._between(spec, host.spec.actor, host.spec.replica, live)
            if links and host.spec.identity != spec.identity:
                labels.append(host.spec.label)
                self._supervisor.send(host.spec.label, "link", peer=spec.identity, address=address, links=links)
        self._wire.connect(spec.identity, address)
        for link in self._plan.links(GATEWAY, 0, live):
            if spec.identity in (link.link.source, link.link.target):
                self._gateway.exchange.add(link.link)
                self._gateway.add(link)
        self._gateway.exchange.open()
        self._flush()
        await self._supervisor.until_linked(labels, spec.identity)

    def _between(self, spec: HostSpec, actor: str, replica: int, live: Mapping[str, list[int]]) -> list[dict[str, Any]]:
        links = self._plan.links(actor, replica, live)
        return [asdict(link) for link in links if spec.identity in (link.link.source, link.link.target)]

    async def _leave(self, leaving: _Leaving) -> None:
        placement, actor, replica = self._gateway.placement, leaving.actor, leaving.replica
        while placement.replicas[actor][replica].sessions:
            await self._over.wait()
        hosts = self._supervisor.supervision.hosts
        spec = next(h.spec for h in hosts.values() if (h.spec.actor, h.spec.replica) == (actor, replica))
        async with self._one_at_a_time:  # nobody is introduced to it meanwhile
            await self._supervisor.leave(spec)
            self._forget(spec, [host.spec.label for host in hosts.values()])
            placement.remove(actor, replica)
        leaving.gone()

    def _forget(self, spec: HostSpec, labels: list[str]) -> None:
        self._supervisor.tell([label for label in labels if label != spec.label], "unlink", peer=spec.identity)
        self._gateway.remove(spec.identity)
        self._gateway.exchange.remove(spec.identity)
        self._wire.disconnect(spec.identity)

    def look(self) -> None:
        """Sessions may have ended."""
        if self._over.statistics().tasks_waiting:
            self._over.set()
            self._over = trio.Event()
