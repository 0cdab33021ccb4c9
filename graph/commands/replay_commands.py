"""Define the commands that read recordings: `replay`, `diverge`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..file.errors import RequestError
from ..run import run_folder
from ..run import runs as runs_of
from ..run.paths import folder_of_runs
from . import completion
from .command_line import FAILED, AllowCode, Json, RunFolder, interruptible, print_json, reading, run_named, say

if TYPE_CHECKING:
    from ranvier.actors.trace.recording_reader import Recorded

    from ..replay.replay import Replayed

REFERENCE = "reference"
RECORD_HELP = (
    "Record the messages of these edges for `replay` and `diverge`: all, or edges, ports, actors, comma-separated."
)


def record_setting(edges: str | None) -> dict[str, str]:
    """Return the value of `--record` as a setting of the graph file."""
    if edges is None:
        return {}
    names = [name.strip() for name in edges.split(",")]
    return {"record.edges": "all" if names == ["all"] else json.dumps(names)}


def replay_command(
    run_dir: RunFolder,
    actor: Annotated[
        str,
        typer.Argument(
            metavar="ACTOR", help="An actor, or one of its replicas (upper.1).", autocompletion=completion.actors
        ),
    ],
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", min=0, help="Allowed difference, as a share of an output's norm; 0: the same bits."
        ),
    ] = 0.0,
    debug: Annotated[
        int | None, typer.Option("--debug", metavar="STEP", help="Run this step in Python's debugger.")
    ] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Replay one actor alone, in this process, with its inputs from a recorded run, and compare its outputs.

    Record a run with: ranvier run GRAPH --record all. The KV cache is built by the same steps in the same batches.
    Exit code 1: an output differs from the recorded one.
    """
    from ranvier.actors.trace.recording_reader import recordings

    from ..replay import replay
    from .progress import Bar

    with reading(run_dir):
        found = recordings(run_dir)
    chosen = [r for r in found if r.name == actor] or [r for r in found if actor in (r.host.actor, r.host.label)]
    if not chosen:
        names = ", ".join(sorted(r.name for r in found))
        raise RequestError(f"{run_dir}: no actor {actor!r} was recorded; there are {names}")
    if debug is not None and len(chosen) > 1:
        raise RequestError(f"--debug: {actor} has several recordings; name one of {', '.join(r.name for r in chosen)}")
    _allowed(chosen, allow_code)
    bar = Bar(sys.stderr)
    made = {}
    with reading(run_dir):
        for recorded in chosen:
            if debug is None:
                with bar:
                    made[recorded] = replay.replay(recorded, tolerance, lambda share: bar.show("replaying", share))
            else:
                made[recorded] = replay.replay(recorded, tolerance, lambda _: None, debug)
    if as_json:
        print_json({recorded.name: _plain(recorded, done) for recorded, done in made.items()})
    else:
        for recorded, done in made.items():
            say(_words(recorded, done, tolerance))
    if any(done.mismatches for done in made.values()):
        raise typer.Exit(FAILED)


def _plain(recorded: Recorded, done: Replayed) -> dict[str, Any]:
    return {
        "steps": done.steps, "sessions": done.sessions, "compared": done.compared,
        "largest": done.largest if math.isfinite(done.largest) else str(done.largest),
        "mismatches": [{"step": m.step, "port": m.port, "what": m.what} for m in done.mismatches],
        "seconds": done.seconds, "ends_early": recorded.ends_early,
    }  # fmt: skip


def _words(recorded: Recorded, done: Replayed, tolerance: float) -> str:
    lines = [f"{recorded.name}: {done.steps} steps of {done.sessions} sessions in {done.seconds:.2f} s"]
    if done.mismatches:
        first = done.mismatches[0]
        port = f", {first.port}" if first.port else ""
        lines.append(
            f"{len(done.mismatches)} of {done.compared} outputs differ; the first in step {first.step}{port}: {first.what}"
        )
    elif done.compared:
        how = "the same bit for bit" if done.largest == 0 else f"within {tolerance:g} (largest {done.largest:.2g})"
        lines.append(f"all {done.compared} outputs are {how}")
    else:
        lines.append("no output was recorded: there is nothing to compare")
    if recorded.ends_early:
        lines.append(f"the recording ends early: {recorded.ends_early}")
    return "\n".join(lines)


def _allowed(chosen: Sequence[Recorded], allow_code: bool) -> None:
    """Refuse recorded actors that may not be started: a run folder may be untrusted.

    Raises:
        RequestError: the kind of an actor is not installed, or is code from a graph's folder and code is not allowed.
    """
    from ranvier.actors.component.kinds import is_offered

    for recorded in chosen:
        if recorded.host.folder is None and not is_offered(recorded.host.implementation):
            raise RequestError(f"{recorded.name}: {recorded.host.implementation} is not an installed kind of actor")
        if recorded.host.folder is not None and not allow_code:
            raise RequestError(
                f"{recorded.name} is code of a graph's own folder ({recorded.host.implementation} in {recorded.host.folder}); "
                "pass --allow-code if you trust it"
            )


def _compared(text: str) -> Path:
    return Path(text) if text == REFERENCE else run_named(text)


def diverge_command(
    context: typer.Context,
    first: Annotated[
        Path,
        typer.Argument(
            metavar="A", parser=_compared, help="A recorded run, or a graph file to run.", show_default=False
        ),
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="Another one, or `reference`: compare with transformers.")
    ] = REFERENCE,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            min=0,
            help="Allowed difference, as a share of a vector's norm; by default what rounding explains.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="For graph files: the prompt.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="For graph files: generate at most this many tokens.")
    ] = 16,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Compute the reference with this checkpoint instead of the run's own."),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Create run folders in this folder.")] = run_folder.DEFAULT_ROOT,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Find where two runs, or a run and transformers, first differ: actor, layer, tensor, position, and by how much.

    Compare what was recorded at the edges first. Then replay the actors between the last edge that agrees and the first
    that does not, and compare their layers. Exit code 1: they differ.
    """
    from ranvier.actors.trace.recording_reader import recordings

    from ..replay import diverge
    from .progress import Bar

    if str(first) == REFERENCE:
        raise RequestError(f"A: expected a run folder or a graph file, got {REFERENCE}; give it as B")
    other = run_named(second) if second != REFERENCE else None
    with runs_of.using(first, other):
        begun = _folder(first, prompt, max_tokens, runs, allow_code, context.obj)
        folders = [
            begun, _folder(other, prompt, max_tokens, runs, allow_code, context.obj) if other is not None else None
        ]  # fmt: skip
    bar = Bar(sys.stderr)
    with reading(*folders):
        for folder in folders:
            if folder is not None:
                _allowed(recordings(folder), allow_code)
        with bar:
            found = diverge.diverge(begun, folders[1], threshold, model, bar.show)
    if as_json:
        print_json(found.to_plain())
    else:
        say(diverge.table(found, (str(folders[0]), str(folders[1] or "transformers"))))
    if found.first is not None:
        raise typer.Exit(FAILED)


def _folder(given: Path, prompt: str | None, max_tokens: int, runs: Path, allow_code: bool, zygote: Any) -> Path:
    """Return the run folder: the given one, or that of a new run of the given graph."""
    if given.is_dir():
        return given
    from ..check.check import load
    from ..run.launch import launch
    from .progress import Bar

    if prompt is None:
        raise RequestError(f"{given}: give --prompt TEXT to run this graph with, or the folder of a recorded run")
    checked = load(given, allow_code=allow_code, overrides=record_setting("all"))
    bar = Bar(sys.stderr)

    async def main() -> Path:
        with bar:
            async with launch(checked, runs=folder_of_runs(runs), progress=bar.show, zygote=zygote) as run:
                bar.show("thinking", 1.0)
                async for _ in run.generate(prompt, max_tokens=max_tokens):
                    pass
                return run.dir

    return interruptible(main)
