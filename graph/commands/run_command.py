"""Define `ranvier run`: start a graph, and generate text or compute outputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranvier.actors.component.session import Sampling
from ranvier.transport.files import read_bounded, regular

from ..check.check import load as load_graph
from ..check.checked import Graph
from ..file.errors import RequestError
from ..run import before_start, run_folder
from ..run.paths import folder_of_runs, writable
from ..run.request_checks import checked_logprobs, checked_sampling
from ..sessions.model_defaults import sampling_of
from ..sessions.text_codec import ChatOptions
from ..trace import summary
from . import completion, resume_command
from .about import About
from .command_line import (
    GRAPH,
    AllowCode,
    Json,
    Log,
    Set,
    Verbose,
    graph_argument,
    interruptible,
    log_form,
    overrides,
    pairs,
    print_json,
    prompt_of,
    run_named,
    shown,
    yaml_value,
)
from .replay_commands import RECORD_HELP, record_setting
from .talk import talk

if TYPE_CHECKING:
    from ..run.run import Run
    from ..sessions.generation import Generation

MOST_JSON_BYTES = 16 << 20


Prompt = str | list[dict[str, str]]


class ByWhom(StrEnum):
    model = "model"


def run_command(
    context: typer.Context,
    graph: Annotated[
        Path | None,
        graph_argument(f"The graph: {GRAPH}. Not with --resume."),
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
    presence_penalty: Annotated[float, typer.Option(help="Over 0: avoid tokens that the answer has already.")] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Over 0: avoid tokens the more, the more often the answer has them.")
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            "--logit-bias", metavar="ID=BIAS", help="Add this to a token's logit. May be given several times."
        ),
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Do not end the answer before it has this many tokens.")] = 0,
    sampling: Annotated[
        ByWhom | None,
        typer.Option(help="`model`: as the model's own files say; other options of sampling replace what they say."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: print each token's log-probability, and those of the N likeliest tokens."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random choice; the same seed gives the same text.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Stop before this text. May be given several times.")
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option("--deadline", help="End the stream after this many seconds, even if it is not complete."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the chat template.")] = False,
    tools: Annotated[
        Path | None, typer.Option("--tools", metavar="FILE", help="A JSON list of functions that the model may call.")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option("--documents", metavar="FILE", help="A JSON list of documents for the chat template.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", metavar="NAME", help="Use the model's chat template of this name.")
    ] = None,
    template_argument: Annotated[
        list[str] | None,
        typer.Option(
            "--template-argument",
            metavar="NAME=VALUE",
            help="Set a variable of the chat template, such as enable_thinking=false. May be given several times.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message before the prompt.")
    ] = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="Print what every message cost to standard error, as `ranvier trace` does.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing beside the answer, also on a terminal.")
    ] = False,
    as_json: Json = False,
    runs: Annotated[
        Path, typer.Option("--runs", help="Create the run folder in this folder.")
    ] = run_folder.DEFAULT_ROOT,
    chaos: Annotated[
        Path | None, typer.Option("--chaos", help="A file that lists faults to inject on tcp links.")
    ] = None,
    log: Log = None,
    verbose: Verbose = False,
    record: Annotated[
        str | None,
        typer.Option("--record", metavar="EDGES", help=RECORD_HELP, autocompletion=completion.recorded),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            parser=run_named,
            autocompletion=completion.run_names,
            help="Continue the requests of a killed run that had a journal.",
        ),
    ] = None,
    after: Annotated[
        int | None,
        typer.Option("--after", metavar="POSITION", help="With --resume: print only what comes after this position."),
    ] = None,
    allow_code: AllowCode = False,
    settings: Set = None,
) -> None:
    """Start the graph, and stream the answer to standard output. Without a prompt on a terminal: talk with the model."""
    log = log_form(log, verbose)
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
    if logprobs is not None and not as_json:
        raise RequestError("--logprobs needs --json, which prints them")
    checked = load_graph(graph, allow_code=allow_code, overrides={**overrides(settings), **record_setting(record)})
    launching = {"runs": folder_of_runs(runs), "zygote": context.obj, "chaos": chaos, "log": log}
    prompt = prompt_of(prompt, prompt_file, piped=checked.generates and input_file is None)
    about = About(cost, quiet)
    if not checked.generates:
        if prompt is not None or input_file is None:
            raise RequestError(
                f"graph {checked.name} is not a language model; give --input FILE.safetensors, not --prompt"
            )
        _call(checked, input_file, output_file, as_json, launching, about)
        return
    if input_file is not None or output_file is not None or (prompt is None and (as_json or not _is_terminal())):
        raise RequestError(f"graph {checked.name} is a language model; give --prompt TEXT, not --input or --output")
    chat = ChatOptions(
        _json_list("--tools", tools),
        _json_list("--documents", documents),
        template,
        {
            name: yaml_value(value)
            for name, value in pairs("--template-argument", template_argument, "enable_thinking=false").items()
        },
    )
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty, "min_tokens": min_tokens, "seed": seed,
        "logit_bias": _biases(logit_bias),
    }  # fmt: skip
    if sampling is not None:
        given = {name: value for name, value in given.items() if _was_given(context, name)}
    chosen = checked_sampling(checked, _sampling(checked, sampling, given), max_tokens)
    checked_logprobs(logprobs)
    options: dict[str, Any] = {
        "max_tokens": max_tokens, "sampling": chosen, "stop": tuple(stop or ()), "raw": raw,
        "deadline_s": deadline, "logprobs": logprobs, "tools": chat.tools, "documents": chat.documents,
        "template": chat.template, "template_arguments": chat.arguments,
    }  # fmt: skip
    if prompt is None:
        _check_talk(checked, system, options, chat)
        talk(checked, options, system, launching, about)
    else:
        _generate(checked, _asked(checked, prompt, system, options, chat), options, as_json, launching, about)


def _taken_of_prompt(run: Run, generation: Generation) -> Callable[[], float | None]:
    """Return a function that returns which share of its prompt the last actor has taken, or None if the prompt is short."""
    chunk = run.plan.graph.prefill_chunk

    def steps() -> int:
        return min((host["steps"] for host in run.snapshot()["hosts"] if not host["spare"]), default=0)

    before = steps()

    def taken() -> float | None:
        chunks = -(-generation.result.prompt_tokens // chunk)
        return min(1.0, (steps() - before) / chunks) if chunks > 1 else None

    return taken


def _asked(checked: Graph, prompt: str, system: str | None, options: Mapping[str, Any], chat: ChatOptions) -> Prompt:
    """Return the prompt with its system message, if there is one.

    Raises:
        RequestError, CheckpointError: it is no text, does not fit, or the template refuses it.
    """
    if system and options["raw"]:
        raise RequestError("--system needs the chat template; leave out --raw")
    asked: Prompt = [{"role": "system", "content": system}, {"role": "user", "content": prompt}] if system else prompt
    codec = before_start.codec_of(checked)
    before_start.check_prompt(checked, codec, asked, options["max_tokens"], options["raw"], chat)
    return asked


def _check_talk(checked: Graph, system: str | None, options: Mapping[str, Any], chat: ChatOptions) -> None:
    """Check that a graph can hold a conversation.

    Raises:
        RequestError, CheckpointError: it has no tokenizer or no chat template, or its model is no causal one.
    """
    encodes = checked.checkpoint is not None and checked.checkpoint.config.encoder is not None
    if options["raw"] or encodes:
        raise RequestError(
            f"graph {checked.name}: a talk needs a causal model and its chat template; give --prompt TEXT"
        )
    _asked(checked, "Hello", system, options, chat)


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _was_given(context: typer.Context, name: str) -> bool:
    """Return whether an option stands on the command line, or among the user's defaults."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")


def _sampling(checked: Graph, by: ByWhom | None, given: Mapping[str, Any]) -> Sampling:
    """Return how tokens are chosen: as given, over what the model's files say if `by` is the model.

    Raises:
        RequestError: a value is out of its range.
    """
    base = Sampling()
    if by is not None and checked.checkpoint is not None:
        base = sampling_of(checked.checkpoint)
    try:
        return replace(base, **given)
    except ValueError as error:
        raise RequestError(f"--{str(error).replace('_', '-', 1)}") from None


def _biases(settings: Sequence[str] | None) -> dict[int, float]:
    made = pairs("--logit-bias", settings, "2=-100")
    try:
        return {int(token): float(bias) for token, bias in made.items()}
    except ValueError:
        raise RequestError(f"--logit-bias: expected a token's id and a number, such as 2=-100, got {made}") from None


def _json_list(option: str, file: Path | None) -> list[Any] | None:
    """Return the list in a JSON file.

    Raises:
        RequestError: the file cannot be read, or holds something else.
    """
    if file is None:
        return None
    try:
        made = json.loads(read_bounded(file, MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{option} {file}: {error}") from None
    if not isinstance(made, list) or not all(isinstance(each, dict) for each in made):
        raise RequestError(f"{option} {file}: expected a JSON list of objects")
    return made


def _call(
    checked: Graph, input_file: Path, output_file: Path | None, as_json: bool, launching: dict[str, Any], about: About
) -> None:  # fmt: skip
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
    before_start.check_inputs(checked, inputs)
    if output_file is not None:
        writable(output_file)
    bar = Bar(sys.stderr, quiet=about.quiet)

    async def main() -> tuple[Path, dict[str, Any], float]:
        with bar:
            async with launch(checked, progress=bar.show, **launching) as started:
                about.begins(started.dir)
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
    if as_json:
        traced = summary.summary(summary.read(run_dir)) if checked.file.trace else None
        print_json({"outputs": shapes, "seconds": took_s, "run_dir": str(run_dir), "trace": traced})
        return
    for name, shape in shapes.items():
        print(f"{name}: {shape}{f' in {output_file}' if output_file is not None else ''}")
    about.ends([f"{took_s:.3f} s"], run_dir, traced=bool(checked.file.trace))


def _generate(
    checked: Graph, prompt: Prompt, options: dict[str, Any], as_json: bool, launching: dict[str, Any], about: About
) -> None:  # fmt: skip
    from ..run.launch import launch
    from ..sessions.generation import Result
    from .progress import Bar

    bar = Bar(sys.stderr, quiet=about.quiet)
    explained: list[dict[str, Any]] = []

    async def main() -> tuple[Path, Result | None]:
        with bar:
            async with launch(checked, progress=bar.show, **launching) as started:
                about.begins(started.dir)
                bar.show("thinking", 1.0)
                generation = started.generate(prompt, **options)
                bar.follow("prompt", _taken_of_prompt(started, generation))
                async for token in generation:
                    bar.done()
                    if token.logprob is not None:
                        explained.append(
                            {"logprob": token.logprob, "top": {str(t): p for t, p in token.top_logprobs.items()}}
                        )
                    if as_json:
                        continue
                    if not shown(token.text):  # the run ends in order, and its trace is whole
                        return started.dir, None
                return started.dir, generation.result

    run_dir, result = interruptible(main)
    if result is None:
        return
    if as_json:
        traced = summary.summary(summary.read(run_dir)) if checked.file.trace else None
        print_json({
            "text": result.text, "token_ids": result.token_ids, "prompt_tokens": result.prompt_tokens,
            "finish_reason": result.finish_reason, "time_to_first_token_s": result.first_token_s,
            "tokens_per_second": result.tokens_per_second, "run_dir": str(run_dir),
            **({"logprobs": explained} if explained else {}), "trace": traced,
        })  # fmt: skip
        return
    if not result.text.endswith("\n"):
        print(flush=True)
    cut = ", cut at --max-tokens" if result.finish_reason == "length" else ""
    about.ends(
        [
            f"{result.tokens_per_second:.1f} tok/s", f"first after {result.first_token_s:.2f} s",
            f"{result.prompt_tokens} tokens in, {len(result.token_ids)} out{cut}",
        ],
        run_dir, traced=bool(checked.file.trace),
    )  # fmt: skip
