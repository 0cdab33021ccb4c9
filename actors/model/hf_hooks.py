"""Models of another library, watched by hooks: what goes into their layers and what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Told = Callable[["int | None", str, torch.Tensor], None]
"""Told of a tensor as the model has it, [1, t, H] in most: the layer, if it is one's, and its name."""


def layer_count(model: Any) -> int:
    """How many layers the text goes through; 0 if the model has several stacks of them."""
    return getattr(model.config.get_text_config(), "num_hidden_layers", 0)


@contextlib.contextmanager
def watched(model: nn.Module, count: int, told: Told) -> Iterator[None]:
    """`told` hears, of a forward pass, of `embedding`: what enters the first of `count` layers; of each of them, of `attended`:
    what its feed-forward part is given, where that is plain, and of `hidden`: what leaves it.

    The layers are a list of so many modules that is in no other such list (experts are). There may be several: of what takes
    pictures, say, which no text goes through.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    with contextlib.ExitStack() as stack:
        for name, layers in lists.items():
            if not any(name.startswith(f"{other}.") for other in lists):
                for index, layer in enumerate(layers):
                    stack.enter_context(_seen(layer, index, told))
        yield


@contextlib.contextmanager
def _seen(layer: nn.Module, index: int, told: Told) -> Iterator[None]:
    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if index == 0:
            told(None, "embedding", given[0] if given else named["hidden_states"])

    def after(_: nn.Module, __: Any, made: Any) -> None:
        told(index, "hidden", made[0] if isinstance(made, tuple) else made)

    def between(_: nn.Module, given: tuple[Any, ...]) -> None:
        told(index, "attended", given[0])

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    children = dict(layer.named_children())
    if "post_attention_layernorm" in children and "pre_feedforward_layernorm" not in children:
        handles.append(children["post_attention_layernorm"].register_forward_pre_hook(between))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
