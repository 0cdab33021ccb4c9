"""Describe a group of llama-family layers on a GPU: its sizes, its weights and its pages.

Shape suffixes: T tokens (one per session), L layers, H hidden, N query heads, K key-value heads, D head width,
I inner width, V vocabulary, S pages, P positions, W pages per session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..coded import Coded

Matrix = torch.Tensor | Coded


@dataclass(frozen=True)
class Shape:
    """Hold the sizes and switches that the layers of a group share."""

    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    layers: int
    vocabulary: int = 0
    """Rows of the head; 0 for a group without one."""
    eps: float = 1e-5
    scale: float | None = None
    """Factor of the product of query and key; None: one over the square root of the head width."""

    @property
    def attention_scale(self) -> float:
        return self.head_width**-0.5 if self.scale is None else self.scale

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_width


@dataclass(frozen=True)
class Layer:
    """Hold the weights of one layer, each matrix [rows, columns] contiguous."""

    norm_in_H: torch.Tensor
    qkv: Matrix
    """[(N + 2·K)·D, H]: queries, keys, values."""
    out: Matrix
    """[H, N·D]"""
    norm_mid_H: torch.Tensor
    up: Matrix
    """[2·I, H]: gate, then up."""
    down: Matrix
    """[H, I]"""
    qkv_bias: torch.Tensor | None = None
    norm_query_D: torch.Tensor | None = None
    norm_key_D: torch.Tensor | None = None
    window: int = 0
    """Positions that a token sees, itself included; 0 for all."""


@dataclass(frozen=True)
class Weights:
    """Hold a group's weights; a group without an embedding takes messages, one without a head sends them."""

    layers: Sequence[Layer]
    turns_PD: torch.Tensor
    """cos and sin of every position, float32 [positions, 2, D / 2]; rope scaling is already in them."""
    embedding_VH: torch.Tensor | None = None
    norm_out_H: torch.Tensor | None = None
    head_VH: Matrix | None = None

    def bytes_per_token(self) -> int:
        """Return how many bytes of weights one decode step has to read."""
        matrices = [matrix for layer in self.layers for matrix in (layer.qkv, layer.out, layer.up, layer.down)]
        return sum(matrix.nbytes for matrix in matrices) + (0 if self.head_VH is None else self.head_VH.nbytes)


@dataclass(frozen=True)
class Pages:
    """Hold the keys and values of all sessions: per layer [pages, K, page, D], each head's page contiguous."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def empty(cls, shape: Shape, pages: int, page: int, dtype: torch.dtype, device: torch.device) -> Pages:
        def made() -> list[torch.Tensor]:
            size = (pages, shape.kv_heads, page, shape.head_width)
            return [torch.empty(size, dtype=dtype, device=device) for _ in range(shape.layers)]

        return cls(made(), made())

    @property
    def page(self) -> int:
        return self.keys[0].shape[2]

    @property
    def count(self) -> int:
        return self.keys[0].shape[0]
