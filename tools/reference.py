"""Write the pages of docs/reference from the code: `python tools/reference.py`. A test compares them with what it would write.

Keys come from the schema of graph files, commands from the command line, columns from the file that writes traces, and the
names of the Python interface from the package. mkdocstrings puts the docstrings in when the site is built.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main

import ranvier
from ranvier.actors.trace import trace_file
from ranvier.graph.commands.cli import app
from ranvier.graph.file.json_schema import json_schema

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
SECTIONS = {
    "model": "ModelSection", "actors.NAME": "ActorSection", "edges[]": "EdgeSection", "training": "TrainingSection",
    "training.data": "DataSection", "training.loss[]": "LossSection", "training.optimizer": "OptimizerSection",
    "training.lora": "LoraSection", "restart": "RestartSection", "supervision": "SupervisionSection", "trace": "TraceSection",
    "record": "RecordSection", "telemetry": "TelemetrySection", "runs": "RunsSection",
}  # fmt: skip
GROUPS = {
    "Graphs": ("load", "Graph", "plan", "Plan"),
    "Runs": ("start", "launch", "BlockingRun", "BlockingGeneration", "Run", "Generation", "Token", "Result", "Sampling"),
    "Inside": ("ops",),
    "Traces": ("trace",),
    "Training": ("train", "Trained", "initialise"),
    "Custom actors": ("Actor", "Batch", "Context", "SessionInfo", "Row", "TensorSpec", "RowsFailed", "gather", "scatter",
                           "balancing_loss"),
    "Errors": ("RanvierError", "GraphError", "RequestError", "CheckpointError", "ActorFailed", "Overloaded", "Expired",
               "ResourceError", "KeyFileError", "LinkBroken", "LinkClosed", "ProtocolError"),
}  # fmt: skip
EXIT_CODES = (
    (0, "done; also when the reader of the output has closed the pipe"),
    (1, "the run failed; or `replay` and `diverge` found a difference"),
    (2, "the command, the graph file or the request is wrong"),
    (3, "there is no room now: the KV caches are full, or too many requests are open"),
    (4, "the deadline passed"),
    (130, "Ctrl-C; other signals: 128 and their number"),
)


def graph_keys() -> Iterator[str]:
    schema = json_schema()
    yield "# The keys of a graph file\n"
    yield "`ranvier check --expand` prints a file with every key and its value. [The graph file](../graph-file.md) explains it."
    yield from _keys("", schema, schema)
    for prefix, name in SECTIONS.items():
        section = schema["$defs"][name]
        yield f"\n## `{prefix}`\n\n{section['description'].splitlines()[0]}"
        yield from _keys(f"{prefix}.", section, schema)


def _keys(prefix: str, section: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    yield "\n| key | values | default | meaning |\n|---|---|---|---|"
    for key, value in section["properties"].items():
        default = "required" if key in section.get("required", ()) else _shown(value.get("default"))
        yield f"| `{prefix}{key}` | {_values(value, schema)} | {default} | {_cell(value.get('description', ''))} |"


def _values(value: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return the values that a key takes, in words."""
    if "$ref" in value:
        return "a mapping"
    if "anyOf" in value:
        forms = [_values(form, schema) for form in value["anyOf"] if form.get("type") != "null"]
        return " or ".join(dict.fromkeys(forms))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    kind = str(value.get("type", ""))
    if kind in ("integer", "number"):
        words = ["a whole number" if kind == "integer" else "a number"]
        for word, bound in (("above", "exclusiveMinimum"), ("from", "minimum"), ("to", "maximum")):
            words += [f"{word} {value[bound]:,}"] if bound in value else []
        return " ".join(words)
    return {"boolean": "`true`, `false`", "string": "text", "array": "a list", "object": "a mapping"}.get(kind, kind)


def _shown(default: Any) -> str:
    if default is None or default == {}:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def commands() -> Iterator[str]:
    yield "# The commands\n"
    yield (
        "`ranvier COMMAND --help` prints the same. `GRAPH` is a graph file, or `smollm2`, which comes with Ranvier. `RUN` is\n"
        "a run's folder, `latest`, `latest~1`, its number in `ranvier runs`, or the beginning of its name.\n"
    )
    group: Any = typer.main.get_command(app)
    flat = list(_flat(group, ()))
    yield "| command | what it does |\n|---|---|"
    for words, command in flat:
        yield f"| [`{' '.join(words)}`](#{'-'.join(words)}) | {_cell(command.help.split('.')[0])}. |"
    yield "\n## Exit codes\n\n| code | meaning |\n|---|---|"
    for code, meaning in EXIT_CODES:
        yield f"| {code} | {meaning} |"
    yield "\n## Your defaults\n"
    yield (
        "`~/.config/ranvier/config.toml` (or `ranvier/config.toml` in `$XDG_CONFIG_HOME`) has a table for each command, with\n"
        "its long options:\n"
    )
    yield '```toml\n[run]\nmax-tokens = 256\nlog = "console"\n\n[serve]\nport = 9000\n```\n'
    yield (
        "Options on the command line override this file. `ranvier --install-completion` installs completion of graphs, runs,\n"
        "actors and edges for your shell."
    )
    for words, command in flat:
        yield f"\n## {' '.join(words)}\n\n{inspect.cleandoc(command.help)}\n"
        yield f"```text\n{_usage(words, command)}\n```"
        yield from _parameters(command)


def _flat(group: Any, before: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        words = (*before, name)
        if not hasattr(command, "commands"):
            yield words, command
            continue
        if command.invoke_without_command:
            yield words, command
        yield from _flat(command, words)


def _usage(words: tuple[str, ...], command: Any) -> str:
    context = command.context_class(command, info_name=" ".join(["ranvier", *words]))
    return re.sub(r"[{}]|(?<=\.\.\.)\.\.\.", "", " ".join(command.get_usage(context).removeprefix("Usage: ").split()))


def _parameters(command: Any) -> Iterator[str]:
    context = command.context_class(command, help_option_names=["-h", "--help"])
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    yield "\n| option | meaning |\n|---|---|"
    for record in records:
        if record is not None:
            yield f"| `{_cell(record[0].replace(' <Path>', ''))}` | {_cell(record[1])} |"


def trace_columns() -> Iterator[str]:
    yield "# The trace, column by column\n"
    yield (
        "A run writes `trace/ACTOR.REPLICA.jsonl` for each process. The first line names the actor, its clock and the "
        "columns. Each further\n"
        "line is a list: one record. Times are nanoseconds of the run's clock. [Tracing](../tracing.md) says what to "
        "do with them."
    )
    tree = ast.parse(inspect.getsource(trace_file))
    for line, following in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)):
            continue
        name = line.targets[0].id
        if not name.endswith("_COLUMNS"):
            continue
        assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        kind = getattr(trace_file, name.removesuffix("_COLUMNS"))
        about = inspect.cleandoc(str(following.value.value))
        columns = ", ".join(f"`{column}`" for column in trace_file.COLUMNS[kind])
        yield f"\n## {kind}\n\n{about}\n\nColumns: {columns}."


def python() -> Iterator[str]:
    yield "# The Python interface\n"
    yield (
        "All names are attributes of the package: `import ranvier`. The site (`make docs`) shows their docstrings below; in\n"
        "Python, `help` does."
    )
    for title, names in GROUPS.items():
        yield f"\n## {title}\n\n| name | |\n|---|---|"
        for name in names:
            about = inspect.cleandoc(getattr(ranvier, name).__doc__ or "").partition("\n\n")[0]
            yield f"| `{name}` | {_cell(about)} |"
        for name in names:
            made = getattr(ranvier, name)
            yield f"\n::: {made.__name__ if inspect.ismodule(made) else f'{made.__module__}.{name}'}"


PAGES = {"graph-keys.md": graph_keys, "commands.md": commands, "trace-columns.md": trace_columns, "python.md": python}


def main() -> None:
    for name, lines in PAGES.items():
        (FOLDER / name).write_text("\n".join(lines()) + "\n")


if __name__ == "__main__":
    main()
