"""Check training that goes wrong: kills at every stage, interruptions, what cannot be trained, and NaN or infinity."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

import ranvier
from ranvier.graph.training.planner import training_plan
from ranvier.graph.training.trainer import Step, Trained, train

Make = Callable[..., ranvier.Graph]
Train = Callable[..., Trained]
STEPS = 12
LAYER = "./parts.py:Layer"
ROW = {
    "one": {"kind": "./parts.py:Dropping", "args": {"width": 8, "to": 16}, "inputs": {"x": "float32[pictures, 8]"}},
    "two": {"kind": LAYER, "args": {"width": 16, "to": 12}},
    "three": {"kind": LAYER, "args": {"width": 12, "to": 4, "last": True}},
}  # fmt: skip
EDGES = ["gateway.x -> one.x", "one.output -> two.x", "two.output -> three.x", "three.output -> gateway.made"]


def section(**more: Any) -> dict[str, Any]:
    """Return a training section with these changes."""
    return {
        "data": {"source": "./parts.py:Numbers", "args": {"batch": 24}}, "batch": 24, "micro_batches": 4, "steps": STEPS,
        "loss": [{"of": "three.output", "target": "label"}], "optimizer": {"kind": "adamw", "lr": 0.01, "clip": 0.1},
        "validate": {"every": 3, "batches": 2}, "save": {"every": 3}, **more,
    }  # fmt: skip


def without_times(trained: Trained) -> list[dict[str, Any]]:
    """Return the history without its times."""
    return [{key: value for key, value in told.items() if key != "seconds"} for told in trained.history]


# -- kills --------------------------------------------------------------------------------------------------------------


AHEAD = 4
"""A kill is noticed before this many further steps are reported.

The gateway sends two steps ahead, and a step's loss arrives before its norm."""
LONG = 18


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("async", marks=pytest.mark.slow)])
def test_a_stage_is_killed_and_the_losses_are_the_same(seed: int, schedule: str, graph: Make, trained: Train) -> None:
    """Give the same losses, norms and validations, to the last bit, when stages are killed.

    One stage is killed, or each stage once, at steps that the seed gives. The kills are so far apart that the gateway
    notices each before the next, however late it is. The model uses dropout, and its optimiser has state."""
    chance = random.Random(seed)
    made = graph(
        ROW, EDGES, section(schedule=schedule, steps=LONG), restart={"max": 10, "window_s": 600, "backoff_s": 0}
    )
    expected = trained(made, out="whole")
    names = chance.sample(["one", "two", "three"], 3 if seed else 1)
    free = sorted(chance.sample(range(1, LONG - AHEAD - (AHEAD - 1) * (len(names) - 1) + 1), len(names)))
    victims = {step + (AHEAD - 1) * index: name for index, (step, name) in enumerate(zip(free, names, strict=True))}
    assert max(victims) <= LONG - AHEAD
    pids: dict[str, int] = {}
    killed: list[str] = []
    attempts: list[int] = []

    def on_step(step: Step) -> None:
        victim = victims.pop(step.step, None) if not step.validation else None
        if victim is not None:
            attempts.append(next(iter(pids.values())))
            killed.append(victim)
            os.kill(next(pid for key, pid in pids.items() if key.startswith(f"{victim}.")), signal.SIGKILL)

    def on_started(found: Mapping[str, int]) -> None:
        pids.clear()
        pids.update(found)

    got = trained(made, out="killed", on_step=on_step, on_started=on_started)
    assert sorted(killed) == sorted(names)
    assert len(set(attempts)) == len(names), "two were killed in one attempt"
    assert len(got.losses) == len(names)
    assert all("signal 9" in what for what in got.losses)
    assert without_times(got) == without_times(expected)


@pytest.mark.parametrize(
    ("faults", "happened"),
    [({"flip": 0.04}, "flipped"), pytest.param({"reset_after_bytes": 20_001}, "reset", marks=pytest.mark.slow),
     pytest.param({"reorder": 0.3}, "reordered", marks=pytest.mark.slow)],
)  # fmt: skip
def test_bad_links_change_nothing(
    faults: Mapping[str, float], happened: str, graph: Make, trained: Train, tmp_path: Path
) -> None:
    """Give the same losses over links that damage, reset or reorder messages.

    The faults are between all stages and to the gateway, both ways. What was damaged is requested again."""
    expected = trained(graph(ROW, EDGES, section()), out="whole")
    bad = tmp_path / "chaos.yaml"
    bad.write_text(json.dumps({"links": [{**faults, "seed": 5}]}))
    got = trained(graph(ROW, EDGES, section(), transport="tcp://127.0.0.1"), out="bad", chaos=bad)
    assert got.counters["chaos"][happened] > 0
    assert not got.losses
    assert without_times(got) == without_times(expected)


@pytest.mark.slow
def test_an_actor_that_is_lost_too_often_ends_the_training(graph: Make, trained: Train) -> None:
    """End the training when an actor is lost more often than `restart` allows."""
    made = graph(ROW, EDGES, section(), restart={"max": 2, "window_s": 60, "backoff_s": 0})
    pids: dict[str, int] = {}

    def kill(step: Step) -> None:
        os.kill(next(pid for key, pid in pids.items() if key.startswith("two.")), signal.SIGKILL)

    def on_started(found: Mapping[str, int]) -> None:
        pids.clear()
        pids.update(found)

    with pytest.raises(ranvier.ActorFailed, match=r"two\.0.*signal 9"):
        trained(made, on_step=kill, on_started=on_started)


@pytest.mark.slow
def test_an_interrupted_training_goes_on_where_it_was(graph: Make, trained: Train, tmp_path: Path, runs: Path) -> None:
    """Continue a training that Ctrl-C interrupted, with the losses of one that was not interrupted."""
    made = graph(ROW, EDGES, section(steps=60, save={"every": 5}, validate={"every": 20, "batches": 2}))
    expected = trained(made, out="whole")
    command = [
        sys.executable, "-m", "ranvier", "train", str(tmp_path / "graph.yaml"), "--allow-code", "--json",
        "--out", str(tmp_path / "out"), "--runs", str(runs),
    ]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    history = tmp_path / "out" / "history.jsonl"
    while first.poll() is None and (not history.exists() or history.read_text().count("\n") < 12):
        pass
    first.send_signal(signal.SIGINT)
    out, errors = first.communicate(timeout=30)
    assert first.returncode == 130, errors
    assert not out
    again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    told = json.loads(again.stdout)
    assert "continuing from" in again.stderr
    assert told["steps"] == 60
    losses = [each["loss"] for each in expected.history if "validation" not in each]
    assert told["loss"] == losses[-1]
    latest = (tmp_path / "out" / "latest").read_text().strip()
    index = json.loads((tmp_path / "out" / latest / "index.json").read_text())
    assert [each["loss"] for each in index["history"] if "validation" not in each] == losses


def test_a_checkpoint_of_another_graph_is_not_touched(graph: Make, trained: Train, tmp_path: Path) -> None:
    """Overwrite nothing in a folder that has a training checkpoint of another graph."""
    trained(graph(ROW, EDGES, section(steps=3)))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    wider = {
        **ROW,
        "two": {**ROW["two"], "args": {"width": 16, "to": 20}},
        "three": {**ROW["three"], "args": {"width": 20, "to": 4, "last": True}},
    }
    with pytest.raises(ranvier.RequestError, match=r"a checkpoint of another graph.*nothing was overwritten"):
        trained(graph(wider, EDGES, section(steps=3)))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


# -- what cannot be trained -----------------------------------------------------------------------------------------------


def test_a_part_that_cannot_be_differentiated(graph: Make, trained: Train) -> None:
    """Name the actor and its output that cannot be differentiated."""
    actors = {
        **ROW,
        "two": {"kind": "./parts.py:Rounding"},
        "three": {**ROW["three"], "args": {"width": 16, "to": 4, "last": True}},
    }
    with pytest.raises(ranvier.ActorFailed, match=r"two\.0: output 'output' cannot be differentiated"):
        trained(graph(actors, EDGES, section()))


def test_a_number_that_is_none_names_who_had_it_first(graph: Make, trained: Train, tmp_path: Path) -> None:
    """Name the first actor with NaN or infinity, and keep the last good training checkpoint."""
    actors = {**ROW, "two": {"kind": "./parts.py:Exploding", "args": {"width": 16}},
              "three": {**ROW["three"], "args": {"width": 16, "to": 4, "last": True}}}  # fmt: skip
    with pytest.raises(ranvier.ActorFailed, match=r"two\.0: output 'output' of micro-batch 16 is not finite"):
        trained(graph(actors, EDGES, section()))
    assert (tmp_path / "out" / "latest").read_text().strip() == "round-00000003", "what was good before is there"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"micro_batches": 5}, "a batch of 24 cannot be cut into 5 micro-batches"),
        ({"schedule": "2f2b"}, "schedule '2f2b': neither one of gpipe, 1f1b"),
        ({"schedule": "../x"}, "leaves the graph's folder"),
        ({"loss": []}, "no loss; add loss"),
        ({"loss": [{"of": "three.logits", "target": "label"}]}, "loss of three.logits: no such output; it has output"),
        (
            {"loss": [{"of": "four.output", "target": "label"}]},
            "loss of four.output: no such output; there are one, two, three",
        ),
        ({"loss": [{"of": "three.output", "kind": "mse"}]}, "mse takes a target"),
        ({"loss": [{"of": "three.output", "kind": "mean", "target": "label"}]}, "mean takes no target"),
        ({"frozen": ["tow"]}, "no actor is called 'tow'"),
        ({"schedule": "async", "save": {"every": 5}}, "save: every 5 of 12 steps"),
        ({"schedule": "interleaved"}, "expected the actors in turn on each set of cpus"),
    ],
)
def test_what_the_plan_refuses(change: dict[str, Any], expected: str, graph: Make) -> None:
    """Refuse in the plan a training section that cannot work for this graph."""
    with pytest.raises(ranvier.GraphError, match=expected):
        training_plan(graph(ROW, EDGES, section(**change)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stepps": 5}, "unknown key 'stepps'; did you mean 'steps'"),
        ({"optimizer": {"kind": "adam"}}, "training.optimizer.kind"),
        ({"data": {"tekst": "./a"}}, "unknown key 'tekst'; did you mean 'text'"),
        ({"batch": 0}, "training.batch"),
    ],
)
def test_what_the_check_refuses(change: dict[str, Any], expected: str, graph: Make) -> None:
    """Refuse in the check a training section with unknown keys or bad values."""
    with pytest.raises(ranvier.GraphError, match=expected):
        graph(ROW, EDGES, section(**change))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "expected one of text, tokens, tensors, source, got none"),
        ({"text": "./a.txt", "tensors": "./b"}, "got text, tensors"),
        ({"tensors": "./none.safetensors"}, "no such file"),
        ({"tensors": "../none.safetensors"}, "leaves the graph's folder"),
        ({"tensors": "./parts.py"}, "parts.py: "),
        ({"text": "./parts.py"}, "text needs a model with a tokenizer"),
        ({"source": "./parts.py:Tokens", "args": {"batch": 24, "context": 1, "vocabulary": 9}}, "expected label, x, got target, token"),
        ({"source": "./parts.py:nobody"}, "expected a class"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit(data: dict[str, Any], expected: str, graph: Make, trained: Train) -> None:
    """Refuse data that does not fit the graph, and say what is expected."""
    with pytest.raises(ranvier.RequestError, match=expected):
        trained(graph(ROW, EDGES, section(data=data)))


def test_a_graph_without_a_section_says_so(graph: Make, tmp_path: Path) -> None:
    """Report that a graph file has no training section."""
    made = graph(ROW, EDGES, section())
    content = yaml.safe_load(made.path.read_text())
    del content["training"]
    made.path.write_text(yaml.safe_dump(content))
    with pytest.raises(ranvier.GraphError, match="there is no training: in this file"):
        training_plan(ranvier.load(made.path, allow_code=True))


@pytest.mark.slow
def test_a_training_that_hangs_says_why_and_shows_itself(graph: Make, runs: Path, tmp_path: Path) -> None:
    """Attach `ranvier why` and `ranvier top` to a training that hangs, as to any run."""
    actors = {**ROW, "two": {"kind": "./parts.py:Sleeping", "args": {"width": 16}},
              "three": {"kind": LAYER, "args": {"width": 16, "to": 4, "last": True}}}  # fmt: skip
    made = graph(actors, EDGES, section(), restart="never", supervision={"progress_deadline_s": 60.0})
    command = [sys.executable, "-m", "ranvier"]

    async def said(*words: str) -> dict[str, Any]:
        done = await trio.run_process(
            [*command, *words, "--json"], capture_stdout=True, capture_stderr=True, check=False
        )
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    async def main() -> None:
        pids: dict[str, int] = {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                partial(train, made, tmp_path / "out", allow_code=True, runs=runs, on_started=pids.update)
            )
            with trio.fail_after(90):
                while not pids:
                    await trio.sleep(0.05)
                await trio.sleep(1)
                [folder] = [path.parent.parent for path in runs.glob("*/sockets/supervisor")]
                told = await said("why", str(folder))
                assert [(each["who"], each["reason"]) for each in told["culprits"]] == [("two.0", "in a step")]
                assert any("time.sleep(3600)" in line for line in told["culprits"][0]["stack"])
                seen = await said("top", str(folder))
                assert {host["label"]: host["state"] for host in seen["hosts"]} == {
                    f"{name}.0": "running" for name in ("one", "two", "three")
                }
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
            nursery.cancel_scope.cancel()

    trio.run(main)
