"""Provide the batches that a graph learns from. A step that is repeated gets the same batch again.

Shape suffixes: B sequences or examples of a batch, S tokens of a sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ranvier.actors.component import kinds
from ranvier.actors.component.kinds import KindError
from ranvier.transport.files import read_text

from ..check.checked import Graph
from ..file.errors import RequestError
from ..sessions import tokenizer
from .plan import NEXT, TrainingPlan

if TYPE_CHECKING:
    import numpy
    import torch

SOURCES = ("text", "tokens", "tensors", "source")
"""The keys under which a graph file may give its data."""

Tensors = Mapping[str, "torch.Tensor"]

MOST_BYTES = 1 << 32
"""Size limit of a text."""


class Data(Protocol):
    """Provide batches of tensors, by the names of the gateway's inputs and of targets.

    The first dimension is cut into micro-batches.
    """

    def training(self, step: int) -> Tensors:
        """Return the batch of a step, counted from 0."""

    def validation(self, index: int) -> Tensors:
        """Return one micro-batch of the data that is held out."""


def of(plan: TrainingPlan, allow_code: bool) -> Data:
    """Return the data that the graph file names.

    Raises:
        RequestError: the data does not exist, is too short, or lacks a name that the graph takes.
    """
    section, graph = plan.section.data, plan.graph
    given = [name for name in SOURCES if getattr(section, name) is not None]
    if len(given) != 1:
        raise RequestError(f"training: data: expected one of {', '.join(SOURCES)}, got {', '.join(given) or 'none'}")
    for name, read in (("text", _of_text), ("tokens", _of_tokens)):
        if given == [name]:
            file = _inside(graph, getattr(section, name))
            return _Windows(plan, read(plan, file), file.name)
    if section.tensors is not None:
        return _Stored(plan, _inside(graph, section.tensors, folders=True))
    assert section.source is not None
    return _Own(plan, section.source, allow_code)


def _inside(graph: Graph, given: str, *, folders: bool = False) -> Path:
    folder = graph.folder.resolve()
    path = (folder / given).resolve()
    if not path.is_relative_to(folder):
        raise RequestError(f"training: data: {given!r} leaves the graph's folder")
    if not path.is_file() and not (folders and path.is_dir()):
        raise RequestError(f"training: data: {given!r}: no such file; looked in the graph's folder")
    return path


def _generator(plan: TrainingPlan, step: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(plan.section.seed * 1_000_003 + step)


class _Windows:
    """Cut batches of windows from a row of tokens.

    For training, the seed and the step determine the positions. Validation goes through the held-out end in order.

    Args:
        ids_T: the tokens; this may be a mapped file.
        name: the name of the file, for errors.
    """

    def __init__(self, plan: TrainingPlan, ids_T: numpy.ndarray[Any, Any], name: str) -> None:
        self._plan, self._length = plan, plan.section.data.context
        held = int(len(ids_T) * plan.section.data.held_out)
        self._learned, self._held = ids_T[: len(ids_T) - held], ids_T[len(ids_T) - held :]
        if len(self._learned) <= self._length:
            raise RequestError(
                f"training: data: {name} has {len(ids_T)} tokens, {held} of them held out: expected more than the "
                f"context, {self._length}"
            )
        if plan.section.validate_ is not None and held <= self._length:
            raise RequestError(
                f"training: data: {held} tokens are held out, expected more than the context, {self._length}"
            )

    def training(self, step: int) -> Tensors:
        import torch

        count = self._plan.section.batch
        starts = torch.randint(len(self._learned) - self._length, (count,), generator=_generator(self._plan, step))
        return _windows(self._learned, starts.numpy(), self._length)

    def validation(self, index: int) -> Tensors:
        import numpy

        count = self._plan.section.batch // self._plan.section.micro_batches
        of_all = max(1, (len(self._held) - 1) // self._length)
        starts = (numpy.arange(index * count, (index + 1) * count) % of_all) * self._length
        return _windows(self._held, starts, self._length)


def _windows(ids_T: numpy.ndarray[Any, Any], starts_B: numpy.ndarray[Any, Any], length: int) -> Tensors:
    import numpy
    import torch

    at_BS = starts_B[:, None] + numpy.arange(length)
    token, following = (torch.from_numpy(ids_T[at].astype(numpy.int64).ravel()) for at in (at_BS, at_BS + 1))
    return {"token": token, NEXT: following}


def _of_text(plan: TrainingPlan, file: Path) -> numpy.ndarray[Any, Any]:
    import numpy

    checkpoint = plan.graph.checkpoint
    if checkpoint is None or not tokenizer.brought_by(checkpoint):
        raise RequestError("training: data: text needs a model with a tokenizer; give a file of tokens instead")
    try:
        text = read_text(file, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise RequestError(f"training: data: {file.name}: {error}") from None
    return numpy.array(tokenizer.of(checkpoint).encode(text, special=False))


def _of_tokens(plan: TrainingPlan, file: Path) -> numpy.ndarray[Any, Any]:
    """Read token ids from `.bin` (little-endian, 16 bits each), `.npy`, or `.safetensors` with one tensor of integers.

    `.bin` and `.npy` files are mapped.
    """

    def wrong(what: str) -> RequestError:
        return RequestError(f"training: data: {file.name}: {what}")

    try:
        ids = _ids_in(file)
    except (OSError, ValueError) as error:
        raise wrong(str(error)) from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise wrong(f"expected a row of integers, got {ids.dtype}{list(ids.shape)}")
    checkpoint = plan.graph.checkpoint
    vocabulary = checkpoint.config.vocab if checkpoint is not None else None
    if vocabulary is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise wrong(f"expected token ids from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}")
    return ids


def _ids_in(file: Path) -> numpy.ndarray[Any, Any]:
    """Read the tensor of a file of tokens.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold one tensor.
    """
    import numpy

    if file.suffix == ".bin":
        return numpy.memmap(file, "<u2", "r") if file.stat().st_size else numpy.empty(0, "<u2")
    if file.suffix == ".npy":
        held: numpy.ndarray[Any, Any] = numpy.load(file, mmap_mode="r", allow_pickle=False)
        return held
    if file.suffix != ".safetensors":
        raise ValueError("expected tokens in a .bin, .npy or .safetensors file")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if len(tensors) != 1:
        raise ValueError(f"expected one tensor of token ids, got {', '.join(sorted(tensors)) or 'none'}")
    [ids] = tensors.values()
    return ids


class _Stored:
    """Provide the examples of a safetensors file, or of all in a folder, shuffled again whenever all have been used."""

    def __init__(self, plan: TrainingPlan, file: Path) -> None:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        files = sorted(file.glob("*.safetensors")) if file.is_dir() else [file]
        try:
            parts = [load_file(part) for part in files]
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        except KeyError as error:
            raise RequestError(f"training: data: {file.name}: {error} is not in each of its files") from None
        except (SafetensorError, OSError) as error:
            raise RequestError(f"training: data: {file.name}: {error}") from None
        _check_names(plan, found)
        wanted = {name: tensor for name, tensor in found.items() if name in _names(plan)}
        sizes = {name: len(tensor) for name, tensor in wanted.items()}
        if len(set(sizes.values())) != 1:
            raise RequestError(
                f"training: data: {file.name}: expected the same number of examples in each tensor, got {sizes}"
            )
        self._plan, self._tensors = plan, wanted
        self._count = next(iter(sizes.values()))
        self._learned = self._count - int(self._count * plan.section.data.held_out)
        if self._learned < plan.section.batch:
            raise RequestError(
                f"training: data: {file.name}: expected at least {plan.section.batch} examples to learn from (a "
                f"batch), got {self._learned}"
            )
        self._order: tuple[int, torch.Tensor] = -1, torch.empty(0)

    def training(self, step: int) -> Tensors:
        import torch

        size = self._plan.section.batch
        of_epoch = self._learned // size
        epoch, index = divmod(step, of_epoch)
        if self._order[0] != epoch:
            self._order = epoch, torch.randperm(self._learned, generator=_generator(self._plan, epoch))
        chosen = self._order[1][index * size : (index + 1) * size]
        return {name: tensor[chosen] for name, tensor in self._tensors.items()}

    def validation(self, index: int) -> Tensors:
        import torch

        size = self._plan.section.batch // self._plan.section.micro_batches
        held = self._count - self._learned
        chosen = self._learned + torch.arange(index * size, (index + 1) * size) % max(1, held)
        return {name: tensor[chosen] for name, tensor in self._tensors.items()}


class _Own:
    """Call an instance of a custom class with the step, and with True for validation or False for training."""

    def __init__(self, plan: TrainingPlan, source: str, allow_code: bool) -> None:
        try:
            kind = kinds.find(source, plan.graph.folder, allow_code)
            made = kinds.import_name(kind.implementation, kind.folder)
        except KindError as error:
            raise RequestError(f"training: data: {error}") from None
        if not inspect.isclass(made):
            raise RequestError(f"training: data: {source}: expected a class")
        self._plan = plan
        self._call: Any = made(**plan.section.data.args)

    def training(self, step: int) -> Tensors:
        return self._checked(self._call(step, False))

    def validation(self, index: int) -> Tensors:
        return self._checked(self._call(index, True))

    def _checked(self, given: Any) -> Tensors:
        if not isinstance(given, Mapping):
            raise RequestError(f"training: data: expected a dict of tensors, got {type(given).__name__}")
        _check_names(self._plan, given)
        return {name: tensor for name, tensor in given.items() if name in _names(self._plan)}


def _names(plan: TrainingPlan) -> set[str]:
    """Return the names that the graph takes from its data."""
    return {link.port for link in plan.inputs}


def _check_names(plan: TrainingPlan, found: Mapping[str, Any]) -> None:
    missing = sorted(_names(plan) - found.keys())
    if missing:
        raise RequestError(
            f"training: data: expected {', '.join(missing)}, got {', '.join(sorted(found)) or 'nothing'}"
        )
