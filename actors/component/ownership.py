"""Find out whether anybody else can still reach the memory that a step returned.

An actor may return a buffer that it fills again in the next step, a view of its input, or a tensor that it keeps. Such memory
is copied before it waits or is passed by reference (`transport.format.message.stable`). A tensor that only its message holds
needs no copy: a copy of 16 MiB takes 2.5 ms.

Torch does not report whether anything else holds a tensor's memory. So all reference counts, of Python and of torch, are
compared with those of a tensor that this module creates in the same calls. The counts depend on the versions of both. If a
count differs, the memory is treated as reachable and is copied. The check takes 3 µs, and is made for large tensors only.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ranvier.transport.format.message import COPY_BELOW_BYTES

from .actor import Batch

Counts = tuple[object, ...]
_NONE = frozenset[str]()
_uses_of_storage: Any = getattr(torch._C, "_storage_Use_Count", None)
_uses_of_tensor: Any = getattr(torch.Tensor, "_use_count", None)


def soles(outputs: Mapping[str, torch.Tensor | Batch], inputs: Batch) -> frozenset[str]:
    """Return the ports of a step's outputs whose memory nobody else holds.

    Call this right after the step, while exactly one variable refers to `outputs`. An output that is itself an input is
    included if the actor no longer holds it: its memory belongs to the message.
    """
    found = [port for port, value in outputs.items() if _is_large(port, value)]
    return frozenset([port for port in found if _counts(outputs, port, inputs) in _EXPECTED]) if found else _NONE


def _is_large(port: str, value: object) -> bool:
    tensor = value.tensors.get(port) if isinstance(value, Batch) else value
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or not tensor.is_cpu:
        return False
    return tensor.nbytes >= COPY_BELOW_BYTES


def _counts(outputs: Mapping[str, torch.Tensor | Batch], port: str, inputs: Batch) -> Counts:
    value = outputs[port]
    batch = value if isinstance(value, Batch) else None
    held_by = batch.tensors if batch is not None else None
    tensor = value.tensors[port] if isinstance(value, Batch) else value
    del value
    known = sum([given is tensor for given in inputs.tensors.values()])
    storage = tensor.untyped_storage()
    return (
        type(outputs),
        type(tensor),
        type(held_by),
        bool(known),
        weakref.getweakrefcount(tensor),
        sys.getrefcount(outputs),
        sys.getrefcount(tensor) - known,
        sys.getrefcount(held_by) if held_by is not None else 0,
        sys.getrefcount(batch) if batch is not None else 0,
        sys.getrefcount(storage),
        _uses_of_tensor(tensor),
        _uses_of_storage(storage._cdata),
        storage.resizable(),
        bool(storage.is_shared()),
    )


def _expected() -> frozenset[Counts]:
    """Return the counts for memory that nobody else holds.

    Return an empty set if memory that something else holds can have the same counts.
    """
    if _uses_of_storage is None or _uses_of_tensor is None:
        return frozenset()
    with torch.inference_mode():
        good = {_of_step(kind, "") for kind in _KINDS}
        bad = {_of_step(kind, held) for kind in _KINDS for held in _HOLDERS}
    return frozenset() if good & bad else frozenset(good)


_KINDS = ("new", "new batch", "received", "received batch", "aligned", "aligned batch")
"""Kinds of outputs: a tensor that the step created, or an input, as received or as a copy (`Batch.aligned`)."""
_HOLDERS = ("tensor", "view", "detached", "array", "storage", "outputs", "batch")


def _of_step(kind: str, held: str) -> Counts:
    """Return the counts of one output as a host sees them, while the actor holds the output in the way `held`."""
    received = torch.frombuffer(bytearray(8), dtype=torch.float32).view(1, 2)
    inputs = Batch((), {"x": torch.ones(1, 2) if kind.startswith("aligned") else received})
    del received
    kept: list[object] = []
    outputs = _stepped(inputs, kind, held, kept)
    made = _counts_of(outputs, inputs)
    kept.clear()
    return made


def _counts_of(outputs: Mapping[str, torch.Tensor | Batch], inputs: Batch) -> Counts:
    """Count in the same way as `soles`."""
    [made] = [_counts(outputs, port, inputs) for port in ["x"]]
    return made


def _stepped(inputs: Batch, kind: str, held: str, kept: list[object]) -> dict[str, torch.Tensor | Batch]:
    tensor = torch.ones(1, 2) if kind.startswith("new") else inputs["x"]
    outputs: dict[str, torch.Tensor | Batch] = {"x": Batch((), {"x": tensor}) if kind.endswith("batch") else tensor}
    ways: dict[str, Callable[[], object]] = {
        "tensor": lambda: tensor,
        "view": lambda: tensor[:1],
        "detached": lambda: tensor.detach(),
        "array": lambda: tensor.numpy(),
        "storage": lambda: tensor.untyped_storage(),
        "outputs": lambda: outputs,
        "batch": lambda: outputs["x"],
    }
    if held:
        kept.append(ways[held]())
    return outputs


_EXPECTED = _expected()
