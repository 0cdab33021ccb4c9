"""Add and remove replicas while the run continues.

A replica that joins (members.py) gets sessions that begin later. A replica that is to leave gets no new sessions, and
is stopped when its last session is over. A session stays with the replicas it began with, unless one of them is lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from ranvier.actors.errors import ActorFailed, counted
from ranvier.actors.protocol.control_protocol import Done, Scale, Wrong
from ranvier.actors.supervise.supervisor import Supervisor
from ranvier.transport.format.errors import RanvierError

from ..file.errors import RequestError
from ..plan.plan import Plan
from ..sessions.gateway import Gateway
from .members import Members

MOST_REPLICAS = 64
T = TypeVar("T")


class _Leaving:
    """Represent a replica that is to leave."""

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
        """Wait until the replica has left."""
        await self._gone.wait()


class Scaling:
    """Change the number of replicas of one run's actors."""

    def __init__(self, plan: Plan, supervisor: Supervisor, gateway: Gateway, members: Members) -> None:
        self._plan = plan
        self._supervisor = supervisor
        self._gateway = gateway
        self._members = members
        self._one_at_a_time = trio.Lock()
        self._nursery: trio.Nursery
        self._over = trio.Event()
        self._asked_in, self._asked = trio.open_memory_channel[tuple[str, Scale]](100)
        supervisor.on_request[Scale] = self._on_command

    # -- clients of the control socket --------------------------------------------------------------------------

    def _on_command(self, client: str, request: Scale) -> None:
        try:
            self._asked_in.send_nowait((client, request))
        except trio.WouldBlock:
            self._supervisor.answer(client, Wrong("too many commands at once; try later"))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry out requests until cancelled.

        Replicas join and leave in this task, so that a client may disconnect after its request.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            async for client, request in self._asked:
                nursery.start_soon(self._answer, client, request)

    async def _answer(self, client: str, request: Scale) -> None:
        try:
            self._supervisor.answer(client, Done(await self.scale(request.actor, request.replicas)))
        except RanvierError as error:
            self._supervisor.answer(client, Wrong(str(error)))

    async def _in_background(self, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Wait for work that continues even if the waiting is cancelled."""
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
        """Change the number of an actor's replicas. See `Run.scale`."""
        self._check(actor, replicas)
        joined, left = await self._in_background(self._change, actor, replicas)
        for gone in left:
            await gone.wait()
        what = [f"{actor}.{replica} joined" for replica in joined] + [f"{gone.label} left" for gone in left]
        return f"{actor} has {counted(replicas, 'replica')}: {', '.join(what) or 'as before'}"

    async def _change(self, actor: str, replicas: int) -> tuple[list[int], list[_Leaving]]:
        """Return the replicas that have joined, and those that leave when their last session is over."""
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
        if (host := actors[actor].section.host) is not None:
            raise RequestError(f"scale {actor}: it shares the process {host!r}, which cannot be copied; remove `host`")
        copies = actors[actor].policy.copies
        if not copies <= replicas <= MOST_REPLICAS:
            why = f" (policy hedge: {copies})" if copies > 1 else ""
            raise RequestError(f"scale {actor}: expected {copies} to {MOST_REPLICAS} replicas{why}, got {replicas}")
        if replicas > 1 and not actors[actor].may_repeat:
            raise RequestError(
                f"scale {actor}: its endpoint {actors[actor].section.endpoint} can be bound once; remove it, or its port"
            )

    async def _join(self, actor: str) -> int:
        spec = self._members.another(actor)
        try:
            await self._supervisor.join(spec)
            await self._members.enter(spec)
        except ActorFailed:
            await self._supervisor.leave(spec)  # before its peers forget it: it may still send to them
            self._members.forget(spec)
            raise
        return spec.replica

    async def _leave(self, leaving: _Leaving) -> None:
        placement, actor, replica = self._gateway.placement, leaving.actor, leaving.replica
        while replica in placement.replicas[actor] and placement.replicas[actor][replica].sessions:
            await self._over.wait()
        host = self._supervisor.supervision.host(leaving.label)
        if host is not None:
            async with self._one_at_a_time:  # no other host may get links to it meanwhile
                await self._supervisor.leave(host.spec)
                self._members.forget(host.spec)
        placement.replicas[actor].pop(replica, None)
        leaving.gone()

    def look(self) -> None:
        """Wake the replicas that are to leave: sessions may have ended."""
        if self._over.statistics().tasks_waiting:
            self._over.set()
            self._over = trio.Event()
