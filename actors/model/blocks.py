"""Attention blocks of the llama family: one set, parameterised, over flat batches of rows.

Shape suffixes: T tokens of the batch, t tokens of one row, H hidden, N query heads, K key-value heads, G query heads for
each of these (N = K·G), D head width, P positions in the cache, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ranvier.transport.header import Row

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig
from .kv_cache import KVCache, SessionCache
from .rotary import RotaryTable, rotate


def rms_norm(hidden_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019), in float32 whatever the dtype, as the oracle does."""
    wide = hidden_TH.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_H * wide.to(hidden_TH.dtype)


class Block:
    """The weights of one layer; q, k and v, and gate and up, lie in one matrix each."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, layer: int, dtype: torch.dtype) -> None:
        prefix = f"model.layers.{layer}."
        query, value = config.heads * config.head_dim, config.kv_heads * config.head_dim

        def fused(parts: tuple[tuple[str, int], ...], columns: tuple[int, ...], kind: str) -> torch.Tensor:
            weight = torch.empty(sum(rows for _, rows in parts), *columns, dtype=dtype)
            start = 0
            for name, rows in parts:
                checkpoint.read_into(f"{prefix}{name}.{kind}", weight[start : start + rows])
                start += rows
            return weight

        def both(
            parts: tuple[tuple[str, int], ...], columns: int, bias: bool
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            return fused(parts, (columns,), "weight"), fused(parts, (), "bias") if bias else None

        qkv = (("self_attn.q_proj", query), ("self_attn.k_proj", value), ("self_attn.v_proj", value))
        gate_up = (("mlp.gate_proj", config.intermediate), ("mlp.up_proj", config.intermediate))
        self.norm_in = fused((("input_layernorm", config.hidden),), (), "weight")
        self.norm_mid = fused((("post_attention_layernorm", config.hidden),), (), "weight")
        self.qkv, self.qkv_bias = both(qkv, config.hidden, config.attention_bias)
        self.out, self.out_bias = both((("self_attn.o_proj", config.hidden),), query, config.attention_bias)
        self.gate_up, self.gate_up_bias = both(gate_up, config.hidden, config.mlp_bias)
        self.down, self.down_bias = both((("mlp.down_proj", config.hidden),), config.intermediate, config.mlp_bias)

    def tensors(self) -> list[torch.Tensor]:
        return [value for value in vars(self).values() if value is not None]


class Blocks:
    """Layers `first` to `last` (both included) with the KV cache of all sessions."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: tuple[int, int],
        dtype: torch.dtype,
        cache_tokens: int,
        progress: Callable[[float], None],
    ) -> None:
        first, last = layers
        self.config = checkpoint.config
        self.rotary = RotaryTable(self.config, dtype)
        self.cache = KVCache(self.config, last - first + 1, dtype, cache_tokens)
        self.blocks: list[Block] = []
        for layer in range(first, last + 1):
            self.blocks.append(Block(self.config, checkpoint, layer, dtype))
            progress((layer - first + 1) / (last - first + 1))

    def open(self, session: int, capacity: int) -> None:
        self.cache.open(session, capacity)
        self.rotary.reserve(capacity)

    def forward(self, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> torch.Tensor:
        """One step of every row through every layer. Takes effect on the caches only if all went well."""
        caches = [self.cache.at(row.session, row.position, row.tokens) for row in rows]
        positions_T = torch.cat([torch.arange(row.position, row.position + row.tokens) for row in rows])
        cos_TD, sin_TD = self.rotary.cos_PD[positions_T], self.rotary.sin_PD[positions_T]
        for index, block in enumerate(self.blocks):
            hidden_TH = self._layer(index, block, rows, caches, hidden_TH, cos_TD, sin_TD)
        for row, cache in zip(rows, caches, strict=True):
            cache.length = row.position + row.tokens
        return hidden_TH

    def _layer(
        self,
        index: int,
        block: Block,
        rows: tuple[Row, ...],
        caches: list[SessionCache],
        hidden_TH: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
    ) -> torch.Tensor:
        config = self.config
        heads, kv_heads, width = config.heads, config.kv_heads, config.head_dim
        qkv = F.linear(rms_norm(hidden_TH, block.norm_in, config.norm_eps), block.qkv, block.qkv_bias)
        qkv_TND = qkv.view(-1, heads + 2 * kv_heads, width)
        turned_TND = rotate(qkv_TND[:, : heads + kv_heads], cos_TD, sin_TD)
        attended = []
        start = 0
        for row, cache in zip(rows, caches, strict=True):
            stop, end = start + row.tokens, row.position + row.tokens
            keys_KPD, values_KPD = cache.keys_LKPD[index], cache.values_LKPD[index]
            keys_KPD[:, row.position : end] = turned_TND[start:stop, heads:].transpose(0, 1)
            values_KPD[:, row.position : end] = qkv_TND[start:stop, heads + kv_heads :].transpose(0, 1)
            attended.append(attend(turned_TND[start:stop, :heads], keys_KPD[:, :end], values_KPD[:, :end]))
            start = stop
        mixed = attended[0] if len(attended) == 1 else torch.cat(attended)
        hidden_TH = hidden_TH + F.linear(mixed, block.out, block.out_bias)
        gate_up = F.linear(rms_norm(hidden_TH, block.norm_mid, config.norm_eps), block.gate_up, block.gate_up_bias)
        gate_TI, up_TI = gate_up.chunk(2, dim=-1)
        return hidden_TH + F.linear(F.silu(gate_TI) * up_TI, block.down, block.down_bias)

    def held_bytes(self) -> int:
        return sum(tensor.nbytes for block in self.blocks for tensor in block.tensors())


def attend(query_tND: torch.Tensor, keys_KPD: torch.Tensor, values_KPD: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last t of P positions over all P: [t, N·D].

    The G query heads of a key-value head are folded into the query axis: torch's own `enable_gqa` took five times as
    long for one query.
    """
    tokens, heads, width = query_tND.shape
    kv_heads, positions, _ = keys_KPD.shape
    group = heads // kv_heads
    if tokens == 1:
        query_KGD = query_tND.view(kv_heads, group, width)
        return F.scaled_dot_product_attention(query_KGD[None], keys_KPD[None], values_KPD[None]).view(1, -1)
    query_NtD = query_tND.transpose(0, 1)
    keys_NPD = keys_KPD.repeat_interleave(group, dim=0)
    values_NPD = values_KPD.repeat_interleave(group, dim=0)
    if tokens == positions:
        mixed = F.scaled_dot_product_attention(query_NtD[None], keys_NPD[None], values_NPD[None], is_causal=True)
    else:
        allowed_tP = torch.ones(tokens, positions, dtype=torch.bool).tril(positions - tokens)
        mixed = F.scaled_dot_product_attention(query_NtD[None], keys_NPD[None], values_NPD[None], allowed_tP)
    return mixed[0].transpose(0, 1).reshape(tokens, -1)
