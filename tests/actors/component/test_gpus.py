"""Find GPUs, give a process its own, and run an actor's code there: with a library and a device that stand in for real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from second_device import GPU, OnGpu, pretended

from ranvier.actors.component import devices
from ranvier.actors.component.actor import Actor, Batch, Context, RowsFailed
from ranvier.actors.component.devices import CPU, Gpu, NoDevice, place
from ranvier.actors.component.module import ModuleActor, probe
from ranvier.transport.format.header import Row
from ranvier.transport.format.tensor_spec import TensorSpec

ROWS = (Row(1, 0, 0, 3),)
Driver = Callable[..., None]


def test_gpus_are_counted(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find a GPU by its number among those that this process may use."""
    driver("A", "B", "C")
    assert devices.gpu("cuda") == devices.gpu("cuda:0") == Gpu("A", 80 << 30, 40 << 30)
    assert devices.gpu("cuda:2").name == "C"
    with pytest.raises(NoDevice, match=r"this machine has cuda:0 \(A\), cuda:1 \(B\), cuda:2 \(C\)"):
        devices.gpu("cuda:3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 0,7,1")
    assert [devices.gpu(f"cuda:{number}").name for number in (0, 1)] == ["C", "A"]
    with pytest.raises(NoDevice, match=r"has cuda:0 \(C\), cuda:1 \(A\)$"):
        devices.gpu("cuda:2")  # those after one that is not there do not count
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(NoDevice, match="this machine has none"):
        devices.gpu("cuda:0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f6a")
    with pytest.raises(NoDevice, match="expected numbers"):
        devices.gpu("cuda:0")


def test_what_is_missing_is_named(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say whether torch, the library or the driver is missing."""
    driver("A", broken=True)
    with pytest.raises(NoDevice, match="does not answer: Driver/library version mismatch"):
        devices.gpu("cuda:0")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoDevice, match=r"pip install 'ranvier\[gpu\]'"):
        devices.gpu("cuda:0")
    monkeypatch.undo()
    if torch.version.cuda is None:
        with pytest.raises(NoDevice, match="built without CUDA"):
            devices.gpu("cuda:0")
    for wrong in ("cuda:", "cuda:100", "gpu", "mps", "cuda:-1", "cpu:0", ""):
        with pytest.raises(ValueError, match="expected cpu, cuda or cuda:0"):
            devices.number_of(wrong)


@pytest.mark.parametrize(
    ("visible", "device", "seen"), [(None, "cuda:1", "1"), ("3,1", "cuda:0", "3"), ("3,1", "cuda", "3")]
)
def test_a_process_sees_its_own_gpu(
    visible: str | None, device: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hide the other GPUs from a process, so that its own is cuda:0."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    before = dict(os.environ)
    devices.enter(CPU)
    assert os.environ == before
    devices.enter(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen and devices.own_name(device) == "cuda:0"


def test_a_restart_waits_for_memory(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait while the memory of a lost process is not back, and not for ever."""
    driver("A")
    library: Any = sys.modules["pynvml"]
    free = iter([1 << 30, 2 << 30, 30 << 30])
    monkeypatch.setattr(
        library, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(total=80 << 30, free=next(free, 3 << 30))
    )
    assert devices.wait_for_memory("cuda:0", 20 << 30)
    assert next(free, None) is None, "all three were asked for"
    monkeypatch.setattr(devices, "MEMORY_WAIT_S", 0.0)
    assert not devices.wait_for_memory("cuda:0", 20 << 30)


def test_a_fork_after_cuda_was_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the driver whether anything has used it, and name what was imported."""
    answers = {"libcuda.so.1": 3}

    def opened(name: str) -> Any:
        return SimpleNamespace(cuDeviceGetCount=lambda _: answers[name])

    monkeypatch.setattr(devices.ctypes, "CDLL", opened)
    devices.make_sure_of_fork("torch, flash")
    answers["libcuda.so.1"] = 0
    with pytest.raises(NoDevice, match="one of torch, flash does so when it is imported"):
        devices.make_sure_of_fork("torch, flash")


class Counter(Actor):
    """Make tensors by default, keep one, and refuse rows."""

    def load(self, context: Context) -> None:
        self.kept = torch.zeros(1)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        self.kept += batch["x"].sum() + torch.arange(3).sum()
        made = batch["x"] * torch.tensor([1.0, 2.0, 3.0])
        if batch.rows[0].session == 9:
            raise RowsFailed({"y": Batch(ROWS, {"y": made})}, {})
        return {"y": made, "z": Batch(ROWS, {"z": made + 1})}

    def snapshot(self) -> Mapping[str, torch.Tensor]:
        return {"kept": self.kept}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.kept = state["kept"].to(torch.empty(0).device)


def test_own_code_runs_on_a_device() -> None:
    """Make the device torch's default for an actor's own code, and bring outputs, also of a failure, and state back."""
    with torch.inference_mode(), pretended():
        actor = Counter()
        place(actor, str(GPU))
        actor.load(Context("a.0", {}, lambda _: None, device=str(GPU)))
        assert isinstance(actor.kept, OnGpu)
        made: Any = actor.step(Batch(ROWS, {"x": torch.ones(3)}))
        assert made["y"].tolist() == [1, 2, 3] and made["z"]["z"].tolist() == [2, 3, 4]
        state = actor.snapshot()
        assert state["kept"].tolist() == [6] and not isinstance(state["kept"], OnGpu)
        actor.restore(state)
        assert isinstance(actor.kept, OnGpu)
        with pytest.raises(RowsFailed) as failed:
            actor.step(Batch((Row(9, 0, 0, 3),), {"x": torch.ones(3)}))
        left: Any = failed.value.outputs["y"]
        assert left["y"].tolist() == [1, 2, 3]
        assert torch.zeros(1).device.type == "cpu", "only the actor's own code makes tensors there"


class Scaled(torch.nn.Module):
    """Multiply by a weight, plus a table that is made in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + torch.arange(4)


def test_a_module_runs_on_a_device() -> None:
    """Make a plain module's weights on the device, and run it there."""
    assert probe(Scaled, {}, {"x": TensorSpec("float32", ("tokens", 4))}).outputs.keys() == {"output"}
    with torch.inference_mode(), pretended():
        actor = ModuleActor(Scaled)
        place(actor, str(GPU))
        actor.load(Context("a.0", {}, lambda _: None, device=str(GPU)))
        assert all(isinstance(tensor.data, OnGpu) for tensor in actor.module.parameters())
        made: Any = actor.step(Batch(ROWS, {"x": torch.ones(3, 4)}))
        assert made["output"].tolist() == [[3, 4, 5, 6]] * 3


FAILS = """
import sys, torch
from ranvier.actors.component.actor import Actor, Batch
from ranvier.actors.component.devices import place
class Fails(Actor):
    places = True
    def step(self, batch):
        raise getattr(torch, sys.argv[1])("an illegal memory access was encountered")
actor = Fails()
place(actor, "meta")
try:
    actor.step(Batch((), {}))
except torch.OutOfMemoryError:
    sys.exit(3)
"""


def test_a_process_ends_with_its_gpu(tmp_path: Path) -> None:
    """End the process after an error of the GPU itself, with its words, but not when only memory is used up."""
    ends = {}
    for error in ("AcceleratorError", "OutOfMemoryError"):
        ends[error] = subprocess.run([sys.executable, "-c", FAILS, error], capture_output=True, text=True, cwd=tmp_path)
    assert [end.returncode for end in ends.values()] == [devices.GPU_FAILED, 3]
    assert "an illegal memory access" in ends["AcceleratorError"].stderr
