"""Compute on a GPU (`device: cuda:1`): find out what is there, give it to one process, and bring tensors to it and back.

A process sees only its own GPU, which is `cuda:0` there. This module does not import torch: `check` asks it, too.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from .actor import Actor, Batch, RowsFailed

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")
Outputs = Mapping[str, "torch.Tensor | Batch"]

CPU = "cpu"
PATTERN = r"cpu|cuda(:\d{1,2})?"
GPU_FAILED = 76
"""Exit code of a process whose GPU answers with errors."""
CONTEXT_BYTES = 640 << 20
"""Memory that a process takes on its GPU before any tensor (measured on an H100: 618 MiB)."""
MEMORY_WAIT_S = 10.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NOT_INITIALISED = 3  # CUDA_ERROR_NOT_INITIALIZED, libcuda's answer before anything has used it


class NoDevice(Exception):
    """Report that a device cannot be used here, and why."""


class Gpu(NamedTuple):
    """Describe a GPU of this machine."""

    name: str
    total_bytes: int
    free_bytes: int


def number_of(device: str) -> int | None:
    """Return the number of a GPU among those that this process may use; None for the processor.

    Raises:
        ValueError: this is no device.
    """
    if not re.fullmatch(PATTERN, device):
        raise ValueError(f"device {device!r}: expected cpu, cuda or cuda:0")
    return None if device == CPU else int(device.partition(":")[2] or 0)


def gpu(device: str) -> Gpu:
    """Return the GPU that `device` names. No context is made: the driver's library for management is asked (NVML).

    Raises:
        NoDevice: this torch cannot use GPUs, the driver or its library is missing, or there are fewer GPUs.
    """
    number = number_of(device)
    assert number is not None
    if not _torch_has_cuda():
        raise NoDevice("the installed torch is built without CUDA; install a build with it")
    found = list(_visible(_all()))
    if number >= len(found):
        names = ", ".join(f"cuda:{at} ({each.name})" for at, each in enumerate(found)) or "none"
        raise NoDevice(f"there is no such GPU; this machine has {names}")
    return found[number]


def _all() -> list[Gpu]:
    try:
        import pynvml
    except ImportError:
        raise NoDevice("nvidia-ml-py is missing, which counts GPUs; pip install 'ranvier[gpu]'") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoDevice(f"NVIDIA's driver does not answer: {error}") from None
    try:
        found = []
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(Gpu(str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free)))
        return found
    except pynvml.NVMLError as error:
        raise NoDevice(f"NVIDIA's driver does not answer: {error}") from None
    finally:
        pynvml.nvmlShutdown()


def _visible(there: list[Gpu]) -> Iterator[Gpu]:
    """Yield the GPUs that `CUDA_VISIBLE_DEVICES` leaves, in its order.

    Raises:
        NoDevice: it names them otherwise than by number.
    """
    given = os.environ.get(_VISIBLE)
    if given is None:
        yield from there
        return
    for name in filter(None, map(str.strip, given.split(","))):
        if not name.isdigit():
            raise NoDevice(f"{_VISIBLE} is {given!r}; expected numbers, such as 0,1")
        if int(name) >= len(there):
            return  # CUDA also stops at the first that is not there
        yield there[int(name)]


def _torch_has_cuda() -> bool:
    found = importlib.util.find_spec("torch")
    places = found.submodule_search_locations if found is not None else None
    return any(place.exists() for each in places or () for place in (Path(each) / "lib").glob("libtorch_cuda*"))


def make_sure_of_fork(imported: str) -> None:
    """Check that nothing has used CUDA in this process: a process that is forked from it could not use it any more.

    `imported` names what this process was asked to import.

    Raises:
        NoDevice: something has.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver, so nothing has used it
        return
    if driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALISED:
        raise NoDevice(
            f"CUDA was used in the process that actors are forked from; one of {imported} does so when it is imported"
        )


def wait_for_memory(device: str, needed_bytes: int) -> bool:
    """Wait until so much of a GPU is free: the memory of a process that was killed comes back only after its end.

    Returns False if the memory has not come back in time. Whatever needs it then fails in its own words.

    Raises:
        NoDevice: the GPU does not answer.
    """
    until_s = time.monotonic() + MEMORY_WAIT_S
    while gpu(device).free_bytes < needed_bytes:
        if time.monotonic() > until_s:
            return False
        time.sleep(0.05)
    return True


def enter(device: str) -> None:
    """Give this process its GPU alone. Call this once, before anything uses CUDA."""
    number = number_of(device)
    if number is not None:
        given = os.environ.get(_VISIBLE)
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # in which NVML counts
        os.environ[_VISIBLE] = str(number) if given is None else given.split(",")[number].strip()


def own_name(device: str) -> str:
    """Return what a device is called in the process that has it."""
    return CPU if device == CPU else "cuda:0"


def place(actor: Actor, device: str) -> None:
    """Let an actor run on a GPU, before it is loaded.

    Its inputs are brought there, and its outputs back, unless they may stay (`Actor.stays`). While its code runs, the GPU is
    torch's default device, unless the actor itself makes its tensors there (`Actor.places`).
    """
    if device == CPU:
        return
    after = functools.partial(_left_there, actor, device) if actor.stays else brought_back

    def within(call: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(call)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            with ends_with_its_gpu(), nullcontext() if actor.places else _default(device):
                return call(*args, **kwargs)

        return called

    step, snapshot, restore = within(actor.step), within(actor.snapshot), within(actor.restore)

    def stepped(batch: Batch) -> Outputs:
        with ends_with_its_gpu():
            try:
                return after(step(_moved(batch, device, actor.on_host)))
            except RowsFailed as some:
                raise RowsFailed(after(some.outputs), some.failures) from None

    def restored(state: Mapping[str, torch.Tensor]) -> None:
        restore({name: tensor.to(device) for name, tensor in state.items()})

    vars(actor).update(
        load=within(actor.load), open=within(actor.open), rewind=within(actor.rewind), restore=restored,
        step=stepped, snapshot=lambda: {name: tensor.cpu() for name, tensor in snapshot().items()},
    )  # fmt: skip


@contextmanager
def ends_with_its_gpu() -> Iterator[None]:
    """End this process after an error that leaves its GPU unusable for it. It is replaced, and its sessions go on."""
    import torch

    try:
        yield
    except torch.AcceleratorError:  # OutOfMemoryError is another class; it ends the sessions of its step
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(GPU_FAILED)


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the memory of this machine: itself, if it is there or has no memory (meta)."""
    if tensor.is_cpu or tensor.is_meta:
        return tensor
    if not tensor.is_cuda:
        return tensor.cpu()
    import torch

    # torch keeps pinned memory for the next tensor; a copy to other memory would go through a buffer of the driver
    made = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with ends_with_its_gpu():
        made.copy_(tensor, non_blocking=True)
        wait()
    return made


def wait() -> None:
    """Wait until the GPU, if there is one, has done all that this thread has asked for."""
    import torch

    if _in_use():
        torch.cuda.current_stream().synchronize()


def _in_use() -> bool:
    """Return whether this process has used a GPU."""
    import torch

    cuda: Any = torch.cuda  # which has no types
    return bool(cuda.is_initialized())


def brought_back(outputs: Outputs) -> Outputs:
    """Return outputs whose tensors are in the memory of this machine."""
    return _each(outputs, here)


def seed(number: int) -> None:
    """Seed the random numbers of the processor and of the GPU, if it was used. `torch.manual_seed` takes 0.7 ms."""
    import torch

    torch.default_generator.manual_seed(number)
    if _in_use():
        torch.cuda.default_generators[0].manual_seed(number)


def _left_there(actor: Actor, device: str, outputs: Outputs) -> Outputs:
    """Return outputs that stay on the GPU, in memory that the actor will not write into again."""
    if not actor.makes_new:
        outputs = _each(outputs, lambda tensor: tensor.to(device, copy=True))
    if not actor.ahead:
        wait()
    return outputs


def _each(outputs: Outputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Outputs:
    """Change each tensor of outputs. Whatever else an actor returned is refused where outputs are sent."""
    import torch

    return {
        port: (
            Batch(made.rows, {name: change(tensor) for name, tensor in made.tensors.items()}, made.own_rows)
            if isinstance(made, Batch)
            else change(made) if isinstance(made, torch.Tensor) else made
        )
        for port, made in outputs.items()
    }  # fmt: skip


def _moved(batch: Batch, device: str, on_host: Sequence[str]) -> Batch:
    tensors = {
        port: tensor if port in on_host else tensor.to(device, non_blocking=True)
        for port, tensor in batch.tensors.items()
    }
    return Batch(batch.rows, tensors, batch.own_rows)


@contextmanager
def _default(device: str) -> Iterator[None]:
    import torch

    with torch.device(device):
        yield
