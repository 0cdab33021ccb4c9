"""Replay the recorded steps of an actor alone, with the same bits, or report a mismatch."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from linux import only_linux
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ranvier
from ranvier.actors.errors import RecordingError
from ranvier.actors.trace.recording_reader import Recorded, RecordedStep, recordings
from ranvier.graph.commands import cli
from ranvier.graph.replay import replay
from ranvier.graph.replay.diverge import diverge

CUSTOM = Path(__file__).parents[1] / "custom"
PROMPTS = [list(range(3 + index, 12 + 2 * index)) for index in range(6)]
Streamed = Callable[..., Path]


def of(run: Path, name: str) -> Recorded:
    """Return the recording `name` of a run."""
    [found] = [recorded for recorded in recordings(run) if recorded.name == name]
    return found


def again(run: Path, name: str) -> replay.Replayed:
    """Replay the recording `name` of a run."""
    return replay.replay(of(run, name), 0.0, lambda _: None)


def test_every_actor_takes_its_steps_again(streamed: Streamed, runs: Path) -> None:
    """Give the same bits when an actor repeats its steps, and record all that went over its edges.

    Six streams ran at once, in batches of any size."""
    run = streamed(runs, PROMPTS, 5, record={"edges": "all"})
    for actor in ("embed.0", "lower.0", "upper.0", "head.0"):
        done = again(run, actor)
        assert done.mismatches == () and done.largest == 0.0
        assert done.sessions == len(PROMPTS)
        assert done.compared >= done.steps > 5
    tokens = sum(len(prompt) + 4 for prompt in PROMPTS)
    taken = [event for event in of(run, "lower.0").events() if isinstance(event, RecordedStep)]
    assert sum(row.tokens for step in taken for row in step.rows) == tokens
    sent = {row[:3]: at for step in taken for row, at in _by_row(step.outputs["hidden"], "hidden")}
    came = [event for event in of(run, "upper.0").events() if isinstance(event, RecordedStep)]
    for step in came:
        for row, at in _by_row(step.inputs["hidden"], "hidden"):
            assert torch.equal(at, sent[row[:3]])


def _by_row(batch: Any, port: str) -> list[tuple[Any, torch.Tensor]]:
    """Return each row of a port with its part of the tensor."""
    parts = torch.split(batch[port], [row.tokens for row in batch.rows])
    return list(zip(batch.rows, parts, strict=True))


@only_linux
def test_compiled_layers_one_by_one_are_the_same_bits(tiny: Any, tmp_path: Path, runs: Path) -> None:
    """Give the same bits layer by layer as in one call.

    The compiled kernels compute all layers of an actor in one call. If the layers are watched, they are computed one
    after the other."""
    model, _ = tiny(
        "wide", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=128
    )
    (tmp_path / "graph.yaml").write_text(json.dumps({
        "ranvier": 1, "name": "t", "model": {"source": "unset", "dtype": "bfloat16"}, "record": {}, "prefill_chunk": 4,
        "actors": {"first": {"kind": "first_stage", "layers": "0-3"}, "last": {"kind": "last_stage", "layers": "4-5"}},
        "pipeline": ["first", "last"],
    }))  # fmt: skip
    graph = ranvier.load(tmp_path / "graph.yaml", overrides={"model.source": str(model)})
    run = trio.run(_stream, graph, runs, PROMPTS[0])
    assert again(run, "first.0").mismatches == ()
    seen: list[Any] = []
    for taken in replay.steps(of(run, "first.0"), lambda _: None, lambda layer, *_: seen.append(layer)):
        assert [mismatch.size for mismatch in replay.mismatches(taken)] == [0.0]
    assert seen[:5] == [None, 0, 1, 2, 3]
    found = diverge(run, None, None, None, lambda _what, _share: None)
    assert found.first is None and not found.notes, found
    assert {"hidden 4", "hidden 5", "hidden 6", "logits"} <= {place.name for place in found.largest}
    assert all(size < found.threshold for size in found.largest.values()) and any(found.largest.values())


async def _stream(graph: ranvier.Graph, runs: Path, prompt: Sequence[int], kill: str | None = None) -> Path:
    async with ranvier.launch(graph, runs=runs) as run:
        count = 0
        async for _ in run.generate(prompt, max_tokens=8 if kill is None else 100, stop_tokens=()):
            count += 1
            if count == 3 and kill is not None:
                os.kill(run.pids[kill], signal.SIGKILL)
        assert len(run.recoveries) == (kill is not None)
    return run.dir


def test_what_came_after_a_recovery_is_replayed(tiny: Any, tmp_path: Path, runs: Path, split: Any) -> None:
    """Replay what came after a recovery.

    The head, which has no state, is killed. The blocks go back to a position, and so does their replay."""
    model, _ = tiny("llama")
    (tmp_path / "graph.yaml").write_text(json.dumps({
        "ranvier": 1, "name": "t", "model": {"source": str(model), "dtype": "float32"}, "record": {}, **split(4, 6),
    }))  # fmt: skip
    graph = ranvier.load(tmp_path / "graph.yaml", overrides={"model.source": str(model)})
    run = trio.run(_stream, graph, runs, PROMPTS[0], "head.0.1")
    assert "head.0.2" in {recorded.name for recorded in recordings(run)}
    lines = (run / "record" / "blocks0.0" / "index.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines].count("rewind") == 1
    for name in ("blocks0.0", "blocks1.0", "head.0.2"):
        assert again(run, name).mismatches == (), name


@pytest.fixture
def faulty(tmp_path: Path, runs: Path) -> Callable[..., Path]:
    """Provide `faulty(values, record=…, args=…)`, which returns the folder of a run of two actors.

    Each actor adds one. Calls that fail are ignored."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")

    def make(values: Sequence[Sequence[float]], **settings: Any) -> Path:
        args = settings.pop("args", {})
        (tmp_path / "graph.yaml").write_text(json.dumps({
            "ranvier": 1, "name": "t",
            "actors": {"one": {"kind": "./faulty.py:Faulty"}, "two": {"kind": "./faulty.py:Faulty", "args": args}},
            "edges": ["gateway.x -> one.x", "one.y -> two.x", "two.y -> gateway.y"], "record": {}, **settings,
        }))  # fmt: skip
        graph = ranvier.load(tmp_path / "graph.yaml", allow_code=True)

        async def main() -> Path:
            async with ranvier.launch(graph, runs=runs) as run:
                for value in values:
                    with contextlib.suppress(ranvier.ActorFailed):
                        await run.call(x=torch.tensor(value))
            return run.dir

        return trio.run(main)

    return make


def test_a_step_that_failed_fails_again_under_the_debugger(faulty: Callable[..., Path]) -> None:
    """Fail again in the replay of a step that failed, and stop the debugger before it.

    Session 2 raised an error in the run."""
    run = faulty([[1.0], [12.0], [2.0]], args={"at_step": "raise"})
    assert [step.error for step in of(run, "two.0").events() if isinstance(step, RecordedStep)] == [
        None, "ValueError: thirteen is not a number I like", None
    ]  # fmt: skip
    done = again(run, "two.0")
    assert (done.steps, done.compared, done.mismatches) == (3, 3, ())
    commands = "p batch.rows[0].session, batch['x'].tolist()\ncontinue\n"
    debugged = subprocess.run(
        [sys.executable, "-m", "ranvier", "replay", str(run), "two", "--allow-code", "--debug", "1"],
        input=commands, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert debugged.returncode == 0, debugged.stderr
    assert "(2, [13.0])" in debugged.stdout
    assert "faulty.py" in debugged.stdout and "all 3 outputs are the same bit for bit" in debugged.stdout


def test_a_state_that_was_restored(tmp_path: Path, runs: Path) -> None:
    """Replay from a restored state.

    An actor that sums over all sessions is killed. Its replacement continues with its sum, and so does the replay."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    (tmp_path / "graph.yaml").write_text(json.dumps({
        "ranvier": 1, "name": "t", "actors": {"sum": {"kind": "./faulty.py:Remembering"}}, "record": {},
        "edges": ["gateway.x -> sum.x", "sum.y -> gateway.y"], "restart": {"max": 2, "backoff_s": 0.01, "snapshot_s": 0},
    }))  # fmt: skip
    graph = ranvier.load(tmp_path / "graph.yaml", allow_code=True)

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:
            assert (await run.call(x=torch.tensor([5.0])))["y"].tolist() == [5.0]
            os.kill(run.pids["sum.0.1"], signal.SIGKILL)
            while not run.recoveries:
                await trio.sleep(0.01)
            assert (await run.call(x=torch.tensor([2.0])))["y"].tolist() == [7.0]
        return run.dir

    run = trio.run(main)
    done = again(run, "sum.0.2")
    assert (done.steps, done.compared, done.mismatches) == (1, 1, ())


def test_a_folder_that_would_start_something_else(faulty: Callable[..., Path]) -> None:
    """Start what a run's folder names only if a graph file could name it (case 45)."""
    run = faulty([[1.0]])
    host = run / "record" / "two.0" / "host.json"
    told = json.loads(host.read_text())
    host.write_text(json.dumps({**told, "folder": None, "implementation": "os:system"}))
    for arguments in (["replay", str(run), "two"], ["diverge", str(run), str(run)]):
        done = CliRunner().invoke(cli.app, [*arguments, "--allow-code"])
        assert "two.0: os:system is not an installed kind of actor" in str(done.exception)
    index = run / "record" / "one.0" / "index.jsonl"
    index.write_text(index.read_text().replace('"rows"', '"raws"'))
    with pytest.raises(RecordingError, match=r"one\.0: no recording of an actor, or a damaged one: .*`rows`"):
        again(run, "one.0")


def test_what_may_not_be_replayed(faulty: Callable[..., Path]) -> None:
    """Refuse code that is not allowed, inputs that were not recorded, and actors or steps that do not exist."""
    run = faulty([[1.0]], record={"edges": ["two.y"]})
    command = CliRunner()
    for arguments, expected in (
        (["two"], "is code of a graph's own folder (faulty.py:Faulty in "),
        (
            ["two", "--allow-code"],
            "two.0: expected all inputs to be recorded, missing x; run it with --record two",
        ),
        (["one"], "no actor 'one' was recorded; there are two.0"),
    ):
        done = command.invoke(cli.app, ["replay", str(run), *arguments])
        assert done.exception is not None and expected in str(done.exception)
    whole = faulty([[1.0]])
    wrong = command.invoke(cli.app, ["replay", str(whole), "two", "--allow-code", "--debug", "5"])
    assert "two.0: expected a step from 0 to 0, got 5" in str(wrong.exception)


def test_an_output_that_is_another_than_it_was(faulty: Callable[..., Path]) -> None:
    """Report an output that differs from the recorded one, unless the difference is within the tolerance."""
    run = faulty([[1.0, 2.0], [4.0, 5.0]])
    file = run / "record" / "two.0" / "00000.safetensors"
    kept = load_file(file)
    kept["1.out.y"] = kept["1.out.y"] + torch.tensor([0.0, 0.5])
    save_file(kept, file)
    command = CliRunner()
    done = command.invoke(cli.app, ["replay", str(run), "two", "--allow-code"])
    assert done.exit_code == 1
    assert "1 of 2 outputs differ; the first in step 1, y: element 1: expected 7.5, got 7" in done.stdout
    told = command.invoke(cli.app, ["replay", str(run), "two", "--allow-code", "--tolerance", "0.1", "--json"])
    assert told.exit_code == 0
    assert json.loads(told.stdout)["two.0"]["largest"] == pytest.approx(0.5 / (6**2 + 7.5**2) ** 0.5)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RecordingError, match=r"two\.0/00000\.safetensors"):
        again(run, "two.0")


def test_a_recording_has_a_bound(faulty: Callable[..., Path]) -> None:
    """End a recording at its size limit, with no hole in the middle, and continue the run."""
    large, small = [0.5] * 200_000, [1.0]
    run = faulty([small, large, small], record={"megabytes": 1})
    found = of(run, "two.0")
    assert found.steps == 1 and found.ends_early == "it reached the limit of 1 MiB; raise record.megabytes"
    done = CliRunner().invoke(cli.app, ["replay", str(run), "two", "--allow-code"])
    assert "the recording ends early: it reached the limit of 1 MiB" in done.stdout


def test_a_full_disk_ends_the_recording_alone(faulty: Callable[..., Path]) -> None:
    """End only the recording on a full disk, with the reason.

    The hosts may write no file over 100 kB, and continue to serve."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        run = faulty([[1.0] * 50_000, [1.0]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = of(run, "two.0")
    assert found.steps == 0 and "it cannot be written: " in found.ends_early
    assert not list((run / "record" / "two.0").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("names", "ports"),
    [
        ("all", {"one": (("x",), ("y",)), "two": (("x",), ("y",))}),
        (["one.y -> two.x"], {"one": ((), ("y",)), "two": (("x",), ())}),
        (["one.y->two.x"], {"one": ((), ("y",)), "two": (("x",), ())}),
        (["two"], {"one": ((), ("y",)), "two": (("x",), ("y",))}),
    ],
)
def test_what_is_recorded(names: Any, ports: Mapping[str, Any], tmp_path: Path) -> None:
    """Record the ports of the edges and actors that `record.edges` names."""
    shutil.copy(CUSTOM / "faulty.py", tmp_path / "faulty.py")
    path = tmp_path / "graph.yaml"
    path.write_text(json.dumps({
        "ranvier": 1, "name": "t", "actors": {"one": {"kind": "./faulty.py:Faulty"}, "two": {"kind": "./faulty.py:Faulty"}},
        "edges": ["gateway.x -> one.x", "one.y -> two.x", "two.y -> gateway.y"], "record": {"edges": names},
    }))  # fmt: skip
    planned = ranvier.plan(ranvier.load(path, allow_code=True))
    for spec in planned.host_specs(Path("/tmp/r"), Path("/tmp/r/s")):
        assert spec.record is not None
        assert (spec.record.inputs, spec.record.outputs) == ports[spec.actor]
