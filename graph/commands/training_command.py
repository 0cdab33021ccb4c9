"""Define `ranvier train` and `ranvier show --schedule`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ranvier.actors.protocol.schedule import bubble, play

from ..check.check import load as load_graph
from ..check.checked import Graph
from ..run import run_folder
from ..run.paths import folder_of_runs
from ..training.bubbles import Bubbles
from ..training.history import History
from ..training.planner import training_plan
from ..training.plots import draw
from ..training.progress import TrainingProgress
from ..training.trainer import Step, Trained, train
from .command_line import AllowCode, GraphFile, Json, Log, Set, Verbose, interruptible, log_form, overrides, print_json

HISTORY = "history.jsonl"


def show_schedule(graph: Graph, as_json: bool) -> None:
    """Print the training schedule of a graph, one line per stage, and its bubble.

    The bubble assumes that a backward pass takes twice as long as a forward pass, and that messages take no time.
    """
    plan = training_plan(graph)
    played = play(plan.schedule, plan.stages)
    share = bubble(played, plan.stages)
    if as_json:
        stages = {name: [str(action) for action in actions] for name, actions in plan.schedule.stages.items()}
        print_json({"micro_batches": plan.schedule.micro_batches, "stages": stages, "bubble": share})
        return
    print(plan.schedule)
    print(f"# bubble {share:.1%}, if a backward takes twice as long as a forward, and messages take no time")


def train_command(
    context: typer.Context,
    graph: GraphFile,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the training checkpoints; training continues from the newest one.")
    ] = Path("trained"),
    runs: Annotated[
        Path, typer.Option("--runs", help="Create the run folder in this folder.")
    ] = run_folder.DEFAULT_ROOT,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw losses and the schedule into this file (PNG); needs matplotlib.")
    ] = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Keep this many of the newest training checkpoints.")] = 2,
    chaos: Annotated[
        Path | None, typer.Option("--chaos", help="A file that lists faults to inject on tcp links.")
    ] = None,
    log: Log = None,
    verbose: Verbose = False,
    as_json: Json = False,
    allow_code: AllowCode = False,
    settings: Set = None,
) -> None:
    """Train a graph as its `training:` section says; every actor learns its own weights.

    To continue after an interruption, or with more steps, run the same command again: it resumes from the newest
    checkpoint under --out. transformers can open the checkpoints of a model, and so can `model: {source: …}` of graphs.
    """
    checked = load_graph(graph, allow_code=allow_code, overrides=overrides(settings))
    plan = training_plan(checked)
    began_s = time.monotonic()
    with TrainingProgress(plan, sys.stderr) as progress, History(out / HISTORY) as history:

        def on_step(step: Step) -> None:
            history.add(step.to_plain())
            progress.show(step)

        async def main() -> Trained:
            return await train(
                checked, out, allow_code=allow_code, runs=folder_of_runs(runs), on_step=on_step, on_event=progress.say,
                on_begin=history.begin, keep=keep, chaos=chaos, log=log_form(log, verbose), zygote=context.obj,
            )  # fmt: skip

        trained = interruptible(main)
    bubbles = Bubbles(plan.schedule, plan.stages, trained.counters) if trained.counters else None
    if plot is not None:
        draw(plot, plan, trained.history, bubbles)
    results = _results(trained, bubbles, time.monotonic() - began_s)
    if as_json:
        print_json(results)
        return
    print(
        f"loss {results['loss']:.4f}" + (f", validation {results['validation']:.4f}" if "validation" in results else "")
    )
    if "bubble" in results:
        shares = results["bubble"]
        print(
            f"bubble {shares['measured']:.1%}, {shares['computed']:.1%} by the schedule; messages {shares['messages']:.1%}"
        )
    print(f"checkpoint: {trained.folder}\nrun folder: {trained.run_dir}")


def _results(trained: Trained, bubbles: Bubbles | None, took_s: float) -> dict[str, Any]:
    steps = [entry for entry in trained.history if "validation" not in entry]
    validations = [entry["loss"] for entry in trained.history if "validation" in entry]
    results: dict[str, Any] = {
        "steps": len(steps), "loss": steps[-1]["loss"], "seconds": round(took_s, 3), "checkpoint": str(trained.folder),
        "run_dir": str(trained.run_dir) if trained.run_dir is not None else None, "lost": trained.losses,
    }  # fmt: skip
    if validations:
        results |= {"validation": validations[-1], "best_validation": min(validations)}
    if bubbles is not None:
        results["bubble"] = {"measured": bubbles.measured, "computed": bubbles.computed, "messages": bubbles.messages}
    return results
