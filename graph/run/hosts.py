"""Start the hosts of a run or of a training, and end them. Both use this code.

A `Hosts` object is complete before any process starts, so the object that drives it can be completed first, too. `up`
starts the processes and waits for their weights, `link` opens the links, and leaving `up` ends every process.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from ranvier.actors.protocol.host_spec import HostSpec
from ranvier.actors.supervise.launcher import LocalLauncher
from ranvier.actors.supervise.supervisor import Supervisor
from ranvier.actors.supervise.zygote_process import ZygoteProcess
from ranvier.transport.links.link import LinkSpec

from ..observe.status import Status
from ..observe.why import Why
from ..plan.plan import Plan
from .chaos import ChaosLink, Detours
from .log import LogFile, logger
from .parent_end import ME, Driver, ParentEnd
from .run_folder import RunFolder


class Hosts:
    """Hold the hosts of one run, and the objects that watch them.

    Args:
        plan: the plan of the graph.
        folder: the run's folder.
        specs: the hosts to start with.
        links: the links of this process.
        zygote: the process that hosts are forked from, if it is already started. `Hosts` always ends it.
        bad_links: tcp links that fail on purpose (chaos.py).
        shown: `json` or `console`: also write the run's log to standard error, in that form.
        by_position: sample the trace's records by position instead of by session.

    Raises:
        OSError, ResourceError: there are not enough descriptors or disk space.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        specs: Sequence[HostSpec],
        links: Sequence[LinkSpec],
        *,
        zygote: ZygoteProcess | None = None,
        bad_links: Sequence[ChaosLink] = (),
        shown: str | None = None,
        by_position: bool = False,
    ) -> None:
        self.specs = specs
        with contextlib.ExitStack() as closing:
            self.launcher = LocalLauncher(folder.sockets, folder.logs, zygote)
            closing.callback(self.launcher.end_zygote)
            log_file = LogFile(folder.logs)
            closing.callback(log_file.close)
            self.log = logger(log_file, shown)
            self.end = ParentEnd(plan, folder, links, by_position=by_position)
            closing.callback(self.end.wire.close)
            self.supervisor = Supervisor(
                specs, self.launcher, f"ipc://{folder.sockets / 'supervisor'}", folder.logs, self.log
            )
            closing.callback(self.supervisor.close)
            self._closing = closing.pop_all()
        self.detours = Detours(bad_links, plan.keys(folder.path))
        self.why = Why(plan, self.supervisor, folder.path)
        self.status = Status(self.supervisor)
        self.supervisor.on_clock = lambda: folder.clocks(self.supervisor.clocks)
        self.supervisor.detour, self.supervisor.on_forgotten = self.detours.address, self.detours.forget

    @contextlib.asynccontextmanager
    async def up(self, progress: Callable[[float], None] = lambda _share: None) -> AsyncIterator[trio.Nursery]:
        """Start the hosts, and wait until they have loaded. On exit, all of them end.

        `progress` is called with the share of the weights that is loaded. Tasks in the nursery are cancelled at the end.

        Raises:
            ActorFailed: a host did not start.
        """
        supervisor = self.supervisor
        async with self.launcher.running(), trio.open_nursery() as nursery:
            nursery.start_soon(self.why.run)
            await nursery.start(self.detours.run)
            nursery.start_soon(supervisor.run)
            await supervisor.until_loaded(progress)
            for spec in self.specs:
                address = supervisor.supervision.hosts[spec.identity].address
                assert address is not None
                self.end.wire.connect(spec.identity, self.detours.address(ME, spec.identity, address))
            try:
                yield nursery
            finally:
                with trio.CancelScope(shield=True):
                    await supervisor.stop()
            nursery.cancel_scope.cancel()

    async def link(self, nursery: trio.Nursery, driver: Driver) -> None:
        """Open all links, and wait until the hosts have opened theirs. From then on, `driver` gets the messages.

        Raises:
            ActorFailed: a host was lost meanwhile.
        """
        nursery.start_soon(self.end.drive, driver)
        nursery.start_soon(self.end.ship)
        self.end.exchange.open()
        driver.flush()
        await self.supervisor.until_running(ME, self.end.wire.wire.address)

    @property
    def counters(self) -> dict[str, dict[str, int]]:
        """Return the counters of each host by its label, and those of injected faults under `chaos`."""
        counted = {label: dict(own) for label, own in self.supervisor.supervision.counters.items()}
        if done := self.detours.counters:
            counted["chaos"] = dict(done)
        return counted

    def close(self) -> None:
        """Close the wires and the log, after the hosts have ended."""
        self._closing.close()
