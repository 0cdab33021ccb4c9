"""Train a graph: run attempts until all steps are done.

A lost actor ends the attempt. The next attempt continues from the last complete checkpoint, within the restart budget
of that actor. Batches are functions of the step, so the losses are the same as without the failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from ranvier.actors.errors import ActorFailed, Cause
from ranvier.actors.protocol.host_spec import Restart
from ranvier.actors.supervise.restarts import Restarts
from ranvier.actors.supervise.zygote_process import ZygoteProcess

from ..check.checked import Graph
from ..run import run_folder
from ..run.launch import bad_links_of, make_sure_of_trio
from . import checkpoints
from .attempt import Attempt
from .data import of as data_of
from .planner import training_plan
from .steps import OnStarted, OnStep, Step, Trained

OnBegin = Callable[[Sequence[Mapping[str, Any]]], None]


async def train(
    graph: Graph,
    out: Path,
    *,
    allow_code: bool = False,
    runs: Path = run_folder.DEFAULT_ROOT,
    on_step: OnStep = lambda _step: None,
    on_event: Callable[[str], None] = lambda _what: None,
    on_started: OnStarted = lambda _pids: None,
    on_begin: OnBegin = lambda _history: None,
    keep: int = 2,
    chaos: Path | None = None,
    log: str | None = None,
    zygote: ZygoteProcess | None = None,
) -> Trained:
    """Train a graph until its steps are done. Start from the newest checkpoint under `out`, if there is one.

    Args:
        graph: from `ranvier.load`, with a `training` section.
        out: the folder of the checkpoints.
        allow_code: import the class that `data: {source: …}` names from the graph's own folder.
        runs: the folder in which each attempt's run folder is made.
        on_step: called with each step and validation.
        on_event: called with a message about any other event.
        on_started: called in each attempt with the process ids of the hosts, by identity.
        on_begin: called before each attempt with the steps and validations that are kept. Later ones are repeated.
        keep: how many of the newest checkpoints are kept.
        chaos: a file that lists faults to inject on tcp links (chaos.py).
        log: `json` or `console`: also write the runs' logs to standard error, in that form.
        zygote: the process that hosts are forked from, if it is already started.

    Raises:
        ActorFailed: an actor was lost more often than its `restart` allows, or raised an error itself.
        GraphError: the graph cannot be trained as its file says.
        RequestError: the data does not exist or does not fit; `out` has a checkpoint of another graph; another training
            writes to `out`; or the caller does not run under trio.
    """
    make_sure_of_trio("train", "await asyncio.to_thread(trio.run, functools.partial(ranvier.train, graph, out))")
    plan = training_plan(graph)
    data, bad_links = data_of(plan, allow_code), bad_links_of(plan.plan, chaos)
    restarts: dict[str, Restarts] = {}
    trained = Trained()
    with checkpoints.claimed(out):
        while True:
            found = checkpoints.latest(out, plan)
            trained.history = found.history if found is not None else []
            trained.folder = found.folder if found is not None else None
            on_begin(trained.history)
            if found is not None and found.rounds >= plan.rounds:
                return trained
            if found is not None:
                on_event(f"continuing from {found.folder}, {found.rounds} of {plan.rounds} rounds done")
            attempt = Attempt(plan, data, out, found, trained, on_step, keep, bad_links, log)
            try:
                await attempt.run(runs, on_started, zygote)
            except ActorFailed as error:
                if error.cause is Cause.RAISED:
                    raise  # a retry would fail again: the same batch, the same weights
                actor, policy = attempt.restarts.get(error.actor, (error.actor, Restart(max=0)))
                delay_s = restarts.setdefault(actor, Restarts(policy)).take(time.monotonic())
                if delay_s is None:
                    raise
                zygote = None  # the zygote has ended with its hosts
                trained.losses.append(f"{error.actor}: {error.what}")
                on_event(f"{error.actor} was lost ({error.what}); starting again from the last checkpoint")
                await trio.sleep(delay_s)
                continue
            return trained


__all__ = ["Step", "Trained", "train"]
