"""What a graph learns from: batches by step, the same ones whenever a step is taken again.

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

from ..file.checked import Graph
from ..file.errors import RequestError
from ..sessions import tokenizer
from .plan import NEXT, TrainingPlan

if TYPE_CHECKING:
    import numpy
    import torch

SOURCES = ("text", "tokens", "tensors", "source")
"""What data may be given as."""

Tensors = Mapping[str, "torch.Tensor"]

MOST_BYTES = 1 << 32
"""Of a text."""


class Data(Protocol):
    """Batches by name of the gateway's inputs and of targets; the first dimension is what is cut into micro-batches."""

    def training(self, step: int) -> Tensors:
        """The batch of a step, from 0 on."""

    def validation(self, index: int) -> Tensors:
        """One micro-batch of what is held out."""


def of(plan: TrainingPlan, allow_code: bool) -> Data:
    """The data that the graph file names.

    Raises:
        RequestError: it is not there, too short, or does not name what the graph takes.
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
        return _Stored(plan, _inside(graph, section.tensors))
    assert section.source is not None
    return _Own(plan, section.source, allow_code)


def _inside(graph: Graph, given: str) -> Path:
    folder = graph.path.parent.resolve()
    path = (folder / given).resolve()
    if not path.is_relative_to(folder):
        raise RequestError(f"training: data: {given!r} leaves the graph's folder")
    if not path.is_file():
        raise RequestError(f"training: data: {given!r}: no such file; looked in the graph's folder")
    return path


def _generator(plan: TrainingPlan, step: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(plan.section.seed * 1_000_003 + step)


class _Windows:
    """Windows of a row of tokens, at places that the seed and the step give; validation goes through the held-out end in order.

    Args:
        ids_T: the tokens; may be a file that is mapped.
        name: of the file, for errors.
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
        places = torch.randint(len(self._learned) - self._length, (count,), generator=_generator(self._plan, step))
        return _windows(self._learned, places.numpy(), self._length)

    def validation(self, index: int) -> Tensors:
        import numpy

        count = self._plan.section.batch // self._plan.section.micro_batches
        of_all = max(1, (len(self._held) - 1) // self._length)
        places = (numpy.arange(index * count, (index + 1) * count) % of_all) * self._length
        return _windows(self._held, places, self._length)


def _windows(ids_T: numpy.ndarray[Any, Any], places_B: numpy.ndarray[Any, Any], length: int) -> Tensors:
    import numpy
    import torch

    at_BS = places_B[:, None] + numpy.arange(length)
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
    """Token ids as `.bin` (little-endian 16 bits each), `.npy`, or `.safetensors` with one tensor of integers: mapped."""
    import numpy

    def wrong(what: str) -> RequestError:
        return RequestError(f"training: data: {file.name}: {what}")

    try:
        if file.suffix == ".bin":
            ids = numpy.memmap(file, "<u2", "r") if file.stat().st_size else numpy.empty(0, "<u2")
        elif file.suffix == ".npy":
            ids = numpy.load(file, mmap_mode="r", allow_pickle=False)
        elif file.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.numpy import load_file

            try:
                held = load_file(file)
            except SafetensorError as error:
                raise wrong(str(error)) from None
            if len(held) != 1:
                raise wrong(f"expected one tensor of token ids, got {', '.join(sorted(held)) or 'none'}")
            [ids] = held.values()
        else:
            raise wrong("expected tokens in a .bin, .npy or .safetensors file")
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        raise wrong(str(error)) from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise wrong(f"expected a row of integers, got {ids.dtype}{list(ids.shape)}")
    checkpoint = plan.graph.checkpoint
    vocabulary = checkpoint.config.vocab if checkpoint is not None else None
    if vocabulary is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise wrong(f"expected token ids from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}")
    return ids


class _Stored:
    """Examples of a safetensors file, shuffled anew each time all have been seen."""

    def __init__(self, plan: TrainingPlan, file: Path) -> None:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(file)
        except (SafetensorError, OSError) as error:
            raise RequestError(f"training: data: {file.name}: {error}") from None
        _check_names(plan, found)
        wanted = {name: tensor for name, tensor in found.items() if name in _names(plan)}
        sizes = {name: len(tensor) for name, tensor in wanted.items()}
        if len(set(sizes.values())) != 1:
            raise RequestError(f"training: data: {file.name}: expected as many examples in each, got {sizes}")
        self._plan, self._tensors = plan, wanted
        self._count = next(iter(sizes.values()))
        self._learned = self._count - int(self._count * plan.section.data.held_out)
        if self._learned < plan.section.batch:
            raise RequestError(
                f"training: data: {file.name}: {self._learned} examples to learn from are no batch of {plan.section.batch}"
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
    """A class of the user's own, called with the step and whether it is for validation."""

    def __init__(self, plan: TrainingPlan, source: str, allow_code: bool) -> None:
        try:
            kind = kinds.find(source, plan.graph.path.parent, allow_code)
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
    """What the graph takes from its data."""
    return {link.port for link in plan.inputs}


def _check_names(plan: TrainingPlan, found: Mapping[str, Any]) -> None:
    missing = sorted(_names(plan) - found.keys())
    if missing:
        raise RequestError(
            f"training: data: expected {', '.join(missing)}, got {', '.join(sorted(found)) or 'nothing'}"
        )
