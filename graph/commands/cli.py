"""Define the command `ranvier`. Results go to standard output, progress and errors to standard error.

Exit codes: 0 done, 1 the run failed, 2 the request or the graph is wrong, 130 interrupted.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ranvier import __version__
from ranvier.actors.component.session import Sampling
from ranvier.actors.errors import CheckpointError, RecordingError, counted
from ranvier.actors.supervise.zygote_process import ZygoteProcess
from ranvier.transport.files import read_beginning, read_bounded, regular
from ranvier.transport.format.errors import KeyFileError, RanvierError

from ..file.check import load as load_graph
from ..file.checked import Graph
from ..file.errors import GraphError, RequestError
from ..plan import show
from ..plan.plan import plan
from ..run import run_folder
from ..run.paths import folder_of_runs, writable
from ..trace import summary, table
from ..training.planner import training_plan
from . import resume_command, runs_command
from .attached import scale_command, top_command, why_command
from .command_line import (
    FAILED,
    WRONG,
    AllowCode,
    GraphFile,
    Json,
    Log,
    Set,
    interruptible,
    overrides,
    print_json,
    prompt_of,
    say,
    show_text,
)
from .replay_commands import RECORD_HELP, diverge_command, record_setting, replay_command
from .trace_command import trace_command
from .training_command import show_schedule, train_command

app = typer.Typer(
    name="ranvier",
    help="Run the parts of a model as actors that exchange tensors over ZeroMQ.\n\n"
    "Start with: ranvier check GRAPH, then ranvier show GRAPH, then ranvier run GRAPH --prompt TEXT, or ranvier train GRAPH.",
    no_args_is_help=True,
    add_completion=False,
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
    """Find everything that is wrong with a graph file without starting a process."""
    try:
        checked = load_graph(graph, allow_code=allow_code, overrides=overrides(settings))
        if checked.file.training is not None:
            training_plan(checked)
    except GraphError as error:
        if not as_json:
            raise
        problems = [{"line": p.at.line, "column": p.at.column, "what": p.what} for p in error.problems]
        print_json({"ok": False, "file": str(graph), "problems": problems})
        raise typer.Exit(WRONG) from None
    if as_json:
        print_json(
            {"ok": True, "file": str(graph), "problems": [], **({"graph": checked.expanded()} if expand else {})}
        )
    elif expand:
        import yaml

        print(yaml.safe_dump(checked.expanded(), sort_keys=False, width=120), end="")
    else:
        planned = plan(checked)
        print(f"{graph}: good: {counted(planned.processes, 'process')}, {counted(len(planned.edges), 'edge')}")


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
def run(
    context: typer.Context,
    graph: Annotated[
        Path | None,
        typer.Argument(metavar="GRAPH", help="The graph file (YAML); not with --resume.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="The prompt; - reads it from standard input, which other users cannot see."
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from a file (UTF-8).")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input", help="For graphs that are not language models: safetensors with one tensor per input port."
        ),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Write the graph's outputs to this file (safetensors).")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Generate at most this many tokens.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; higher values are more random.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0: among all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest tokens whose probabilities add up to this value.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Leave out tokens whose probability is below this share of the likeliest one's.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Over 1: avoid tokens that occurred before.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the random choice; the same seed gives the same text.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Stop before this text. May be given several times.")
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option("--deadline", help="End the stream after this many seconds, even if it is not complete."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the chat template.")] = False,
    as_json: Json = False,
    runs: Annotated[
        Path, typer.Option("--runs", help="Create the run folder in this folder.")
    ] = run_folder.DEFAULT_ROOT,
    chaos: Annotated[
        Path | None, typer.Option("--chaos", help="A file that lists faults to inject on tcp links.")
    ] = None,
    log: Log = None,
    record: Annotated[str | None, typer.Option("--record", metavar="EDGES", help=RECORD_HELP)] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Continue the requests of a killed run that had a journal."),
    ] = None,
    after: Annotated[
        int | None,
        typer.Option("--after", metavar="POSITION", help="With --resume: print only what comes after this position."),
    ] = None,
    allow_code: AllowCode = False,
    settings: Set = None,
) -> None:
    """Start the graph, stream the text, print what every message cost, and write the run folder."""
    if resume is not None:
        resume_command.check(context)
        resume_command.run(
            resume, after, as_json, allow_code, {"runs": folder_of_runs(runs), "zygote": context.obj, "log": log}
        )
        return
    if after is not None:
        raise RequestError("--after needs --resume; give --resume RUN, too")
    if graph is None:
        raise RequestError("GRAPH is missing; give a graph file, or --resume RUN")
    try:
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    except ValueError as error:
        raise RequestError(f"--{error}") from None
    checked = load_graph(graph, allow_code=allow_code, overrides={**overrides(settings), **record_setting(record)})
    launching = {"runs": folder_of_runs(runs), "zygote": context.obj, "chaos": chaos, "log": log}
    prompt = prompt_of(prompt, prompt_file)
    if not checked.generates:
        if prompt is not None or input_file is None:
            raise RequestError(
                f"graph {checked.name} is not a language model; give --input FILE.safetensors, not --prompt"
            )
        _call(checked, input_file, output_file, as_json, launching)
        return
    if prompt is None or input_file is not None or output_file is not None:
        raise RequestError(f"graph {checked.name} is a language model; give --prompt TEXT, not --input or --output")
    options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": sampling, "stop": tuple(stop or ()), "raw": raw}
    options["deadline_s"] = deadline
    _run(checked, prompt, options, as_json, launching)


def _call(checked: Graph, input_file: Path, output_file: Path | None, as_json: bool, launching: dict[str, Any]) -> None:
    """Call a graph that is not a language model once: read its inputs from a file, and write its outputs to a file."""
    import time

    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from ..run.launch import launch
    from .progress import Bar

    try:
        inputs = load_file(regular(input_file))
    except (OSError, SafetensorError) as error:
        raise RequestError(f"--input {input_file}: {error}") from None
    if output_file is not None:
        writable(output_file)
    bar = Bar(sys.stderr)

    async def main() -> tuple[Path, dict[str, Any], float]:
        with bar:
            async with launch(checked, progress=bar.show, **launching) as started:
                bar.show("computing", 1.0)
                began = time.monotonic()
                outputs = await started.call(**inputs)
                return (
                    started.dir,
                    {name: tensor.contiguous() for name, tensor in outputs.items()},
                    time.monotonic() - began,
                )

    run_dir, outputs, took_s = interruptible(main)
    if output_file is not None:
        save_file(outputs, output_file)
    shapes = {
        name: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for name, tensor in outputs.items()
    }
    traced = summary.summary(summary.read(run_dir)) if checked.file.trace else None
    if as_json:
        print_json({"outputs": shapes, "seconds": took_s, "run_dir": str(run_dir), "trace": traced})
        return
    for name, shape in shapes.items():
        print(f"{name}: {shape}{f' in {output_file}' if output_file is not None else ''}")
    if traced is not None:
        say(f"\n{table.of_summary(traced)}")
    print(f"\n{took_s:.3f} s\nrun folder: {run_dir}")


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

    try:
        files = starts.actor(name) if what is Thing.actor else starts.graph(name)
        for file, content in files.items():
            with Path(file).open("x", encoding="utf-8") as opened:
                opened.write(content)
    except FileExistsError as error:
        raise RequestError(f"{error.filename} exists; choose another name") from None
    except ValueError as error:
        raise RequestError(str(error)) from None
    print(f"wrote {', '.join(files)}\n{starts.hint(what.value, name)}")


def _run(checked: Graph, prompt: str, options: dict[str, Any], as_json: bool, launching: dict[str, Any]) -> None:
    from ..run.launch import launch
    from ..sessions.generation import Result
    from .progress import Bar

    bar = Bar(sys.stderr)

    async def main() -> tuple[Path, Result]:
        with bar:
            async with launch(checked, progress=bar.show, **launching) as started:
                bar.show("thinking", 1.0)
                generation = started.generate(prompt, **options)
                async for token in generation:
                    bar.done()
                    if not as_json:
                        show_text(token.text)
                return started.dir, generation.result

    run_dir, result = interruptible(main)
    traced = summary.summary(summary.read(run_dir)) if checked.file.trace else None
    if as_json:
        print_json({
            "text": result.text, "token_ids": result.token_ids, "prompt_tokens": result.prompt_tokens,
            "finish_reason": result.finish_reason, "time_to_first_token_s": result.first_token_s,
            "tokens_per_second": result.tokens_per_second, "run_dir": str(run_dir),
            "trace": traced,
        })  # fmt: skip
        return
    print("\n")
    if traced is not None:
        say(table.of_summary(traced))
    print(
        f"\n{result.prompt_tokens} tokens in, {len(result.token_ids)} out ({result.finish_reason}); first token after "
        f"{result.first_token_s:.2f} s, then {result.tokens_per_second:.1f} tokens/s\nrun folder: {run_dir}"
    )


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
    from ranvier.actors.protocol.host_spec import GATEWAY
    from ranvier.transport.wires import curve

    from ..file.load import read

    data = read(graph).data
    actors = data.get("actors")
    if not isinstance(actors, dict):
        raise RequestError(f"{graph}: no actors; expected a mapping")
    given = data.get("keys")
    where = folder or graph.parent / (given if isinstance(given, str) else "keys")
    for path in curve.write(where, (GATEWAY, *map(str, actors))):
        print(path)


app.add_typer(runs_command.app, name="runs")
app.command("trace")(trace_command)
app.command("scale")(scale_command)
app.command("why")(why_command)
app.command("top")(top_command)
app.command("replay")(replay_command)
app.command("diverge")(diverge_command)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the graph file, for editors."""
    from ..file.schema import GraphFile as Schema

    print_json(Schema.model_json_schema(by_alias=True))


def main(zygote: ZygoteProcess | None = None) -> None:
    """Run a command, and turn errors into exit codes.

    Args:
        zygote: the process from which hosts are forked, if it was started before.
    """
    try:
        app(obj=zygote)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has closed the pipe
        sys.exit(FAILED)
    except RanvierError as error:
        say(f"{error}" if isinstance(error, GraphError) else f"ranvier: {error}", error=True)
        sys.exit(_code(error))


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
    return WRONG if isinstance(error, wrong) else FAILED
