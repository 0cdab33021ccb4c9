"""Run attention blocks over flat batches of rows; one parameterised block serves every built-in family.

Shape suffixes: T tokens of the batch, t tokens of one row, H hidden, N query heads, K key-value heads, G query heads
per key-value head (N = K·G), D head width, P positions in the cache, E = N·D, I inner width.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ranvier.transport.format.header import Row

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig
from ..component.actor import Look, RowsFailed
from ..component.devices import CPU
from ..component.inside import HIDDEN, IN_LAYER, PATTERN, Place
from ..component.session import SessionInfo
from . import weights
from .compiled import Compiled
from .inside import Inside
from .kv_cache import BlockCache, KVCache, Reserved, SessionCache
from .rotary import RotaryTable, rotate
from .tensors import Matrix, Norm, product, read_matrix, read_slot

if TYPE_CHECKING:
    from .gpu.fused import Fused
    from .gpu.paged_cache import PagedCache

Way = Callable[["tuple[Row, ...]", torch.Tensor], torch.Tensor]
"""Runs rows and their hidden states through all layers, one way or another."""
Turns = dict[bool, tuple[torch.Tensor, torch.Tensor]]
"""cos and sin of a batch's tokens, by the key of their table (see `rotary_tables`)."""


class Block:
    """Hold the weights of one layer; q, k and v share one matrix, gate and up share another."""

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, layer: int, dtype: torch.dtype, precision: str, fast: bool,
        device: str,
    ) -> None:  # fmt: skip
        slots = list(weights.block(config, layer))
        matrices = {
            slot.name: read_matrix(slot, checkpoint, dtype, precision, fast, device)
            for slot in slots
            if slot.name in weights.PACKABLE
        }
        held = {
            slot.name: read_slot(slot, checkpoint, dtype, device) for slot in slots if slot.name not in weights.PACKABLE
        }
        self.held_bytes = sum(tensor.nbytes for tensor in [*held.values(), *matrices.values()])

        def norm(name: str) -> Norm | None:
            return Norm(config, held[name], held.get(name + "_bias")) if name in held else None

        norm_in, norm_mid = norm("norm_in"), norm("norm_mid")
        assert norm_in is not None and norm_mid is not None
        self.norm_in, self.norm_mid = norm_in, norm_mid
        self.norm_query, self.norm_key = norm("norm_query"), norm("norm_key")
        self.norm_attended, self.norm_out = norm("norm_attended"), norm("norm_out")
        self.qkv, self.qkv_bias = matrices["qkv"], held.get("qkv_bias")
        self.out, self.out_bias = matrices["out"], held.get("out_bias")
        nothing: Matrix = torch.empty(0, 0)  # for a layer whose experts run in other actors
        self.up, self.up_bias = matrices.get("up", nothing), held.get("up_bias")
        self.down, self.down_bias = matrices.get("down", nothing), held.get("down_bias")
        self.window = config.window(layer)


class Blocks:
    """Run the layers `first` to `last` (both included) with the KV cache of all sessions."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: tuple[int, int],
        dtype: torch.dtype,
        cache_tokens: int,
        progress: Callable[[float], None],
        precision: str = "dtype",
        fast: bool = False,
        device: str = CPU,
    ) -> None:
        first, last = layers
        self.look: Look | None = None
        self.inside = Inside(places_of(first, last))
        self.finite: bool | None = None
        self._first = first
        self.config = checkpoint.config
        self._scale = self.config.attention_scale or self.config.head_dim**-0.5
        self._device = device
        self.rotary = rotary_tables(self.config, dtype, device)
        self.blocks: list[Block] = []
        for layer in range(first, last + 1):
            self.blocks.append(Block(self.config, checkpoint, layer, dtype, precision, fast, device))
            progress((layer - first + 1) / (last - first + 1))
        self._compiled = Compiled.of(self.config, self.blocks, self._scale)
        self.fused = _fused(self.config, self.blocks, self._scale, cache_tokens, dtype, device)
        self.cache: KVCache[Any] = KVCache(cache_tokens, functools.partial(self._new_cache, dtype))
        self._for_torch = functools.partial(SessionCache, self.config, len(self.blocks), dtype=dtype, device=device)

    def _new_cache(self, dtype: torch.dtype, capacity: int) -> BlockCache | SessionCache | PagedCache:
        """Make a session's cache, of the kind that computes."""
        if self._compiled is not None:
            return BlockCache(self.config, len(self.blocks), capacity)
        if self.fused is not None:
            return self.fused.cache(capacity)
        return self._for_torch(capacity)

    def open(self, session: SessionInfo) -> None:
        self.inside.open(session)
        deep = self._compiled is not None and self.inside.deep(session.session)
        self.cache.open(session.session, session.capacity, self._for_torch if deep else None)
        for table in self.rotary.values():
            table.reserve(session.capacity)
        if self._compiled is not None:
            self._compiled.reserve(session.capacity)

    def forward(self, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> torch.Tensor:
        """Run one step of every row through every layer; the caches advance only if all layers succeed."""
        if self._compiled is not None:
            if not self.inside.sessions:
                return self._by_kernels(self._compiled, "hidden", rows, hidden_TH)
            by_kernels = functools.partial(self._by_kernels, self._compiled, "hidden")
            deep = [self.inside.deep(row.session) for row in rows]
            return self._apart(rows, hidden_TH, deep, self._by_torch, by_kernels)
        if self.fused is not None and self.look is None:
            with taken_back(self.cache, rows):
                return self._by_both(self.fused, rows, hidden_TH)
        return self._by_torch(rows, hidden_TH)

    def _by_torch(self, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> torch.Tensor:
        caches, turns = self._begin(rows)
        for index, block in enumerate(self.blocks):
            hidden_TH = self._attended(index, block, rows, caches, hidden_TH, turns)
            hidden_TH = self._touch(rows, index, self._fed_forward(rows, index, block, hidden_TH))
            self._report(rows, "hidden", index, hidden_TH)
        self._done(rows, caches)
        self.finite = None
        return hidden_TH

    def _by_both(self, fused: Fused, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> torch.Tensor:
        """Run rows of one token in one step of the kernels, and the others, and those that look inside, through torch."""

        def by_kernels(rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> torch.Tensor:
            made_TH = fused.step(rows, self.cache, hidden_TH, hidden=True, ends=False).hidden_TH
            assert made_TH is not None
            return made_TH

        chosen = [row.tokens == 1 and row.session not in self.inside.sessions for row in rows]
        return self._apart(rows, hidden_TH, chosen, by_kernels, self._by_torch)

    def _apart(
        self, rows: tuple[Row, ...], hidden_TH: torch.Tensor, chosen: Sequence[bool], one: Way, other: Way
    ) -> torch.Tensor:  # fmt: skip
        """Run the chosen rows one way, and the rest another way."""
        if all(chosen):
            return one(rows, hidden_TH)
        if not any(chosen):
            return other(rows, hidden_TH)
        given = dict(zip(rows, torch.split(hidden_TH, [row.tokens for row in rows]), strict=True))
        made: dict[Row, torch.Tensor] = {}
        with taken_back(self.cache, rows):
            for way, is_chosen in ((one, True), (other, False)):
                some = tuple(row for row, own in zip(rows, chosen, strict=True) if own is is_chosen)
                together_TH = way(some, torch.cat([given[row] for row in some]))
                made |= zip(some, torch.split(together_TH, [row.tokens for row in some]), strict=True)
        self.finite = None
        return torch.cat([made[row] for row in rows])

    def _by_kernels(
        self, compiled: Compiled, name: str, rows: tuple[Row, ...], hidden_TH: torch.Tensor
    ) -> torch.Tensor:
        caches = [self.cache.at(row.session, row.position, row.tokens) for row in rows]
        if self.look is None and not self.inside.wants(rows):
            hidden_TH, self.finite = compiled.step(rows, caches, hidden_TH)
        else:
            ends = list(range(1, len(self.blocks) + 1))
            if self.look is None:  # what enters the first layer is touched before
                ends = sorted({layer - self._first for layer in self.inside.layers(rows)}.intersection(ends))

            def touch(done: int, hidden_TH: torch.Tensor) -> torch.Tensor:
                hidden_TH = self._touch(rows, done - 1, hidden_TH)
                self._report(rows, name, done - 1, hidden_TH)
                return hidden_TH

            hidden_TH, self.finite = compiled.in_parts(rows, caches, hidden_TH, ends, touch)
        self._done(rows, caches)
        return hidden_TH

    def _touch_in(self, rows: tuple[Row, ...], name: str, index: int, tensor_T: torch.Tensor) -> torch.Tensor:
        """Let sessions change and read a tensor inside a layer, with any shape of each token."""
        if not self.inside.sessions or not any(self.inside.deep(row.session) for row in rows):
            return tensor_T
        tensor_T = tensor_T.contiguous()
        self.inside.touch(Place(name, self._first + index), rows, tensor_T.flatten(1))
        return tensor_T

    def _touch(self, rows: tuple[Row, ...], index: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Let sessions change and read what a layer has made."""
        return self.inside.touch(Place(HIDDEN, self._first + index + 1), rows, hidden_TH)

    def _report(self, rows: tuple[Row, ...], name: str, index: int, tensor_T: torch.Tensor) -> None:
        if self.look is not None:
            self.look(self._first + index, name, rows, tensor_T)

    def attention_alone(self, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual after attention, and the normed input for the feed-forward part, which runs elsewhere."""
        [block] = self.blocks
        if self._compiled is not None:
            hidden_TH = self._by_kernels(self._compiled, "attended", rows, hidden_TH)
            return hidden_TH, block.norm_mid(hidden_TH)
        caches, turns = self._begin(rows)
        hidden_TH = self._attended(0, block, rows, caches, hidden_TH, turns)
        self._done(rows, caches)
        return hidden_TH, block.norm_mid(hidden_TH)

    def _begin(self, rows: tuple[Row, ...]) -> tuple[list[SessionCache | PagedCache], Turns]:
        caches = [self.cache.at(row.session, row.position, row.tokens) for row in rows]
        parts = [torch.arange(row.position, row.position + row.tokens) for row in rows]
        positions_T = torch.cat(parts).to(self._device)
        return caches, {local: table.at(positions_T) for local, table in self.rotary.items()}

    def _done(self, rows: tuple[Row, ...], caches: Sequence[Reserved]) -> None:
        for row, cache in zip(rows, caches, strict=True):
            cache.length = row.position + row.tokens

    def _attended(
        self,
        index: int,
        block: Block,
        rows: tuple[Row, ...],
        caches: Sequence[SessionCache | PagedCache],
        hidden_TH: torch.Tensor,
        turns: Turns,
    ) -> torch.Tensor:
        config = self.config
        heads, kv_heads, width = config.heads, config.kv_heads, config.head_dim
        qkv_TND = product(block.norm_in(hidden_TH), block.qkv, block.qkv_bias).view(-1, heads + 2 * kv_heads, width)
        turned_TND = qkv_TND[:, : heads + kv_heads]
        if block.norm_query is not None and block.norm_key is not None:
            turned_TND = torch.cat((block.norm_query(turned_TND[:, :heads]), block.norm_key(turned_TND[:, heads:])), 1)
        turn = turns.get(bool(block.window), turns.get(False))
        if turn is not None:
            turned_TND = rotate(turned_TND, *turn)
        query_TND = self._touch_in(rows, "query", index, turned_TND[:, :heads])
        key_TKD = self._touch_in(rows, "key", index, turned_TND[:, heads:])
        value_TKD = self._touch_in(rows, "value", index, qkv_TND[:, heads + kv_heads :])
        for name, tensor in (("query", query_TND), ("key", key_TKD), ("value", value_TKD)):
            self._report(rows, name, index, tensor)
        attended = []
        start = 0
        for row, cache in zip(rows, caches, strict=True):
            stop, end = start + row.tokens, row.position + row.tokens
            cache.put(index, row.position, key_TKD[start:stop], value_TKD[start:stop])
            # positions before the window of the row's first token are not needed
            seen = max(0, row.position + 1 - block.window) if block.window else 0
            pattern = Place(PATTERN, self._first + index)
            if self.inside.at(pattern, row):
                keys_KPD, values_KPD = cache.seen(index, 0, end)
                touch = functools.partial(self.inside.touch, pattern, (row,))
                attended.append(
                    attend_in_sight(query_TND[start:stop], keys_KPD, values_KPD, self._scale, block.window, touch)
                )
            else:
                keys_KPD, values_KPD = cache.seen(index, seen, end)
                attended.append(attend(query_TND[start:stop], keys_KPD, values_KPD, self._scale, block.window))
            start = stop
        heads_TE = self._touch_in(rows, "heads", index, attended[0] if len(attended) == 1 else torch.cat(attended))
        mixed_TH = product(heads_TE, block.out, block.out_bias)
        mixed_TH = mixed_TH if block.norm_attended is None else block.norm_attended(mixed_TH)
        hidden_TH = hidden_TH + self._touch_in(rows, "attention", index, mixed_TH)
        hidden_TH = self._touch_in(rows, "attended", index, hidden_TH)
        self._report(rows, "attended", index, hidden_TH)
        return hidden_TH

    def _fed_forward(self, rows: tuple[Row, ...], index: int, block: Block, hidden_TH: torch.Tensor) -> torch.Tensor:
        made_TH = product(self._inner(block, block.norm_mid(hidden_TH)), block.down, block.down_bias)
        made_TH = made_TH if block.norm_out is None else block.norm_out(made_TH)
        return hidden_TH + self._touch_in(rows, "mlp", index, made_TH)

    def _inner(self, block: Block, normed_TH: torch.Tensor) -> torch.Tensor:
        inner = product(normed_TH, block.up, block.up_bias)
        if not self.config.gated:
            return activate(self.config, inner)
        gate_TI, up_TI = inner.chunk(2, dim=-1)
        return activate(self.config, gate_TI) * up_TI

    def held_bytes(self) -> int:
        return sum(block.held_bytes for block in self.blocks)


def places_of(first: int, last: int) -> Iterator[Place]:
    """Yield the places that some layers offer: what they make, and what they have inside."""
    for layer in range(first, last + 1):
        yield from (Place(name, layer) for name in IN_LAYER)
        yield Place(HIDDEN, layer + 1)


@contextmanager
def taken_back(cache: KVCache[Any], rows: Sequence[Row]) -> Iterator[None]:
    """Let each cache end where its row began if a step fails half-way, so that the step can be repeated."""
    before = [(cache.sessions[row.session], cache.sessions[row.session].length) for row in rows]
    try:
        yield
    except RowsFailed:  # the other rows have taken their step
        raise
    except BaseException:
        for held, length in before:
            held.length = length
        raise


def _fused(
    config: ModelConfig, blocks: Sequence[Block], scale: float, tokens: int, dtype: torch.dtype, device: str
) -> Fused | None:
    """Return the layers as the kernels of a GPU take them; None if the kernels cannot run them, or there are none."""
    if device == CPU or importlib.util.find_spec("triton") is None:
        return None
    from .gpu.fused import Fused

    return Fused.of(config, blocks, scale, tokens, dtype, device)


def rotary_tables(config: ModelConfig, dtype: torch.dtype, device: str = CPU) -> dict[bool, RotaryTable]:
    """Return the rotary table of layers without a window (False) and, if it differs, that of layers with one (True)."""
    if config.learned_positions:
        return {}
    tables = {False: RotaryTable(config.head_dim, config.rope_theta, config.rope_scaling, dtype, device)}
    if config.local_rope_theta is not None:
        tables[True] = RotaryTable(config.head_dim, config.local_rope_theta, None, dtype, device)
    return tables


def activate(config: ModelConfig, inner: torch.Tensor) -> torch.Tensor:
    if config.activation == "relu":
        return F.relu(inner)
    if config.activation == "gelu":
        return F.gelu(inner)
    return F.silu(inner) if config.activation == "silu" else F.gelu(inner, approximate="tanh")


def attend(
    query_tND: torch.Tensor,
    keys_KPD: torch.Tensor,
    values_KPD: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Return causal attention of the last t of P positions over all P, or over the last `window` (0: all): [t, N·D].

    For a single query, the G query heads of a key-value head form the query axis: torch's `enable_gqa` took five times
    as long.
    """
    tokens, heads, width = query_tND.shape
    kv_heads, positions, _ = keys_KPD.shape
    group = heads // kv_heads
    if tokens == 1:
        query_KGD = query_tND.view(kv_heads, group, width)
        mixed = F.scaled_dot_product_attention(query_KGD[None], keys_KPD[None], values_KPD[None], scale=scale)
        return mixed.view(1, -1)
    exact = query_tND.dtype is torch.float32
    if exact:  # float32 sums over many positions would cause a quarter of a step's error
        query_tND, keys_KPD, values_KPD = query_tND.double(), keys_KPD.double(), values_KPD.double()
    query_NtD = query_tND.transpose(0, 1)
    keys_NPD = keys_KPD.repeat_interleave(group, dim=0)
    values_NPD = values_KPD.repeat_interleave(group, dim=0)
    if tokens == positions and not 0 < window < positions:
        mixed = F.scaled_dot_product_attention(
            query_NtD[None], keys_NPD[None], values_NPD[None], is_causal=True, scale=scale
        )
        return _flat(mixed, exact)
    allowed_tP = torch.ones(tokens, positions, dtype=torch.bool, device=query_tND.device).tril(positions - tokens)
    if window:
        allowed_tP = allowed_tP.triu(positions - tokens - window + 1)
    mixed = F.scaled_dot_product_attention(query_NtD[None], keys_NPD[None], values_NPD[None], allowed_tP, scale=scale)
    return _flat(mixed, exact)


def attend_in_sight(
    query_tND: torch.Tensor,
    keys_KPD: torch.Tensor,
    values_KPD: torch.Tensor,
    scale: float,
    window: int,
    touch: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return what `attend` returns. Between its two products, `touch` gets the pattern [t, N · P], which it may change."""
    tokens, heads, _ = query_tND.shape
    kv_heads, positions, _ = keys_KPD.shape
    keys_NPD = keys_KPD.repeat_interleave(heads // kv_heads, dim=0).double()
    values_NPD = values_KPD.repeat_interleave(heads // kv_heads, dim=0).double()
    score_NtP = query_tND.transpose(0, 1).double() @ keys_NPD.transpose(1, 2) * scale
    seen_tP = torch.ones(tokens, positions, dtype=torch.bool, device=query_tND.device).tril(positions - tokens)
    if window:
        seen_tP = seen_tP.triu(positions - tokens - window + 1)
    pattern_tNP = score_NtP.masked_fill(~seen_tP, float("-inf")).softmax(-1).transpose(0, 1).contiguous()
    touch(pattern_tNP.view(tokens, -1))
    return (pattern_tNP.transpose(0, 1) @ values_NPD).transpose(0, 1).flatten(1).to(query_tND.dtype)


def _flat(mixed_1NtD: torch.Tensor, exact: bool) -> torch.Tensor:
    mixed_tE = mixed_1NtD[0].transpose(0, 1).flatten(1)
    return mixed_tE.float() if exact else mixed_tE
