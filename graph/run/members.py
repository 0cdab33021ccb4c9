"""Add hosts to a live run and remove them, and notify their peers.

Joining: the new host loads its weights, its peers get its address, then it opens its links. Leaving: the host ends, and
its peers forget it. `scaling.py` and `recovery.py` decide when a host joins or leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from ranvier.actors.protocol.control_protocol import Link, Unlink
from ranvier.actors.protocol.host_spec import GATEWAY, HostLink, HostSpec
from ranvier.actors.supervise.supervisor import Supervisor
from ranvier.transport.format.host_id import HostId
from ranvier.transport.wires.trio_wire import TrioWire

from ..plan.plan import EPOCH, Live, Plan
from ..sessions.gateway import Gateway
from .run_folder import RunFolder


class Members:
    """Manage the hosts that take part in one run.

    `flush` carries out the gateway's decisions. `live` has the epoch of each host that takes part, by actor and
    replica.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        supervisor: Supervisor,
        gateway: Gateway,
        wire: TrioWire,
        flush: Callable[[], None],
    ) -> None:
        self.live: dict[str, dict[int, int]] = plan.live
        self.flush = flush
        self._plan = plan
        self._folder = folder
        self._supervisor = supervisor
        self._gateway = gateway
        self._wire = wire
        self._next = {actor: len(replicas) for actor, replicas in plan.live.items()}
        self._one_at_a_time = trio.Lock()

    def another(self, actor: str) -> HostSpec:
        """Return the spec of one more replica."""
        replica = self._next[actor]
        self._next[actor] += 1
        return self._spec(actor, replica, EPOCH)

    def again(self, lost: HostSpec) -> HostSpec:
        """Return the spec of the same replica in its next epoch."""
        return self._spec(lost.actor, lost.replica, lost.epoch + 1)

    def _spec(self, actor: str, replica: int, epoch: int) -> HostSpec:
        live: Live = {**self.live, actor: {**self.live[actor], replica: epoch}}
        return self._plan.host(actor, replica, live, self._folder.path, self._folder.sockets)

    async def enter(self, spec: HostSpec, instead_of: str | None = None) -> None:
        """Add a host that has loaded to the run: open the links with its peers, then let it take sessions.

        Args:
            spec: the host.
            instead_of: the label of the lost host that it replaces, if any.

        Raises:
            ActorFailed: the host was lost meanwhile, and is not in `live`.
        """
        async with self._one_at_a_time:
            await self._introduce(spec)
            links = self._plan.links(spec.actor, spec.replica, self._live_with(spec))
            gateway, address = self._gateway.exchange.me, self._wire.wire.address
            self._supervisor.connect(spec, links, gateway, address, instead_of)
            await self._supervisor.until_joined(spec)
            self.live[spec.actor][spec.replica] = spec.epoch
        placement = self._gateway.placement
        if spec.replica not in placement.replicas[spec.actor]:
            host = self._supervisor.supervision.hosts[spec.identity]
            placement.join(spec.actor, spec.replica, host.capacity_tokens, host.keeps)

    async def _introduce(self, spec: HostSpec) -> None:
        """Have all peers of the new host prepare their links with it."""
        live, supervision = self._live_with(spec), self._supervisor.supervision
        address, detour = supervision.hosts[spec.identity].address, self._supervisor.detour
        assert address is not None
        introduced = []
        for actor, replicas in self.live.items():
            for replica, epoch in replicas.items():
                links = _between(spec, self._plan.links(actor, replica, live))
                if links and not supervision.is_lost(key := str(HostId(actor, replica, epoch))):
                    introduced.append(key)
                    self._supervisor.send([key], Link(spec.identity, detour(key, spec.identity, address), tuple(links)))
        self._wire.connect(spec.identity, detour(self._gateway.exchange.me, spec.identity, address))
        for link in _between(spec, self._plan.links(GATEWAY, 0, live)):
            self._gateway.exchange.add(link.link)
            self._gateway.add(link)
        self._gateway.exchange.open()
        self.flush()
        await self._supervisor.until_linked(introduced, spec.identity)

    def _live_with(self, spec: HostSpec) -> Live:
        return {**self.live, spec.actor: {**self.live[spec.actor], spec.replica: spec.epoch}}

    def forget(self, spec: HostSpec) -> None:
        """Have all peers forget a host. Whatever it still sends is refused."""
        live = self.live[spec.actor]
        if live.get(spec.replica) == spec.epoch:
            del live[spec.replica]
        others = [key for key in self._supervisor.supervision.hosts if key != spec.identity]
        self._supervisor.send(others, Unlink(spec.identity))
        self._gateway.remove(spec.identity)
        self._gateway.exchange.remove(spec.identity)
        self._wire.disconnect(spec.identity)
        self._supervisor.on_forgotten(spec.identity)


def _between(spec: HostSpec, links: Iterable[HostLink]) -> list[HostLink]:
    return [link for link in links if spec.id in (link.link.source, link.link.target)]
