"""Check what a training keeps: all state of a module, each step once, and a folder for one training only.

The case numbers are those of the faults in docs/reliability.md."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ranvier
from ranvier.actors.component.module import read_state
from ranvier.graph.file.errors import RequestError
from ranvier.graph.training import checkpoints
from ranvier.graph.training.trainer import Step, Trained

Make = Callable[..., ranvier.Graph]
Train = Callable[..., Trained]


def section(last: str, **more: Any) -> dict[str, Any]:
    """Return a training section with a loss on the output `last` and these changes."""
    return {
        "data": {"source": "./parts.py:Numbers", "args": {"batch": 24}}, "batch": 24, "micro_batches": 4, "steps": 4,
        "loss": [{"of": last, "target": "label"}], "optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.0}, **more,
    }  # fmt: skip


def test_all_state_comes_back_whole_case_77(graph: Make, trained: Train, tmp_path: Path) -> None:
    """Restore all state from a checkpoint, through `weights:` and into plain torch.

    It includes integers, tied names and views. Non-persistent buffers are not saved."""
    layer = {"kind": "./parts.py:Layer", "args": {"width": 8, "to": 4, "last": True}}
    made = graph(
        {"all": {"kind": "./parts.py:Everything", "inputs": {"x": "float32[pictures, 8]"}}, "last": layer},
        ["gateway.x -> all.x", "all.output -> last.x", "last.output -> gateway.made"],
        section("last.output"),
    )
    folder = trained(made).folder
    assert folder is not None
    got = load_file(folder / "all.safetensors")
    assert {"one.weight", "two.weight"} <= got.keys()
    assert "hidden" not in got
    assert torch.equal(got["one.weight"], got["two.weight"])
    sys.path.insert(0, str(tmp_path))
    try:
        import parts  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    module = parts.Everything()
    read_state(module, folder / "all.safetensors", "all")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, got[name]), name
    assert int(module.calls) == 16
    assert int(module.norm.num_batches_tracked) == 16
    assert module.one.weight is module.two.weight
    plain = parts.Everything()
    plain.load_state_dict({name: tensor for name, tensor in got.items() if name != "wide"}, strict=False)
    assert int(plain.calls) == 16


def test_a_stage_that_changes_its_input_learns_as_in_plain_torch_case_64(
    graph: Make, trained: Train, tmp_path: Path
) -> None:
    """Learn the weights of plain torch in one process, if a stage begins with `nn.ReLU(inplace=True)`."""
    actors = {
        "one": {"kind": "./parts.py:Layer", "args": {"width": 8, "to": 8, "last": True}, "inputs": {"x": "float32[pictures, 8]"}},
        "two": {"kind": "./parts.py:InPlace", "args": {"width": 8, "to": 4}},
    }  # fmt: skip
    made = graph(
        actors,
        ["gateway.x -> one.x", "one.output -> two.x", "two.output -> gateway.made"],
        section("two.output", steps=3, save={"every": 1}, data={"source": "./parts.py:Numbers", "args": {"batch": 24}}),
    )
    folder = trained(made, keep=10).folder
    assert folder is not None
    first, *_ = sorted(folder.parent.glob("round-*"))
    sys.path.insert(0, str(tmp_path))
    try:
        import parts
    finally:
        sys.path.remove(str(tmp_path))
    one, two = parts.Layer(8, 8, last=True), parts.InPlace(8, 4)
    read_state(one, first / "one.safetensors", "one")
    read_state(two, first / "two.safetensors", "two")
    data = parts.Numbers(batch=24)
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.05)
    for step in (1, 2):
        optimizer.zero_grad()
        batch = data(step, validation=False)
        for part in range(4):
            x, label = (batch[name].chunk(4)[part] for name in ("x", "label"))
            (torch.nn.functional.cross_entropy(two(one(x)), label) / 4).backward()
        optimizer.step()
    got = load_file(folder / "two.safetensors")
    for name, tensor in two.state_dict().items():
        assert torch.allclose(tensor, got[name], atol=1e-6), name


def test_what_an_attempt_left_unfinished_is_not_kept_in_place_of_a_checkpoint(
    graph: Make, trained: Train, tmp_path: Path
) -> None:
    """Keep the newest complete checkpoint, although a lost attempt left shards of earlier and of later rounds."""
    made = graph(
        {"one": {"kind": "./parts.py:Layer", "args": {"width": 8, "to": 4, "last": True}, "inputs": {"x": "float32[pictures, 8]"}}},
        ["gateway.x -> one.x", "one.output -> gateway.made"],
        section("one.output", steps=3, save={"every": 1}),
    )  # fmt: skip
    for unfinished in ("round-00000000", "round-00000099"):
        (tmp_path / "out" / unfinished).mkdir(parents=True)
    folder = trained(made, keep=1).folder
    assert folder is not None
    assert (folder / "one.safetensors").exists()
    assert [each.name for each in sorted((tmp_path / "out").glob("round-*"))] == [folder.name, "round-00000099"]


@pytest.mark.slow
def test_two_trainings_into_one_folder_case_75(graph: Make, runs: Path, tmp_path: Path) -> None:
    """Refuse a second training into the same folder, with the reason.

    The first training continues, and records each step once."""
    shutil.copy(Path(__file__).parent / "parts.py", tmp_path / "parts.py")
    made = graph(
        {"one": {"kind": "./parts.py:Layer", "args": {"width": 8, "to": 4, "last": True}, "inputs": {"x": "float32[pictures, 8]"}}},
        ["gateway.x -> one.x", "one.output -> gateway.made"],
        section("one.output", steps=300),
    )  # fmt: skip
    command = [
        sys.executable, "-m", "ranvier", "train", str(made.path), "--allow-code", "--out", str(tmp_path / "out"),
        "--runs", str(runs),
    ]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    history = tmp_path / "out" / "history.jsonl"
    until_s = time.monotonic() + 60
    while not (history.exists() and history.stat().st_size) and time.monotonic() < until_s:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second begins
    try:
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=100)
    assert first.returncode == 0, errors
    assert second.returncode == 2
    assert "another training writes there" in second.stderr
    steps = [json.loads(line)["step"] for line in history.read_text().splitlines()]
    assert steps == list(range(1, 301))


def test_a_folder_is_claimed_by_one_case_75(tmp_path: Path) -> None:
    """Let only one training at a time claim a folder."""
    with (
        checkpoints.claimed(tmp_path / "out"),
        pytest.raises(RequestError, match="another training writes there"),
        checkpoints.claimed(tmp_path / "out"),
    ):
        pass
    with checkpoints.claimed(tmp_path / "out"):
        pass


@pytest.mark.slow
def test_a_training_that_goes_on_tells_each_step_once_case_75(graph: Make, runs: Path, tmp_path: Path) -> None:
    """Record each step once in `history.jsonl`, if a training is killed after a checkpoint and run again."""
    made = graph(
        {"one": {"kind": "./parts.py:Layer", "args": {"width": 8, "to": 4, "last": True}, "inputs": {"x": "float32[pictures, 8]"}}},
        ["gateway.x -> one.x", "one.output -> gateway.made"],
        section("one.output", steps=400, save={"every": 50}),
    )  # fmt: skip
    command = [
        sys.executable, "-m", "ranvier", "train", str(made.path), "--allow-code", "--out", str(tmp_path / "out"),
        "--runs", str(runs),
    ]  # fmt: skip
    history = tmp_path / "out" / "history.jsonl"
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s and not (history.exists() and len(history.read_text().splitlines()) > 60):
        time.sleep(0.002)
    first.kill()
    first.wait(10)
    assert len(history.read_text().splitlines()) < 400
    second = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert second.returncode == 0, second.stderr
    steps = [json.loads(line)["step"] for line in history.read_text().splitlines()]
    assert steps == list(range(1, 401))


@pytest.mark.slow
def test_a_disk_that_is_full_costs_a_training_checkpoints_alone_case_58(
    graph: Make, trained: Train, tmp_path: Path
) -> None:
    """Lose only checkpoints while the disk is full.

    No host may write from the fourth step to the fourteenth. Checkpoints of that time are left out and counted. The
    losses and the last checkpoint are those of a training with room."""
    row = {
        "one": {"kind": "./parts.py:Layer", "args": {"width": 8, "to": 8, "last": True}, "inputs": {"x": "float32[pictures, 8]"}},
        "two": {"kind": "./parts.py:Layer", "args": {"width": 8, "to": 4, "last": True}},
    }  # fmt: skip
    edges = ["gateway.x -> one.x", "one.output -> two.x", "two.output -> gateway.made"]
    made = graph(row, edges, section("two.output", steps=24, save={"every": 2}))
    expected = trained(made, out="whole")
    pids: dict[str, int] = {}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(step: Step) -> None:
        limit = {4: 0, 14: soft}.get(step.step)
        if limit is not None:
            for pid in pids.values():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))

    got = trained(made, out="full", on_step=on_step, on_started=pids.update)
    assert not got.losses
    assert [told["loss"] for told in got.history] == [told["loss"] for told in expected.history]
    assert sum(counters.get("saves_failed", 0) for counters in got.counters.values()) >= 4
    assert got.folder is not None
    assert expected.folder is not None
    for name in ("one", "two"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (got.folder, expected.folder))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
