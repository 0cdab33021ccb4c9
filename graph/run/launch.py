"""Start a run, and end everything that it started."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import trio

from ranvier.actors.errors import ActorFailed
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.supervise.launcher import LocalLauncher
from ranvier.actors.supervise.supervisor import Supervisor
from ranvier.actors.supervise.zygote_process import ZygoteProcess
from ranvier.transport.format.errors import RanvierError, ResourceError
from ranvier.transport.wires.descriptors import OF_A_PEER, OF_A_WIRE, make_sure_of_descriptors

from ..file.checked import Graph
from ..file.errors import RequestError
from ..plan.plan import Plan, plan
from ..sessions import journal, tokenizer
from ..sessions.gateway import Gateway
from ..sessions.journal import Journal, Resumed
from ..sessions.placement import Placement
from ..sessions.text_process import TextProcess
from ..sessions.tokenizer import TextCodec
from . import metrics, run_folder
from . import runs as runs_of
from .chaos import ChaosLink, Detours
from .chaos import read as read_chaos
from .log import LogFile, logger
from .parent_end import ME, OwnEnd
from .run import Run
from .run_folder import RunFolder
from .status import Status
from .telemetry import exporting
from .why import Why

Progress = Callable[[str, float], None]
"""Callback that gets the current phase ("starting", "loading", "linking", "ready") and the share done, 0 to 1."""


@contextlib.asynccontextmanager
async def launch(
    graph: Graph,
    *,
    runs: Path | str = run_folder.DEFAULT_ROOT,
    progress: Progress = lambda _what, _share: None,
    zygote: ZygoteProcess | None = None,
    chaos: Path | None = None,
    log: str | None = None,
    resume: Path | None = None,
) -> AsyncIterator[Run]:
    """Start a graph. On exit, end everything that was started; only the run folder remains.

    Args:
        graph: from `ranvier.load`.
        runs: the folder in which the run's own folder is made.
        progress: called with the phase and the share done, until the run is ready.
        zygote: the process that hosts are forked from, if it is already started. It is ended in any case.
        chaos: a file that says which tcp links fail, and how (chaos.py).
        log: `json` or `console`: also write the run's log to standard error, in that form.
        resume: the folder of a killed run that has a journal. Its requests continue here (`Run.resume`).

    Raises:
        ActorFailed: an actor did not start, or was lost.
        RequestError: there is nothing to resume, or the run to resume has another graph or model.
        ResourceError: there are not enough descriptors, disk space or memory to start the run.
    """
    planned = plan(graph)
    if resume is not None and not graph.file.journal:
        raise RequestError(f"graph {graph.name} has no journal; set journal: true to resume a run of it")
    bad_links = bad_links_of(planned, chaos)
    make_sure_of_descriptors(f"graph {graph.name}", 2 * OF_A_WIRE + OF_A_PEER * (planned.processes + 1))
    try:
        with runs_of.using(resume):  # `create` may remove old runs, but not this one
            folder = run_folder.create(planned, Path(runs))
    except OSError as error:
        raise ResourceError(f"the run's folder cannot be made: {error}") from error
    began = False
    try:
        async with _launched(planned, folder, progress, zygote, bad_links, log, resume) as run:
            began = True
            yield run
    except (BaseExceptionGroup, OSError) as several:
        one = single(several) if isinstance(several, BaseExceptionGroup) else several
        if not began and isinstance(one, OSError):
            one = ResourceError(f"the run cannot be started: {one}")
        folder.failed(one)
        raise one from None
    except BaseException as error:
        folder.failed(error)
        raise
    else:
        folder.outcome(outcome="done")
    finally:
        folder.close()


def bad_links_of(planned: Plan, chaos: Path | None) -> Sequence[ChaosLink]:
    """Return the faulty links that a chaos file describes; without a file, none.

    Raises:
        RequestError: the graph has no tcp links, so the file cannot apply.
    """
    bad_links = read_chaos(chaos) if chaos is not None else []
    if bad_links and all(edge.wire != "tcp" for edge in planned.edges):
        raise RequestError("chaos is for tcp links, and this graph has none; set transport: tcp://127.0.0.1")
    return bad_links


@contextlib.asynccontextmanager
async def _launched(
    planned: Plan,
    folder: RunFolder,
    progress: Progress,
    zygote: ZygoteProcess | None,
    bad_links: Sequence[ChaosLink],
    shown: str | None,
    resume: Path | None,
) -> AsyncIterator[Run]:
    graph = planned.graph
    specs = planned.host_specs(folder.path, folder.sockets)
    holder: list[Run] = []
    with contextlib.ExitStack() as ending:
        log_file = LogFile(folder.logs)
        ending.callback(log_file.close)
        own = OwnEnd(planned, folder)
        ending.callback(own.wire.close)
        progress("starting", 0.0)
        kept, left = await _journals(planned, folder, resume, ending)
        async with LocalLauncher(folder.sockets, folder.logs, zygote).running() as launcher:
            # the process that hosts are forked from imports torch now; this process works in parallel
            log = logger(log_file, shown)
            codec = _codec(graph)
            text = TextProcess(codec) if codec is not None else None
            if text is not None:
                ending.callback(text.close)
                text.start()
            supervisor = Supervisor(
                specs, launcher, f"ipc://{folder.sockets / 'supervisor'}", folder.logs, log,
                lambda label, failed: holder[0].on_session_failed(label, failed) if holder else None,
            )  # fmt: skip
            exported: dict[str, int] = {}
            try:
                async with (
                    exporting(folder.path, graph.name, graph.file.telemetry.otlp, log, exported),
                    trio.open_nursery() as nursery,
                ):
                    why = Why(planned, supervisor, folder.path)
                    nursery.start_soon(why.run)
                    status = Status(supervisor)
                    supervisor.on_clock = lambda: folder.clocks(supervisor.clocks)
                    detours = Detours(bad_links, nursery, planned.keys(folder.path))
                    supervisor.detour, supervisor.on_forgotten = detours.address, detours.forget
                    nursery.start_soon(supervisor.run)
                    await supervisor.until_loaded(lambda share: progress("loading", share))
                    links = planned.links(GATEWAY, 0, planned.live)
                    exchange = own.exchange([link.link for link in links])
                    placement = Placement({name: actor.policy for name, actor in graph.actors.items()})
                    for spec in specs:
                        host = supervisor.supervision.hosts[spec.identity]
                        assert host.address is not None
                        own.wire.connect(spec.identity, detours.address(ME, spec.identity, host.address))
                        placement.join(spec.actor, spec.replica, host.capacity_tokens, host.keeps)
                    gateway = Gateway(exchange, links, placement, graph.prefill_chunk, graph.generates)
                    status.gateway = gateway
                    run = Run(planned, folder, supervisor, own, gateway, codec, text, detours, why, status)
                    holder.append(run)
                    run._requests.journal = kept
                    nursery.start_soon(run._listen)
                    nursery.start_soon(run._failure)
                    nursery.start_soon(run._requests.prepare)
                    nursery.start_soon(why.watch)
                    await nursery.start(run._scaling.run)
                    nursery.start_soon(own.ship)
                    progress("linking", 1.0)
                    exchange.open()
                    run._flush()
                    await supervisor.until_running(ME, own.wire.wire.address)
                    nursery.start_soon(run._recovery.run)
                    if left is not None:
                        nursery.start_soon(run._requests.make_room)
                        run._requests.go_on(left)
                        left.close()
                    progress("ready", 1.0)
                    try:
                        async with metrics.served(
                            graph.file.telemetry.metrics, graph.name, run.status, log
                        ) as run.metrics:
                            yield run
                    finally:
                        run._close()
                        with trio.CancelScope(shield=True):
                            await supervisor.stop()
                        run._silence()
                        folder.outcome(counters=run.counters)
                    nursery.cancel_scope.cancel()
            finally:
                if exported:
                    folder.outcome(spans=exported)
                supervisor.close()


async def _journals(
    planned: Plan, folder: RunFolder, resume: Path | None, ending: contextlib.ExitStack
) -> tuple[Journal | None, Resumed | None]:
    """Open the journal of this run, if the graph asks for one, and the journal of the run to resume."""
    if not planned.graph.file.journal:
        return None, None
    began = await trio.to_thread.run_sync(journal.began, planned)
    left = None
    if resume is not None:
        left = Resumed(resume, began)
        ending.callback(left.close)
    kept = Journal(folder.path, began)
    ending.callback(kept.close)
    return kept, left


def _codec(graph: Graph) -> TextCodec | None:
    if not graph.generates or graph.checkpoint is None or not tokenizer.brought_by(graph.checkpoint):
        return None
    return tokenizer.of(graph.checkpoint)


def single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Reduce a group of errors to the one that matters most.

    That is an interrupt, else an `ActorFailed`, else another `RanvierError`, else the only error in the group, else the
    group.
    """
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        elif not isinstance(error, trio.Cancelled):
            leaves.append(error)
    for kind in (KeyboardInterrupt, ActorFailed, RanvierError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0] if len(leaves) == 1 else group
