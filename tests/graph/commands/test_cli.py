"""Check the command as a user types it: what it prints, where, and how it ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import typer

from ranvier.graph.commands import cli

COMMAND = [sys.executable, "-m", "ranvier"]
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SMOLLM2 = str(EXAMPLES / "smollm2.yaml")


def ranvier(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
        **options,
    )


def test_help_teaches() -> None:
    """Name the commands in the help, and say where to start."""
    done = ranvier("--help")
    assert done.returncode == 0
    for word in ("check", "show", "run", "trace", "schema", "Start with: ranvier run smollm2"):
        assert word in done.stdout
    assert ranvier("run", "--help").stdout.count("--") > 15


def test_a_wrong_graph_leaves_no_process(tmp_path: Path) -> None:
    """Leave no process if the graph is wrong.

    A process that was started before the file was read ends with the command."""
    path = tmp_path / "bad.yaml"
    path.write_text("ranvier: 1\n")
    mark = f"MARK={secrets.token_hex(8)}"
    done = ranvier("run", str(path), "--prompt", "x", env={**os.environ, "MARK": mark.partition("=")[2]})
    assert done.returncode == 2
    assert "bad.yaml:1:1: key 'name' is missing" in done.stderr
    assert not [process for process in Path("/proc").iterdir() if process.name.isdigit() and marked(process, mark)]


def marked(process: Path, mark: str) -> bool:
    """Return whether a process has `mark` in its environment."""
    try:
        return mark.encode() in (process / "environ").read_bytes()
    except OSError:
        return False


def test_hosts_that_cannot_be_forked_say_why(tmp_path: Path, runs: Path) -> None:
    """Print the last words of the process that hosts are forked from, if it ends while it starts."""
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    done = ranvier(
        "run",
        str(EXAMPLES / "smollm2.yaml"),
        "--prompt",
        "x",
        "--runs",
        str(runs),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "the process that hosts are forked from has ended" in done.stderr
    assert "ImportError: this torch is broken" in done.stderr


def test_check_says_good_or_what_is_wrong() -> None:
    """Print that a graph is good, or each problem with its position on standard error."""
    good = ranvier("check", SMOLLM2)
    assert (good.returncode, good.stderr) == (0, "")
    assert "good: 4 processes, 13 edges" in good.stdout
    case = Path(__file__).parents[1] / "cases" / "several_at_once.yaml"
    bad = ranvier("check", str(case))
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert [line.split(": ")[0] for line in bad.stderr.splitlines()] == [f"{case}:5:17", f"{case}:8:16"]


def test_check_json() -> None:
    """Print the graph, or its problems with line and column, as JSON."""
    told = json.loads(ranvier("check", SMOLLM2, "--json", "--expand").stdout)
    assert told["ok"]
    assert told["graph"]["edges"][0] == {
        "from": "embed.hidden", "to": "lower.hidden", "feedback": False, "codec": "raw", "credits": 8,
        "credit_bytes": 67108864,
    }  # fmt: skip
    bad = ranvier("check", str(Path(__file__).parents[1] / "cases" / "no_such_actor.yaml"), "--json")
    assert bad.returncode == 2
    [problem] = [p for p in json.loads(bad.stdout)["problems"] if "embde" in p["what"]]
    assert (problem["line"], problem["column"]) == (10, 5)


def test_the_long_form_is_a_graph_file_of_the_same_plan(tmp_path: Path) -> None:
    """Print with `check --expand` a graph file of the same plan, with `pipeline:` written out."""
    short = tmp_path / "short.yaml"
    text = Path(SMOLLM2).read_text()
    short.write_text(text[: text.index("edges:")] + "pipeline: [embed, lower, upper, head]\n")
    long = tmp_path / "long.yaml"
    long.write_text(ranvier("check", str(short), "--expand").stdout)
    plans = [json.loads(ranvier("show", str(path), "--json").stdout) for path in (short, long, Path(SMOLLM2))]
    assert plans[0] == plans[1]
    assert plans[0]["edges"] == plans[2]["edges"]


def test_show_in_every_form() -> None:
    """Show the plan as text, as Mermaid and as DOT."""
    text = ranvier("show", SMOLLM2).stdout
    assert "lower  blocks     1         0-14    1        106.2 MB  106202880" in text
    assert "lower.hidden -> upper.hidden       bfloat16[tokens, 576]  1152 B" in text
    assert 'embed -->|"hidden, 1152 B"| lower' in ranvier("show", SMOLLM2, "--format", "mermaid").stdout
    assert 'head -> embed [label="token, 8 B", style=dashed];' in ranvier("show", SMOLLM2, "--format", "dot").stdout


def test_schema_is_json_schema() -> None:
    """Print a JSON schema of graph files."""
    schema = json.loads(ranvier("schema").stdout)
    assert schema["properties"]["ranvier"]["const"] == 1
    assert "from" in schema["$defs"]["EdgeSection"]["properties"]


def test_run_json_prints_one_object(runs: Path) -> None:
    """Print one JSON object on standard output, nothing on a standard error that is no terminal, and leave a run folder."""
    done = ranvier("run", SMOLLM2, "--prompt", "What is the capital of France?", "--json", "--runs", str(runs))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["text"] == "The capital of France is Paris."
    assert told["token_ids"] == [504, 3575, 282, 4649, 314, 7042, 30, 2]
    assert told["prompt_tokens"] == 37
    assert told["finish_reason"] == "stop"
    assert told["tokens_per_second"] > 0
    assert told["time_to_first_token_s"] > 0
    assert done.stderr == ""
    folder = Path(told["run_dir"])
    assert (folder.stat().st_mode & 0o777) == 0o700
    run = json.loads((folder / "run.json").read_text())
    assert run["outcome"] == "done"
    assert run["versions"]["torch"] == importlib.metadata.version("torch")
    files = {"graph.yaml", "plan.json", "run.json", "clocks.json", "logs", "trace"}
    assert {path.name for path in folder.iterdir()} == files
    again = ranvier("trace", str(folder), "--json")
    assert json.loads(again.stdout) == told["trace"]


def test_run_streams_text_and_prints_the_table(runs: Path) -> None:
    """Print the same text for the same seed, and nothing else on standard output. With --cost, add the table to standard error.

    The text is sampled, with a stop string and with settings of the command line."""
    arguments = (
        "run", SMOLLM2, "--prompt", "Once upon a time", "--raw", "--max-tokens", "12", "--temperature", "1.0",
        "--seed", "7", "--stop", "zebra", "--runs", str(runs), "--set", "model.dtype=float32",
    )  # fmt: skip
    first, second = ranvier(*arguments, "--cost"), ranvier(*arguments)
    assert first.returncode == 0, first.stderr
    assert len(first.stdout) > 20 and first.stdout == second.stdout and second.stderr == ""
    for word in ("what every message cost", "head.token -> embed.token", "serialise", "lower.0"):
        assert word in first.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", SMOLLM2, "--prompt", "x", "--temperature", "-1"), 2, "temperature: expected at least 0, got -1.0"),
        (("run", SMOLLM2, "--prompt", "x", "--set", "nonsense"), 2, "expected KEY=VALUE"),
        (("run", SMOLLM2, "--prompt", "x", "--set", "model.dtype=int3"), 2, "model.dtype"),
        (("run", "nowhere.yaml", "--prompt", "x"), 2, "nowhere.yaml:1:1: cannot be read"),
        (("trace", "nowhere"), 2, "no run's name begins so"),
        (("trace", "x" * 300), 2, "no run's name begins so"),
        (("trace", "./nowhere"), 2, "no run folder"),
        (("diverge", "reference"), 2, "give it as B"),
        (("run", SMOLLM2), 2, "--prompt"),
        (("frobnicate",), 2, "frobnicate"),
    ],
)
def test_a_wrong_request_ends_with_2(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    """End a wrong request with code 2, and start and write nothing."""
    done = ranvier(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_over_the_context_ends_with_2(runs: Path) -> None:
    """End a prompt that is longer than the model's context with code 2."""
    done = ranvier("run", SMOLLM2, "--prompt", "x" * 40_000, "--runs", str(runs))
    assert done.returncode == 2
    assert "the model's context is 8192" in done.stderr


def interrupted(after_s: float, runs: Path) -> None:
    """Send Ctrl-C after `after_s`, and expect a quick end with code 130, or 0 if the command was faster.

    The `runs` fixture checks what is left."""
    process = subprocess.Popen(
        [*COMMAND, "run", SMOLLM2, "--prompt", "Count to a thousand.", "--max-tokens", "500", "--runs", str(runs)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole foreground group
    _, errors = process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT, 0), errors.decode()
    if process.returncode == 130:
        assert errors.decode().endswith("interrupted\n")
        assert "Traceback" not in errors.decode()


@pytest.mark.parametrize("after_s", [1.0, *(pytest.param(after_s, marks=pytest.mark.slow) for after_s in (3.0, 6.0))])
def test_ctrl_c_ends_everything(after_s: float, runs: Path) -> None:
    """End everything after Ctrl-C while the run starts, loads or generates (case 50)."""
    interrupted(after_s, runs)


def test_ctrl_c_between_a_context_and_its_body_ends_what_it_started() -> None:
    """End the hosts if Ctrl-C arrives between their start and the block that ends them (case 50)."""
    ended: list[str] = []

    @asynccontextmanager
    async def hosts() -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                yield
            finally:
                ended.append("hosts")
                nursery.cancel_scope.cancel()

    async def main() -> None:
        running = hosts()
        await running.__aenter__()
        signal.raise_signal(signal.SIGINT)
        try:
            await trio.sleep_forever()
        except KeyboardInterrupt:
            await running.__aexit__(None, None, None)
            raise

    with pytest.raises(typer.Exit) as left:
        cli.interruptible(main)
    assert left.value.exit_code == 130
    assert ended == ["hosts"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_at_twenty_random_points_case_50(runs: Path) -> None:
    """Leave no process and no socket after Ctrl-C at random times."""
    rng = random.Random(50)
    for _ in range(20):
        interrupted(rng.uniform(0.2, 7.0), runs)


@pytest.mark.slow
@pytest.mark.usefixtures("started_zygote")
def test_memory_of_the_hosts_is_what_show_says(runs: Path) -> None:
    """Hold in each host its own tensors, as `show` states, and little else.

    A host needs at most a tenth more than its tensors, plus the memory of a bare interpreter with torch."""
    import trio

    import ranvier as package

    bare = subprocess.run(
        [sys.executable, "-c", "import torch; print(next(l for l in open('/proc/self/smaps_rollup') if 'Pss:' in l))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    bare_bytes = int(bare.stdout.split()[1]) * 1024
    graph = package.load(SMOLLM2)
    planned = {host.actor: host.weight_bytes for host in package.plan(graph).hosts}
    found: dict[str, tuple[int, int]] = {}

    async def main() -> None:
        async with package.launch(graph, runs=runs) as run:
            async for _ in run.generate("Hello", max_tokens=5):
                pass
            for host in run._supervisor.supervision.hosts.values():
                pid = run.pids[host.spec.identity]
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                pss = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
                found[host.spec.actor] = pss, host.held_bytes

    trio.run(main)
    for actor, weight_bytes in planned.items():
        pss, held = found[actor]
        assert held == weight_bytes
        assert pss <= 1.1 * weight_bytes + bare_bytes, f"{actor}: {pss} of {weight_bytes} + {bare_bytes}"
        assert pss >= weight_bytes


def test_actors_lists_every_kind() -> None:
    """List every kind with its inputs and outputs."""
    from ranvier.actors.component.kinds import BUILT_IN
    from ranvier.graph.file import catalogue

    told = json.loads(ranvier("actors", "--json").stdout)
    assert {entry["kind"] for entry in told} == set(BUILT_IN)
    listed = catalogue.text(told)
    for entry in told:
        assert entry["about"]
        assert f"{entry['kind']}: {', '.join(entry['inputs'])} -> {', '.join(entry['outputs'])}" in listed
        for side, ports in (("in ", entry["inputs"]), ("out", entry["outputs"])):
            for port, spec in ports.items():
                assert f"    {side}  {port}: {spec}" in listed
    [decoder] = [entry for entry in told if entry["kind"] == "decoder"]
    assert decoder["inputs"]["memory"] == "dtype[tokens, hidden] once per session"


INSTALLED = """
import torch
from ranvier import Actor, TensorSpec

class Scale(Actor):
    "Gives x times a factor."
    inputs = {"x": TensorSpec("float32", ("tokens", 4))}
    outputs = {"y": TensorSpec("float32", ("tokens", 4))}
    args = {"factor": "what x is multiplied by"}

    def load(self, context):
        self.factor = context.args["factor"]

    def step(self, batch):
        return {"y": batch["x"] * self.factor}

class Shift(torch.nn.Module):
    "Adds a number."
    def __init__(self, by: float, twice: bool = False):
        super().__init__()
        self.by = by * (1 + twice)

    def forward(self, y):
        return {"z": y + self.by}
"""


@pytest.mark.slow
def test_kinds_of_an_installed_package(tmp_path: Path, runs: Path) -> None:
    """Run kinds of an installed package, by their entry points and without --allow-code.

    They are listed with ports and arguments, checked, and run over real processes. A kind that cannot be loaded is
    listed with the reason, and affects no other."""
    import torch
    from safetensors.torch import load_file, save_file

    site = tmp_path / "site"
    (site / "parts-1.0.dist-info").mkdir(parents=True)
    (site / "parts_for_ranvier.py").write_text(INSTALLED)
    (site / "parts-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: parts\nVersion: 1.0\n")
    (site / "parts-1.0.dist-info" / "entry_points.txt").write_text(
        "[ranvier.actors]\nscale = parts_for_ranvier:Scale\nshift = parts_for_ranvier:Shift\nlost = nowhere_at_all:Lost\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    told = {entry["kind"]: entry for entry in json.loads(ranvier("actors", "--json", env=environment).stdout)}
    assert told["scale"]["inputs"] == {"x": "float32[tokens, 4]"}
    assert told["scale"]["args"] == {"factor": "what x is multiplied by"}
    assert list(told["shift"]["inputs"]) == ["y"]
    assert told["shift"]["args"] == {"by": "required", "twice": "False if it is not given"}
    assert told["lost"]["error"] == "ModuleNotFoundError: No module named 'nowhere_at_all'"
    assert "cannot be loaded: ModuleNotFoundError" in ranvier("actors", env=environment).stdout
    graph = tmp_path / "graph.yaml"
    graph.write_text(
        "{ranvier: 1, name: installed, actors: {a: {kind: scale, args: {factor: 3.0}}, b: {kind: shift, args: {by: 1.0, twice: true}}},"
        " pipeline: [a, b], edges: [gateway.x -> a.x, b.z -> gateway.z]}"
    )
    save_file({"x": torch.ones(2, 4)}, tmp_path / "in.safetensors")
    call = ("run", str(graph), "--runs", str(runs), "--input", "in.safetensors", "--output", "out.safetensors")
    done = ranvier(*call, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["z"], torch.full((2, 4), 5.0))
    wrong = ranvier("check", str(graph), "--set", "actors.a.args.faktor=2", env=environment)
    assert wrong.returncode == 2
    assert "actor a: scale takes no argument 'faktor'; did you mean 'factor'?" in wrong.stderr


def test_what_a_module_gives_is_found_out(tmp_path: Path) -> None:
    """Give a new name to a size that is another size plus a number.

    It is not the size of any other output."""
    from torch import nn

    from ranvier.actors.component import module
    from ranvier.transport.format.tensor_spec import TensorSpec

    class Wider(nn.Module):
        def forward(self, a: Any, b: Any) -> Any:
            return {"c": nn.functional.pad(a, (1, 1)), "d": nn.functional.pad(a, (0, 4)), "e": b.clone()}

    made = module.probe(Wider, {}, {name: TensorSpec("float32", ("tokens", f"{name}w")) for name in ("a", "b")}).outputs
    assert {port: str(spec) for port, spec in made.items()} == {
        "c": "float32[tokens, c_1]", "d": "float32[tokens, d_1]", "e": "float32[tokens, bw]"
    }  # fmt: skip


@pytest.mark.slow
def test_a_new_actor_works_as_it_is(tmp_path: Path, runs: Path) -> None:
    """Run what `new actor` writes, unchanged, and overwrite nothing."""
    import torch
    from safetensors.torch import load_file, save_file

    assert ranvier("new", "actor", "my_part", cwd=tmp_path).returncode == 0
    again = ranvier("new", "actor", "my_part", cwd=tmp_path)
    assert again.returncode == 2
    assert "my_part.py exists; choose another name" in again.stderr
    x = torch.arange(8.0).view(2, 4)
    save_file({"x": x}, tmp_path / "in.safetensors")
    call = ("run", "my_part.yaml", "--allow-code", "--runs", str(runs), "--input", "in.safetensors")
    done = ranvier(*call, "--output", "out.safetensors", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"] == {"y": "float32[2, 4]"}
    assert torch.equal(load_file(tmp_path / "out.safetensors")["y"], x * 2)
    (tmp_path / "in.safetensors").write_bytes(b"rubbish")
    assert ranvier(*call, cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("name", ["My Part", "", "9lives", "x" * 40, "../up"])
def test_a_new_part_needs_a_name(name: str) -> None:
    """Refuse an invalid name for a new part."""
    from ranvier.graph.file import starts

    with pytest.raises(ValueError, match="expected lower-case letters"):
        starts.actor(name)


@pytest.mark.parametrize("name", ["none", "gateway", "true", "class", "lambda", "on"])
def test_a_new_part_needs_a_name_that_is_free(name: str) -> None:
    """Refuse a name that is reserved in Python, YAML or Ranvier."""
    from ranvier.graph.file import starts

    with pytest.raises(ValueError, match="is a word of Python, of YAML or of Ranvier itself"):
        starts.actor(name)


def test_a_new_graph_is_good(tmp_path: Path) -> None:
    """Write a valid graph with `new graph`."""
    assert ranvier("new", "graph", "mine", cwd=tmp_path).returncode == 0
    assert ranvier("check", "mine.yaml", cwd=tmp_path).returncode == 0
