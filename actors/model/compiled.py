"""Run a step through a group of blocks as one call of step.c, for prompts and single tokens of many sessions.

Shape suffixes: T tokens, H hidden, P positions, D head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ranvier.transport.format.header import Row

from ..checkpoint.config import ModelConfig
from .kernels import packed
from .kernels.packed import Matrix, Packed
from .kv_cache import BlockCache
from .rotary import RotaryTable
from .weights import by_kernels

if TYPE_CHECKING:
    from .blocks import Block


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix), ("out", Matrix), ("up", Matrix), ("down", Matrix),
        ("norm_in", ctypes.c_void_p), ("norm_mid", ctypes.c_void_p), ("qkv_bias", ctypes.c_void_p),
        ("norm_query", ctypes.c_void_p), ("norm_key", ctypes.c_void_p),
        ("norm_attended", ctypes.c_void_p), ("norm_out", ctypes.c_void_p),
        ("window", ctypes.c_int32), ("local", ctypes.c_int32),
    )  # fmt: skip


class _Group(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int32), ("hidden", ctypes.c_int32), ("heads", ctypes.c_int32), ("kv_heads", ctypes.c_int32),
        ("width", ctypes.c_int32), ("inner", ctypes.c_int32), ("gelu", ctypes.c_int32),
        ("first", ctypes.c_int32), ("cached", ctypes.c_int32), ("fast", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("layer", ctypes.POINTER(_Layer)),
    )  # fmt: skip


class _Row(ctypes.Structure):
    _fields_ = (
        ("cache", ctypes.c_void_p), ("position", ctypes.c_int64),
        ("cosine", ctypes.c_void_p * 2), ("sine", ctypes.c_void_p * 2), ("tokens", ctypes.c_int32),
    )  # fmt: skip


_Two = ctypes.c_void_p * 2


class Compiled:
    """Describe the layers of one actor to step.c, and keep alive the tensors that this description points to."""

    def __init__(self, config: ModelConfig, blocks: Sequence[Block], scale: float) -> None:
        self._held: list[torch.Tensor] = []
        self._width = config.head_dim
        self._tables = [RotaryTable(config.head_dim, config.rope_theta, config.rope_scaling, torch.float32)]
        if config.local_rope_theta is not None:
            self._tables.append(RotaryTable(config.head_dim, config.local_rope_theta, None, torch.float32))
        self._layers = (_Layer * len(blocks))(*(self._layer(block) for block in blocks))
        fast = any(isinstance(block.qkv, Packed) and bool(block.qkv.matrix.fast) for block in blocks)
        self._group = _Group(
            len(blocks), config.hidden, config.heads, config.kv_heads, config.head_dim, config.intermediate,
            config.activation == "gelu_tanh", 0, len(blocks), fast, config.norm_eps, scale, self._layers,
        )  # fmt: skip
        self._at = ctypes.byref(self._group)
        self._one = _Group.from_buffer_copy(self._group)  # the same group with one layer at a time, for `watched`
        self._one.layers = 1
        self._room = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def of(cls, config: ModelConfig, blocks: Sequence[Block], scale: float) -> Compiled | None:
        """Return the compiled layers; None if a matrix is not packed or the family has parts that the kernels lack."""
        all_packed = all(
            isinstance(matrix, Packed) for block in blocks for matrix in (block.qkv, block.out, block.up, block.down)
        )
        return cls(config, blocks, scale) if by_kernels(config) and all_packed else None

    def _layer(self, block: Block) -> _Layer:
        matrices = [block.qkv, block.out, block.up, block.down]
        norms = [block.norm_in, block.norm_mid, block.norm_query, block.norm_key, block.norm_attended, block.norm_out]
        wide = [norm.factors() if norm is not None else None for norm in norms]
        bias = block.qkv_bias.float().contiguous() if block.qkv_bias is not None else None
        wide.insert(2, bias)
        self._held += [tensor for tensor in wide if tensor is not None]
        pointers = [tensor.data_ptr() if tensor is not None else None for tensor in wide]
        local = len(self._tables) > 1 and block.window > 0
        return _Layer(*(m.matrix for m in matrices if isinstance(m, Packed)), *pointers, block.window, local)

    def reserve(self, positions: int) -> None:
        """Extend the rotary tables to a session of `positions` positions."""
        for table in self._tables:
            table.reserve(positions)

    def _turns(self, position: int) -> tuple[Any, Any]:
        """Return the addresses of cos and of sin from `position` on, one per table."""
        both = []
        for tables in ([t.cos_PD for t in self._tables], [t.sin_PD for t in self._tables]):
            both.append(_Two(*(table.data_ptr() + 4 * self._width * position for table in tables)))
        return both[0], both[1]

    def step(self, rows: Sequence[Row], caches: Sequence[BlockCache], hidden_TH: torch.Tensor) -> torch.Tensor:
        """Run [T, H] through all layers, and write keys and values where each cache ends.

        The caller sets the new length of each cache.
        """
        wide_TH = hidden_TH.float()
        self._through(self._at, rows, caches, wide_TH)
        return wide_TH.to(hidden_TH.dtype)

    def watched(
        self,
        rows: Sequence[Row],
        caches: Sequence[BlockCache],
        hidden_TH: torch.Tensor,
        report: Callable[[int, torch.Tensor], None],
    ) -> torch.Tensor:
        """Compute the same as `step`, one layer at a time, and pass each layer's output to `report`, in float32."""
        wide_TH = hidden_TH.float()
        for index, layer in enumerate(self._layers):
            self._one.layer, self._one.first = ctypes.pointer(layer), index
            self._through(ctypes.byref(self._one), rows, caches, wide_TH)
            report(index, wide_TH.clone())
        return wide_TH.to(hidden_TH.dtype)

    def _through(self, group: Any, rows: Sequence[Row], caches: Sequence[BlockCache], wide_TH: torch.Tensor) -> None:
        """Run `wide_TH` through the layers of a group, in place.

        Raises:
            ValueError: `wide_TH` is not [T, H]; C would access memory past its end.
        """
        count = len(rows)
        expected = (sum(row.tokens for row in rows), self._group.hidden)
        if wide_TH.shape != expected:
            raise ValueError(f"hidden: expected {list(expected)}, got {list(wide_TH.shape)}")
        made = (_Row * count)(
            *(
                _Row(cache.blocks.data_ptr(), row.position, *self._turns(row.position), row.tokens)
                for row, cache in zip(rows, caches, strict=True)
            )
        )
        longest = max(row.position + row.tokens for row in rows)
        room = packed.library().ranvier_room(group, ctypes.c_int(len(wide_TH)), ctypes.c_int64(longest))
        if self._room.numel() < room:
            self._room = torch.empty(2 * room, dtype=torch.uint8)
        packed.library().ranvier_step(
            group, made, ctypes.c_int(count), ctypes.c_void_p(wide_TH.data_ptr()), ctypes.c_int64(longest),
            ctypes.c_void_p(self._room.data_ptr()),
        )  # fmt: skip
