"""The loop around a training run: batches go in, losses come out, checkpoints are made whole, and what is lost begins again
from the last one.

A lost actor ends the attempt, and the next one goes on from the last whole checkpoint, within the restart budget of that actor:
batches are functions of the step, so the losses are those that would have been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from ranvier.actors.errors import ActorFailed
from ranvier.actors.supervise.restarts import Restarts
from ranvier.actors.supervise.zygote_process import ZygoteProcess

from ..file.checked import Graph
from ..run import run_folder
from ..run.launch import bad_links_of
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
    """Train a graph until its steps are done, from the newest checkpoint under `out` on.

    Args:
        graph: from `ranvier.load`, with a `training` section.
        out: where checkpoints go, the last `keep` of them.
        allow_code: import the class that `data: {source: …}` names from the graph's own folder.
        on_step: told of every step and validation.
        on_event: told what goes on otherwise, in words.
        on_started: told the processes, by identity, of each attempt.
        on_begin: told, before each attempt, of the steps and validations that stand; those after them come again.
        chaos: a file that says what goes wrong on which tcp links (chaos.py).
        log: `json` or `console`: the runs' log goes to standard error, too, in that form.
        zygote: the process that hosts are forked from, where it was started before.

    Raises:
        ActorFailed: an actor was lost more often than its `restart` allows, or raised an error of its own.
        GraphError: it cannot be trained as its file says.
        RequestError: the data is not there or does not fit, `out` has a checkpoint of another graph, or another
            training writes there.
    """
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
                on_event(f"going on from {found.folder}, {found.rounds} of {plan.rounds} rounds done")
            attempt = Attempt(plan, data, out, found, trained, on_step, keep, bad_links, log)
            try:
                await attempt.run(runs, on_started, zygote)
            except ActorFailed as error:
                actor = error.actor.partition(".")[0]
                if error.remote_traceback and "Error" in error.what and "ended" not in error.what:
                    raise  # it will do so again: the same batch, the same weights
                policy = attempt.policies.get(actor)
                delay_s = (
                    restarts.setdefault(actor, Restarts(policy)).take(time.monotonic()) if policy is not None else None
                )
                if delay_s is None:
                    raise
                zygote = None  # it has ended with its hosts
                trained.losses.append(f"{error.actor}: {error.what}")
                on_event(f"{error.actor} was lost ({error.what}); beginning again from the last checkpoint")
                await trio.sleep(delay_s)
                continue
            return trained


__all__ = ["Step", "Trained", "train"]
