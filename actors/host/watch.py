"""Watch a step of an actor: report the tensors that its layers make between its inputs and its outputs.

Blocks, stages, encoders, decoders and heads report their layers themselves. Of any other actor, the outputs of its
torch modules are reported, by the modules' names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ranvier.transport.format.header import Row

from ..component.actor import Actor, Batch, Look
from ..component.devices import here
from ..component.module import held
from ..model.causal import AnyBlocks, BlocksActor, Stage
from ..model.head import Head
from ..model.seq2seq import Decoder, Encoder


def step(actor: Actor, batch: Batch, look: Look) -> Mapping[str, torch.Tensor | Batch]:
    """Run one step like `Actor.step`, and call `look` with the tensors inside, in the order of their creation."""

    def report(layer: int | None, name: str, rows: tuple[Row, ...], tensor_T: torch.Tensor) -> None:
        look(layer, name, rows, here(tensor_T))

    with contextlib.ExitStack() as stack:
        reporting = _that_report(actor)
        for one in reporting:
            stack.callback(setattr, one, "look", one.look)
            one.look = report
        if reporting:
            return actor.step(batch)
        seen: list[tuple[str, torch.Tensor]] = []
        for name, module in held(actor).named_modules():
            if name:
                stack.enter_context(_hook(name, module, seen))
        made = actor.step(batch)
    for name, rows, tensor in _whole(seen, batch):
        report(None, name, rows, tensor)
    return made


def _that_report(actor: Actor) -> list[Stage | Head | AnyBlocks | Encoder | Decoder]:
    if isinstance(actor, Stage):
        return [actor, actor.blocks, *([actor.head] if actor.head is not None else [])]
    if isinstance(actor, BlocksActor):
        return [actor.blocks]
    return [actor] if isinstance(actor, Head | Encoder | Decoder) else []


@contextlib.contextmanager
def _hook(name: str, module: torch.nn.Module, seen: list[tuple[str, torch.Tensor]]) -> Iterator[None]:
    def keep(_module: torch.nn.Module, _given: Any, made: Any) -> None:
        first = made[0] if isinstance(made, tuple) and made else made
        if isinstance(first, torch.Tensor):
            seen.append((name, first.detach().clone()))

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _whole(seen: list[tuple[str, torch.Tensor]], batch: Batch) -> Iterator[tuple[str, tuple[Row, ...], torch.Tensor]]:
    """Yield name, rows and tensor of each module, in the order of the modules' first calls.

    The outputs of a module that was called once per row are concatenated. A tensor without a dimension of tokens or
    rows is attributed to the first row of the step.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in seen:
        parts.setdefault(name, []).append(tensor)
    for name, tensors in parts.items():
        flat = [tensor[0] if tensor.dim() > 2 and len(tensor) == 1 else tensor for tensor in tensors]
        lengths = sum(len(tensor) if tensor.dim() else 0 for tensor in flat)
        if lengths in (batch.tokens, len(batch.rows)) and len({tensor.shape[1:] for tensor in flat}) == 1:
            yield name, batch.rows, torch.cat(flat)
        else:
            yield name, batch.rows[:1], torch.cat([tensor.flatten() for tensor in tensors])[None]
