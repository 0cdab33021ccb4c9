"""Define the command `ranvier`. Results go to standard output, progress and errors to standard error.

Exit codes: 0 done, 1 the run failed, 2 the request or the graph is wrong, 3 there is no room now, 4 the deadline passed,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from ranvier import __version__
from ranvier.actors.errors import CheckpointError, Expired, Overloaded, RecordingError, counted
from ranvier.actors.protocol.host_spec import GATEWAY
from ranvier.actors.supervise.zygote_process import ZygoteProcess
from ranvier.transport.files import read_beginning, read_bounded
from ranvier.transport.format.errors import KeyFileError, RanvierError, ResourceError

from ..check.check import load as load_graph
from ..check.checked import Graph
from ..file.errors import GraphError, Problem, RequestError
from ..file.named_graphs import folder_of
from ..plan import show
from ..plan.plan import plan
from ..run import run_folder
from ..run.paths import folder_of_runs
from ..sessions.text_codec import TextCodec
from ..training.planner import training_plan
from . import config, models_command, runs_command
from .attached import scale_command, top_command, why_command
from .chat_command import chat_command
from .command_line import (
    EXPIRED,
    FAILED,
    OVERLOADED,
    WRONG,
    AllowCode,
    GraphFile,
    Json,
    Set,
    discard_output,
    interruptible,
    overrides,
    print_json,
    say,
)
from .page_command import page_command
from .replay_commands import diverge_command, replay_command
from .run_command import run_command
from .serve_command import serve_command
from .trace_command import trace_command, with_bare_sql
from .training_command import show_schedule, train_command


class Commands(typer.core.TyperGroup):
    """Run a command, and end in order where its output cannot be written."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the command line, which may print a help text. Raises what `_writing` raises."""
        with _writing():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Raises what `_writing` raises."""
        with _writing():
            return super().invoke(ctx)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Print in this context.

    Raises:
        Exit: whoever read the output has closed the pipe, having seen enough.
        ResourceError: the disk that the output goes to is full.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        raise typer.Exit from None
    except OSError as error:
        if (
            error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None
        ):  # another file than the output
            raise
        discard_output()
        raise ResourceError(f"the output cannot be written: {error.strerror}; free some space") from None


app = typer.Typer(
    name="ranvier",
    cls=Commands,
    help="Run the parts of a model as actors that exchange tensors over ZeroMQ.\n\n"
    "Start with: ranvier run smollm2 --prompt TEXT. Write a graph with: ranvier new graph NAME; then check, show and run it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


MOST_TEXT_BYTES = 1 << 30


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ranvier {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Handle the options that apply without a command: `--version`."""


class Format(StrEnum):
    text = "text"
    mermaid = "mermaid"
    dot = "dot"


@app.command()
def check(
    graph: GraphFile,
    expand: Annotated[bool, typer.Option("--expand", help="Print the graph with every edge and setting.")] = False,
    as_json: Json = False,
    allow_code: AllowCode = False,
    settings: Set = None,
) -> None:
    """Check a graph file without starting a process."""
    try:
        checked = load_graph(graph, allow_code=allow_code, overrides=overrides(settings))
        if checked.file.training is not None:
            training_plan(checked)
        codec = _codec(checked)
    except GraphError as error:
        if not as_json:
            raise
        problems = [
            {"line": p.at.line, "column": p.at.column, "where": p.at.where, "what": p.what} for p in error.problems
        ]
        print_json({"ok": False, "file": str(graph), "problems": problems})
        raise typer.Exit(WRONG) from None
    if as_json:
        answer: dict[str, Any] = {"ok": True, "file": str(graph), "problems": [], "warnings": checked.warnings}
        print_json(answer | ({"graph": checked.expanded()} if expand else {}))
    elif expand:
        import yaml

        print(yaml.safe_dump(checked.expanded(), sort_keys=False, width=120), end="")
    else:
        planned = plan(checked)
        size = f"{counted(planned.processes, 'process')}, {counted(len(planned.edges), 'edge')}"
        print(f"{graph}: good: {size}{_words(checked, codec)}")
        for warning in checked.warnings:
            print(f"{graph}: warning: {warning}")


def _codec(checked: Graph) -> TextCodec | None:
    """Return the tokenizer of a graph that generates text.

    Raises:
        GraphError: the tokenizer or a template is wrong. It points to the model's source.
    """
    from ..run.before_start import codec_of

    try:
        return codec_of(checked)
    except CheckpointError as error:
        raise GraphError(checked.document.file, [Problem(str(error), checked.document.at("model", "source"))]) from None


def _words(checked: Graph, codec: TextCodec | None) -> str:
    """Say what is good to know before a run: what a language model lacks to take text, and what `rows` is in a call."""
    if not checked.generates:
        calls = [edge for edge in checked.edges if edge.source == GATEWAY and "rows" in edge.spec.shape]
        if checked.file.training is not None or not calls:
            return ""
        return f"; {calls[0].name}: a call has one row, so rows is 1; name a dimension of any size tokens"
    if codec is None:
        return "; no tokenizer: prompts are token ids"
    encodes = checked.checkpoint is not None and checked.checkpoint.config.encoder is not None
    return "" if codec.chat_template or codec.templates or encodes else "; no chat template: run it with --raw"


@app.command("show")
def show_command(
    graph: GraphFile,
    form: Annotated[Format, typer.Option("--format", help="How to draw the plan.")] = Format.text,
    schedule: Annotated[
        bool,
        typer.Option(
            "--schedule", help="Print the training schedule instead: each actor's actions in order, and the bubble."
        ),
    ] = False,
    as_json: Json = False,
    allow_code: AllowCode = False,
    settings: Set = None,
) -> None:
    """Print the plan: processes, layers, bytes of weights, bytes per token on every edge."""
    checked = load_graph(graph, allow_code=allow_code, overrides=overrides(settings))
    if schedule:
        show_schedule(checked, as_json)
        return
    planned = plan(checked)
    if as_json:
        print_json(planned.to_plain())
    else:
        print({Format.text: show.text, Format.mermaid: show.mermaid, Format.dot: show.dot}[form](planned))


@app.command()
def score(
    context: typer.Context,
    graph: GraphFile,
    text: Annotated[Path, typer.Option("--text", help="The text to score (UTF-8).", show_default=False)],
    window: Annotated[
        int, typer.Option(min=2, help="Tokens per window; each window is scored without the text before it.")
    ] = 512,
    most: Annotated[
        int | None,
        typer.Option("--max-bytes", min=1, help="Score only this many bytes from the beginning of the text."),
    ] = None,
    as_json: Json = False,
    runs: Annotated[
        Path, typer.Option("--runs", help="Create the run folder in this folder.")
    ] = run_folder.DEFAULT_ROOT,
    allow_code: AllowCode = False,
    settings: Set = None,
) -> None:
    """Measure how likely a model finds a text: negative log-likelihood per token, and perplexity."""
    from ..run import scoring
    from ..run.launch import launch
    from .progress import Bar

    checked = load_graph(graph, allow_code=allow_code, overrides=overrides(settings))
    try:
        data = read_bounded(text, MOST_TEXT_BYTES) if most is None else read_beginning(text, most)
        written = data.decode("utf-8", "ignore" if most is not None else "strict")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--text {text}: {error}") from None
    bar, zygote = Bar(sys.stderr), context.obj

    async def main() -> tuple[Path, scoring.Score]:
        with bar:
            async with launch(checked, runs=folder_of_runs(runs), progress=bar.show, zygote=zygote) as started:
                ids = started.codec.encode(written, special=True)
                return started.dir, await scoring.score(started, ids, window, lambda share: bar.show("scoring", share))

    run_dir, made = interruptible(main)
    if as_json:
        print_json({
            "tokens": made.tokens, "nll_per_token": made.nll_per_token, "perplexity": made.perplexity,
            "window": window, "run_dir": str(run_dir),
        })  # fmt: skip
    else:
        print(f"{made.tokens} tokens, {made.nll_per_token:.5f} nats per token, perplexity {made.perplexity:.4f}")


app.command("run")(run_command)
app.command("serve")(serve_command)
app.command("chat")(chat_command)
app.command("train")(train_command)


@app.command("actors")
def actors_command(as_json: Json = False) -> None:
    """List the kinds of actors that a graph file may name, with their ports."""
    from ..file import catalogue

    entries = catalogue.entries()
    if as_json:
        print_json(entries)
    else:
        print(catalogue.text(entries))


class Thing(StrEnum):
    actor = "actor"
    graph = "graph"


@app.command()
def new(
    what: Annotated[Thing, typer.Argument(help="What to create.", show_default=False)],
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Its name; the files are written to the current folder.", show_default=False
        ),
    ],
) -> None:
    """Write a small working example: an actor with a graph around it, or a graph of a language model."""
    from ..file import starts
    from ..file.json_schema import json_schema

    try:
        files = starts.actor(name) if what is Thing.actor else starts.graph(name)
        for file, content in files.items():
            with Path(file).open("x", encoding="utf-8") as opened:
                opened.write(content)
        if not Path(starts.SCHEMA).exists():
            files[starts.SCHEMA] = json.dumps(json_schema(), indent=1) + "\n"
            Path(starts.SCHEMA).write_text(files[starts.SCHEMA], encoding="utf-8")
    except FileExistsError as error:
        raise RequestError(f"{error.filename} exists; choose another name") from None
    except ValueError as error:
        raise RequestError(str(error)) from None
    print(f"wrote {', '.join(files)}\n{starts.hint(what.value, name)}")


keys = typer.Typer(help="Make key pairs, with which actors authenticate each other over tcp.", no_args_is_help=True)
app.add_typer(keys, name="keys")


@keys.command("new")
def keys_new(
    graph: GraphFile,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the keys; by default `keys:` of the graph, or else keys/ beside it.")
    ] = None,
) -> None:
    """Make a key pair for the gateway and for each actor of the graph, unless it already has one.

    Give each machine all .pub files, and the .key files of the actors that run there. Nobody else may read the .key
    files.
    """
    from ranvier.transport.wires import curve

    from ..file.load import read

    data = read(graph).data
    actors = data.get("actors")
    if not isinstance(actors, dict):
        raise RequestError(f"{graph}: no actors; expected a mapping")
    given = data.get("keys")
    where = folder or folder_of(graph) / (given if isinstance(given, str) else "keys")
    for path in curve.write(where, (GATEWAY, *map(str, actors))):
        print(path)


app.add_typer(runs_command.app, name="runs")
app.add_typer(models_command.app, name="models")
app.command("trace")(trace_command)
app.command("scale")(scale_command)
app.command("why")(why_command)
app.command("top")(top_command)
app.command("page")(page_command)
app.command("replay")(replay_command)
app.command("diverge")(diverge_command)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the graph file, for editors."""
    from ..file.json_schema import json_schema

    print_json(json_schema())


def main(zygote: ZygoteProcess | None = None) -> None:
    """Run a command, and turn errors into exit codes.

    Args:
        zygote: the process from which hosts are forked, if it was started before.
    """
    try:
        app(
            with_bare_sql(sys.argv[1:]),
            prog_name="ranvier",
            obj=zygote,
            default_map={} if _only_asks() else config.defaults(typer.main.get_command(app)),
        )
    except RanvierError as error:
        say(f"{error}" if isinstance(error, GraphError) else f"ranvier: {error}", error=True)
        sys.exit(_code(error))


def _only_asks() -> bool:
    """Return whether the command line asks for help, the version or completions, which a wrong default must not keep back."""
    return bool({"-h", "--help", "--version"} & set(sys.argv)) or "_RANVIER_COMPLETE" in os.environ


def _code(error: RanvierError) -> int:
    from ..trace.trace_lines import TraceError

    wrong: tuple[type[Exception], ...] = (
        GraphError,
        CheckpointError,
        RequestError,
        TraceError,
        RecordingError,
        KeyFileError,
        ValueError,
    )
    if isinstance(error, Overloaded):
        return OVERLOADED
    if isinstance(error, Expired):
        return EXPIRED
    return WRONG if isinstance(error, wrong) else FAILED
