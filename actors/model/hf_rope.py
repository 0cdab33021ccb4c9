"""Let rotary embeddings of transformers that depend on the length of a text see all of it, not only the rows of a step.

With `longrope` (Ding et al. 2024), all positions of a text over the original context have other frequencies than those of a
shorter text; with `dynamic` scaling, the frequencies follow the length. The library takes the last position of a step as the
length, so a prompt in chunks would get the frequencies of its chunks. It also keeps the last length in the module, which
several sessions share here.

Shape suffixes: t tokens of one step, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Rotations:
    """Hold the rotary embeddings of a model that depend on the length; set the length before each step.

    `recomputed`: the gateway opens a session again where all its frequencies change.
    """

    def __init__(self, model: nn.Module, *, recomputed: bool = False) -> None:
        self._length = 0
        self._modules = [module for module in model.modules() if _kinds(module) & {"dynamic", "longrope"}]
        self.grows = bool(self._modules) and not recomputed
        """True if an answer must be replayed token by token: the frequencies of each depend on the length until it."""
        for module in self._modules:
            module.forward = functools.partial(self._forward, module.forward)

    def set(self, length: int) -> None:
        """Set the length of the text, and forget the lengths of the texts before."""
        self._length = length
        for module in self._modules:
            for name in list(vars(module)):
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, module.original_max_seq_len)
            for name, buffer in list(module.named_buffers(recurse=False)):
                if name.endswith("original_inv_freq"):
                    setattr(module, name.replace("original_", ""), buffer.clone())

    def _forward(
        self, forward: Callable[..., Any], x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """Return cos and sin [1, t, D], with one more position that says how long the text is."""
        last = position_ids.new_full((*position_ids.shape[:-1], 1), max(self._length, 1) - 1)
        made = forward(x, torch.cat((position_ids, last), -1), *args, **kwargs)
        return tuple(each[:, :-1] for each in made)


def _kinds(module: nn.Module) -> set[str]:
    """Return the ways of scaling of a rotary embedding; a few models have one for each type of layer."""
    kind = getattr(module, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else {kind} if isinstance(kind, str) else set()
