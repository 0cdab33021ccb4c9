"""Run the decode steps of an actor's native layers by kernels on a GPU.

A `Fused` runs rows of one token each. Prompts go through torch (blocks.py), with the same pages.

Shape suffixes: T tokens (one per row), H hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ranvier.transport.format.header import Row

from ...checkpoint.config import ModelConfig
from ...component.devices import wait
from ..kv_cache import KVCache
from ..rotary import RotaryTable
from ..tensors import Norm, make_sure_of_ids, unpacked
from .paged_cache import PAGE, PagedCache, PagePool
from .shapes import Layer, Matrix, Shape, Weights
from .steps import MOST_ROWS, Place, Steps

if TYPE_CHECKING:
    from ..blocks import Block

DTYPES = (torch.bfloat16,)
"""Dtypes of weights that the kernels are made for. In float16, a residual before its norm can be too large."""


class Made(NamedTuple):
    """Hold what a step has made, on the device, for its rows in their order.

    A group without a head has no logits and no chosen tokens. The tokens are in this machine's memory.
    """

    hidden_TH: torch.Tensor | None
    logits_TV: torch.Tensor | None = None
    chosen: Sequence[int] | None = None


class Fused:
    """Hold the layers of one actor as the kernels take them, the pages of its sessions, and its steps."""

    def __init__(
        self, config: ModelConfig, blocks: Sequence[Block], scale: float, tokens: int, dtype: torch.dtype, device: str
    ) -> None:
        self.shape = Shape(
            config.hidden, config.heads, config.kv_heads, config.head_dim, config.intermediate, len(blocks), 0,
            config.norm_eps, scale,
        )  # fmt: skip
        self._dtype, self._device = dtype, torch.device(device)
        self._layers = [_layer(block) for block in blocks]
        self._turns_PD = _turns(config, min(tokens, config.context)).to(self._device)
        self._steps: dict[tuple[bool, bool], Steps] = {}
        self._pool = PagePool(self.shape, tokens, dtype, self._device, self._forget_steps)
        self._embedding_VH: torch.Tensor | None = None
        self._norm: Norm | None = None
        self._head_VH: Matrix | None = None

    @classmethod
    def of(
        cls, config: ModelConfig, blocks: Sequence[Block], scale: float, tokens: int, dtype: torch.dtype, device: str
    ) -> Fused | None:
        """Return the layers for the kernels; None if these lack a part of the family, or its dtype."""
        if not _runs(config) or dtype not in DTYPES:
            return None
        return cls(config, blocks, scale, tokens, dtype, device)

    def begin_with(self, embedding_VH: torch.Tensor) -> None:
        """Let steps begin with token ids."""
        self._embedding_VH = embedding_VH

    def end_with(self, norm: Norm, head_VH: Matrix) -> None:
        """Let steps end with logits and the likeliest tokens."""
        self._norm, self._head_VH = norm, head_VH

    @property
    def begins(self) -> bool:
        """Return whether steps may begin with token ids."""
        return self._embedding_VH is not None

    @property
    def ends(self) -> bool:
        """Return whether steps may end with logits."""
        return self._head_VH is not None

    def cache(self, capacity: int) -> PagedCache:
        return PagedCache(self._pool, capacity, self._device)

    def warm(self) -> None:
        """Compile the kernels and capture the first steps on a GPU, so that the first tokens need not wait for them."""
        if self._device.type != "cuda":
            return
        for rows in (1, 2, MOST_ROWS):
            self._made(self.begins, self.ends).at_least(rows, 1, self._pool.pages)

    def step(
        self, rows: Sequence[Row], cache: KVCache[PagedCache], source: torch.Tensor, *, hidden: bool, ends: bool
    ) -> Made:
        """Run one token of each row through the layers, and write its key and value where its session's cache ends.

        Args:
            rows: of one token each.
            cache: that of the sessions.
            source: token ids [T] if the group begins with an embedding, else hidden states [T, H] on any device.
            hidden: whether hidden states are wanted.
            ends: whether logits and tokens are wanted; only for a group that ends with a head.
        """
        caches = [cache.at(row.session, row.position, 1) for row in rows]
        parts = [
            self._some(
                rows[at : at + MOST_ROWS], caches[at : at + MOST_ROWS], source[at : at + MOST_ROWS], hidden, ends
            )
            for at in range(0, len(rows), MOST_ROWS)
        ]
        for each in caches:
            each.length += 1
        if len(parts) == 1:
            return parts[0]
        several = [[tensor for part in parts if (tensor := getattr(part, name)) is not None] for name in Made._fields]
        hidden_TH, logits_TV = (torch.cat(each) if each else None for each in several[:2])
        return Made(hidden_TH, logits_TV, [token for tokens in several[2] for token in tokens] if ends else None)

    def _some(
        self, rows: Sequence[Row], caches: Sequence[PagedCache], source: torch.Tensor, hidden: bool, ends: bool
    ) -> Made:
        count, begins = len(rows), not source.is_floating_point()
        longest = max(row.position for row in rows) + 1
        step = self._made(begins, ends).at_least(count, -(-longest // PAGE), self._pool.pages)
        places = [Place(row.position + 1, cache.pages) for row, cache in zip(rows, caches, strict=True)]
        step.put(places, self._checked(source) if begins else None)
        if not begins:
            step.buffers.message_TH[:count].copy_(source, non_blocking=True)
        step()
        # copies, where they outlive this step: the next one writes into the same buffers
        hidden_TH = step.buffers.hidden_TH[:count].to(self._dtype, copy=True) if hidden else None
        if not ends:
            return Made(hidden_TH)
        wait()
        logits_TV = step.buffers.logits_TV[:count]
        if count == MOST_ROWS:  # there may be more rows, whose step writes into the same buffer
            logits_TV = logits_TV.clone()
        return Made(hidden_TH, logits_TV, step.chosen[:count].tolist())

    def _checked(self, token_T: torch.Tensor) -> list[int]:
        """Return token ids, after a check that the embedding has them all: the kernels would read other memory."""
        found: list[int] = token_T.tolist()
        assert self._embedding_VH is not None
        make_sure_of_ids(min(found), max(found), self._embedding_VH.shape[0])
        return found

    def _forget_steps(self) -> None:
        """Drop all captured steps, because their pages move."""
        wait()
        self._steps.clear()

    def _made(self, begins: bool, ends: bool) -> Steps:
        """Return the steps of the group, with its embedding and its head or without."""
        made = self._steps.get((begins, ends))
        if made is None:
            norm, head_VH = (self._norm, self._head_VH) if ends else (None, None)
            weights = Weights(
                self._layers,
                self._turns_PD,
                self._embedding_VH if begins else None,
                None if norm is None else norm.factors(),
                head_VH,
            )
            shape = dataclasses.replace(self.shape, vocabulary=0 if head_VH is None else head_VH.shape[0])
            made = self._steps[begins, ends] = Steps(shape, weights)
        return made


def _runs(config: ModelConfig) -> bool:
    """Return whether the kernels have all parts of a model's layers."""
    width = config.head_dim
    return (
        config.native and config.encoder is None and not config.experts
        and config.norm != "layer" and not config.post_norms
        and config.gated and config.activation == "silu" and not config.mlp_bias and not config.out_bias
        and not config.learned_positions and config.local_rope_theta is None and not config.recomputed_after
        and width >= 16 and width & (width - 1) == 0
    )  # fmt: skip


def _layer(block: Block) -> Layer:
    query, key = block.norm_query, block.norm_key
    return Layer(
        block.norm_in.factors(),
        unpacked(block.qkv),
        unpacked(block.out),
        block.norm_mid.factors(),
        unpacked(block.up),
        unpacked(block.down),
        block.qkv_bias,
        None if query is None else query.factors(),
        None if key is None else key.factors(),
        block.window,
    )


def _turns(config: ModelConfig, positions: int) -> torch.Tensor:
    """Return cos and sin of all positions, float32 [positions, 2, D / 2]."""
    table = RotaryTable(config.head_dim, config.rope_theta, config.rope_scaling, torch.float32)
    table.reserve(positions)
    half = config.head_dim // 2
    return torch.stack((table.cos_PD[:, :half], table.sin_PD[:, :half]), 1).contiguous()
