"""Watch models of transformers by hooks: report what enters their layers and what leaves them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Report = Callable[["int | None", str, torch.Tensor], None]
"""Takes a tensor's layer (None outside the layers), its name, and the tensor as the model has it, mostly [1, t, H]."""


def layer_count(model: Any) -> int:
    """Return how many layers text passes through; 0 if the model has several stacks of layers."""
    return getattr(model.config.get_text_config(), "num_hidden_layers", 0)


@contextlib.contextmanager
def watched(model: nn.Module, count: int, report: Report) -> Iterator[None]:
    """Report tensors of each forward pass to `report` while the context is open.

    `embedding` is the input of the first of the `count` layers. Each layer reports its output as `hidden`. If its modules
    show where the feed-forward part begins, it also reports the residual before that part, as `attended`.

    The layers are a list of `count` modules that is not nested in another such list (lists of experts are). There may
    be several such lists, for example one that only pictures pass through.
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
                    stack.enter_context(_seen(layer, index, report))
        yield


@contextlib.contextmanager
def _seen(layer: nn.Module, index: int, report: Report) -> Iterator[None]:
    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if index == 0:
            report(None, "embedding", given[0] if given else named["hidden_states"])

    def after(_: nn.Module, __: Any, made: Any) -> None:
        report(index, "hidden", made[0] if isinstance(made, tuple | list) else made)

    def between(_: nn.Module, given: tuple[Any, ...]) -> None:
        report(index, "attended", given[0])

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    children = dict(layer.named_children())
    if "post_attention_layernorm" in children and "pre_feedforward_layernorm" not in children:
        handles.append(children["post_attention_layernorm"].register_forward_pre_hook(between))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
