"""Run a step through a group of blocks as one call of step.c, for prompts and single tokens of many sessions.

Shape suffixes: T tokens, H hidden, P positions, D head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ranvier.transport.format.header import Row

from ..checkpoint.config import ModelConfig
from .kernels import packed
from .kernels.packed import Matrix, Packed
from .kv_cache import BlockCache
from .rotary import RotaryTable
from .tensors import Norm
from .weights import by_kernels

if TYPE_CHECKING:
    from .blocks import Block


ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
"""The activations of feed-forward parts. Their order is that of step.c."""
NORMS = ("norm_in", "norm_mid", "norm_query", "norm_key", "norm_attended", "norm_out")
VECTORS = (*NORMS, "norm_in_bias", "norm_mid_bias", "qkv_bias", "out_bias", "up_bias", "down_bias")
"""The vectors that a layer may have beside its matrices. Their order is that of step.c."""
ROOM_STEP = 256
"""The workspace is asked for again only when the longest session has grown by so many positions."""


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix), ("out", Matrix), ("up", Matrix), ("down", Matrix),
        *((name, ctypes.c_void_p) for name in VECTORS),
        ("window", ctypes.c_int32), ("local", ctypes.c_int32),
    )  # fmt: skip


_Two = ctypes.c_void_p * 2


class _Group(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int32), ("hidden", ctypes.c_int32), ("heads", ctypes.c_int32), ("kv_heads", ctypes.c_int32),
        ("width", ctypes.c_int32), ("inner", ctypes.c_int32), ("activation", ctypes.c_int32), ("gated", ctypes.c_int32),
        ("centred", ctypes.c_int32), ("attention", ctypes.c_int32),
        ("first", ctypes.c_int32), ("cached", ctypes.c_int32), ("fast", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("layer", ctypes.POINTER(_Layer)),
        ("cosine", _Two), ("sine", _Two),
    )  # fmt: skip


class _Row(ctypes.Structure):
    _fields_ = (("cache", ctypes.c_void_p), ("position", ctypes.c_int64), ("tokens", ctypes.c_int32))


class Made(NamedTuple):
    """Hold the hidden states [T, H] that a step has made, and whether all of them are finite (None: not known)."""

    hidden: torch.Tensor
    finite: bool | None


class Compiled:
    """Describe the layers of one actor to step.c, and keep alive the tensors that this description points to."""

    def __init__(self, config: ModelConfig, blocks: Sequence[Block], scale: float) -> None:
        self._held: list[torch.Tensor] = []
        self._tables: list[RotaryTable] = []
        if not config.learned_positions:
            self._tables.append(RotaryTable(config.head_dim, config.rope_theta, config.rope_scaling, torch.float32))
            if config.local_rope_theta is not None:
                self._tables.append(RotaryTable(config.head_dim, config.local_rope_theta, None, torch.float32))
        self._layers = (_Layer * len(blocks))(*(self._layer(block) for block in blocks))
        fast = any(isinstance(block.qkv, Packed) and bool(block.qkv.matrix.fast) for block in blocks)
        self._group = _Group(
            len(blocks), config.hidden, config.heads, config.kv_heads, config.head_dim, config.intermediate,
            ACTIVATIONS.index(config.activation), config.gated, config.norm == "layer", bool(config.experts),
            0, len(blocks), fast, config.norm_eps, scale, self._layers,
        )  # fmt: skip
        self._at = ctypes.byref(self._group)
        self._part = _Group.from_buffer_copy(self._group)  # the same group with some of its layers, for `in_parts`
        self._room = torch.empty(0, dtype=torch.uint8)
        self._asked = (0, 0)

    @classmethod
    def of(cls, config: ModelConfig, blocks: Sequence[Block], scale: float) -> Compiled | None:
        """Return the compiled layers; None if a matrix is not packed or the family has parts that the kernels lack."""
        names = ("qkv", "out") if config.experts else ("qkv", "out", "up", "down")
        all_packed = all(isinstance(getattr(block, name), Packed) for block in blocks for name in names)
        return cls(config, blocks, scale) if by_kernels(config) and all_packed else None

    def _layer(self, block: Block) -> _Layer:
        matrices = [block.qkv, block.out, block.up, block.down]
        norms: list[Norm | None] = [getattr(block, name) for name in NORMS]
        vectors = [norm.factors() if norm is not None else None for norm in norms]
        vectors += [norm.bias_H if norm is not None else None for norm in norms[:2]]
        vectors += [block.qkv_bias, block.out_bias, block.up_bias, block.down_bias]
        wide = [vector.float().contiguous() if vector is not None else None for vector in vectors]
        self._held += [vector for vector in wide if vector is not None]
        pointers = [vector.data_ptr() if vector is not None else None for vector in wide]
        local = len(self._tables) > 1 and block.window > 0
        return _Layer(
            *(each.matrix if isinstance(each, Packed) else Matrix() for each in matrices),
            *pointers,
            block.window,
            local,
        )

    def reserve(self, positions: int) -> None:
        """Extend the rotary tables to a session of `positions` positions."""
        for index, table in enumerate(self._tables):
            table.reserve(positions)
            for group in (self._group, self._part):
                group.cosine[index], group.sine[index] = table.cos_PD.data_ptr(), table.sin_PD.data_ptr()

    def step(self, rows: Sequence[Row], caches: Sequence[BlockCache], hidden_TH: torch.Tensor) -> Made:
        """Run [T, H], in bfloat16 or float32, through all layers, and write keys and values where each cache ends.

        The caller sets the new length of each cache.
        """
        made_TH = torch.empty_like(hidden_TH, memory_format=torch.contiguous_format)
        return Made(made_TH, self._through(self._at, rows, caches, hidden_TH, made_TH))

    def in_parts(
        self,
        rows: Sequence[Row],
        caches: Sequence[BlockCache],
        hidden_TH: torch.Tensor,
        ends: Sequence[int],
        touch: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> Made:
        """Compute the same as `step`, and stop where so many layers are done as `ends` says, each number once, in order.

        There `touch` gets that number and the hidden states in float32, and returns those to go on with.
        """
        wide_TH, done = hidden_TH.float(), 0
        for end in ends:
            wide_TH = touch(end, self._layers_of(done, end, rows, caches, wide_TH))
            done = end
        wide_TH = self._layers_of(done, len(self._layers), rows, caches, wide_TH)
        return Made(wide_TH.to(hidden_TH.dtype), None)

    def _layers_of(
        self, first: int, end: int, rows: Sequence[Row], caches: Sequence[BlockCache], wide_TH: torch.Tensor
    ) -> torch.Tensor:
        """Run [T, H] in float32 through the layers from `first` to before `end`, if there are any."""
        if first == end:
            return wide_TH
        part = self._part
        part.layers, part.first, part.layer = end - first, first, ctypes.pointer(self._layers[first])
        made_TH = torch.empty_like(wide_TH)
        self._through(ctypes.byref(part), rows, caches, wide_TH, made_TH)
        return made_TH

    def _through(
        self, group: Any, rows: Sequence[Row], caches: Sequence[BlockCache], from_TH: torch.Tensor, to_TH: torch.Tensor
    ) -> bool:
        """Compute `to_TH` from `from_TH`, both of one dtype. Return whether all its numbers are finite.

        Raises:
            ValueError: `from_TH` is not [T, H] in bfloat16 or float32; C would access memory past its end.
        """
        tokens = longest = 0
        for row in rows:
            tokens += row.tokens
            longest = max(longest, row.position + row.tokens)
        narrow = from_TH.dtype is torch.bfloat16
        if from_TH.shape != (tokens, self._group.hidden) or not (narrow or from_TH.dtype is torch.float32):
            expected = f"[{tokens}, {self._group.hidden}] in bfloat16 or float32"
            raise ValueError(f"hidden: expected {expected}, got {list(from_TH.shape)} in {from_TH.dtype}")
        if not from_TH.is_contiguous():
            from_TH = from_TH.contiguous()
        fields: list[Any] = [(cache.address, row.position, row.tokens) for row, cache in zip(rows, caches, strict=True)]
        made = (_Row * len(rows))(*fields)
        longest = -(-longest // ROOM_STEP) * ROOM_STEP
        kernels = packed.library()
        if (tokens, longest) != self._asked:
            room = kernels.ranvier_room(group, tokens, longest)
            if self._room.numel() < room:
                self._room = torch.empty(2 * room, dtype=torch.uint8)
            self._asked = tokens, longest
        # the interpreter and torch are slow after the call, because it has put all else out of the caches: do little there
        return bool(kernels.ranvier_step(
            group, made, len(rows), from_TH.data_ptr(), to_TH.data_ptr(), narrow, longest, self._room.data_ptr()
        ))  # fmt: skip
