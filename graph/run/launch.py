"""Start a run, and end everything that it started."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import trio

from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.supervise.zygote_process import ZygoteProcess
from ranvier.transport.format.errors import ResourceError
from ranvier.transport.wires.descriptors import OF_A_PEER, OF_A_WIRE, make_sure_of_descriptors

from ..check.checked import Graph
from ..file.errors import RequestError
from ..observe import metrics
from ..observe.telemetry import exporting
from ..plan.plan import Plan, plan
from ..sessions import journal
from ..sessions.gateway import Gateway
from ..sessions.journal import Journal, Resumed
from ..sessions.placement import Placement
from ..sessions.text_process import TextProcess
from . import run_folder
from .before_start import codec_of
from .chaos import ChaosLink
from .chaos import read as read_chaos
from .hosts import Hosts
from .run import Run
from .run_folder import RunFolder

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
    cuttable: bool = False,
    log: str | None = None,
    resume: Path | None = None,
) -> AsyncIterator[Run]:
    """Start a graph. On exit, end everything that was started; only the run folder remains.

    Args:
        graph: from `ranvier.load`.
        runs: the folder in which the run folder is created.
        progress: called with the phase and the share done, until the run is ready.
        zygote: the process that hosts are forked from, if it is already started. `launch` always ends it.
        chaos: a file that lists faults to inject on tcp links (chaos.py).
        cuttable: pass tcp links through proxies, so that `Run.cut` can cut them.
        log: `json` or `console`: also write the run's log to standard error, in that form.
        resume: the folder of a killed run that has a journal. Its requests continue here (`Run.resume`).

    Raises:
        ActorFailed: an actor did not start, or was lost.
        RequestError: there is nothing to resume, the run to resume has another graph or model, or the caller does not
            run under trio.
        ResourceError: there are not enough descriptors, disk space or memory to start the run.
    """
    make_sure_of_trio("launch", "await asyncio.to_thread(ranvier.start, graph), whose calls block")
    planned = plan(graph)
    codec = codec_of(graph)
    if resume is not None and not graph.file.journal:
        raise RequestError(f"graph {graph.name} has no journal; set journal: true to resume a run of it")
    bad_links = [*bad_links_of(planned, chaos), *([ChaosLink()] if cuttable else ())]  # the last one has no faults
    make_sure_of_descriptors(f"graph {graph.name}", 2 * OF_A_WIRE + OF_A_PEER * (planned.replicas + 1))
    began = False

    def blame(error: OSError) -> BaseException:
        return error if began else ResourceError(f"the run cannot be started: {error}")

    with run_folder.made(planned, Path(runs), blame, resume) as folder, contextlib.ExitStack() as closing:
        progress("starting", 0.0)
        specs = planned.host_specs(folder.path, folder.sockets)
        links = planned.links(GATEWAY, 0, planned.live)
        hosts = Hosts(
            planned, folder, specs, [each.link for each in links], zygote=zygote, bad_links=bad_links, shown=log
        )
        closing.callback(hosts.close)
        for warning in graph.warnings:
            hosts.log.warning("checkpoint", what=warning)
        hosts.launcher.begin()  # its import of torch takes longest; this process works in parallel
        kept, left = await _journals(planned, folder, resume, closing)
        text = TextProcess(codec) if codec is not None else None
        if text is not None:
            closing.callback(text.close)
            text.start()
        placement = Placement({name: actor.policy for name, actor in graph.actors.items()})
        border = graph.checkpoint.config.recomputed_after if graph.checkpoint is not None else 0
        gateway = Gateway(hosts.end.exchange, links, placement, graph.prefill_chunk, graph.generates, border)
        run = Run(planned, folder, hosts, gateway, codec, text, kept)
        try:
            async with (
                _exported(folder, graph, hosts),
                hosts.up(lambda share: progress("loading", share)) as nursery,
                metrics.served(graph.file.telemetry.metrics, graph.name, run.snapshot, hosts.log) as run.metrics,
            ):
                progress("linking", 1.0)
                try:
                    await run.begin(nursery, left)
                    progress("ready", 1.0)
                    began = True
                    yield run
                finally:
                    run.end()
        finally:
            run.silence()
            folder.outcome(counters=run.counters)


def make_sure_of_trio(name: str, instead: str) -> None:
    """Check that the caller runs under trio.

    Raises:
        RequestError: it runs under another event loop. The message says what to do instead.
    """
    if not trio.lowlevel.in_trio_run():
        raise RequestError(
            f"{name}: expected an async function that trio runs (trio.run(main)), got another event loop; "
            f"under asyncio, use {instead}"
        )


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
async def _exported(folder: RunFolder, graph: Graph, hosts: Hosts) -> AsyncIterator[None]:
    """Export spans if the graph asks for it, and write their counts to `run.json`."""
    exported: dict[str, int] = {}
    try:
        async with exporting(folder.path, graph.name, graph.file.telemetry.otlp, hosts.log, exported):
            yield
    finally:
        if exported:
            folder.outcome(spans=exported)


async def _journals(
    planned: Plan, folder: RunFolder, resume: Path | None, closing: contextlib.ExitStack
) -> tuple[Journal | None, Resumed | None]:
    """Open the journal of this run, if the graph asks for one, and the journal of the run to resume."""
    if not planned.graph.file.journal:
        return None, None
    began = await trio.to_thread.run_sync(journal.began, planned)
    left = None
    if resume is not None:
        left = Resumed(resume, began)
        closing.callback(left.close)
    kept = Journal(folder.path, began)
    closing.callback(kept.close)
    return kept, left
