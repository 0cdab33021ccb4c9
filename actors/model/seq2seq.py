"""Define the actors of an encoder–decoder model.

They are `encoder_embedding`, `encoder` and `decoder`, and the decoder's own forms of `embedding` and `head`. The
encoder takes a whole source at once and keeps nothing. A decoder receives the encoder's output (`memory`) once per
session. It turns that into keys and values of its layers, and keeps these beside its KV cache.

Shape suffixes: T tokens of the batch, t tokens of one row, R rows, M tokens of the source, H hidden, N heads, D head
width, P positions, B buckets, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from ranvier.transport.format.header import Row

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig
from ..component.actor import Actor, Batch, Context, Look
from ..component.devices import here
from ..component.session import SessionInfo
from . import seq2seq_weights, weights
from .blocks import activate
from .causal import Embedding
from .head import Head
from .kernels.packed import Packed
from .kv_cache import KVCache, SessionCache
from .seq2seq_weights import LEARNED_FROM, Side, seq2seq
from .slots import Slot
from .tensors import Matrix, Norm, finite, needed, product, read_matrices, read_slot, sent

Held = dict[str, torch.Tensor]
KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class SourceEmbedding(Embedding):
    """Embed the decoder's tokens: `token` int64 [tokens] -> `hidden` [tokens, H]."""

    side: Side = "decoder"
    on_host = ()

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        config = checkpoint.config
        held = _read(seq2seq_weights.embedding(config, self.side), context)
        self.weight_VH = held["embedding"]
        self.positions_PH = held["positions"][LEARNED_FROM:] if "positions" in held else None
        if seq2seq(config).positions == "sinusoidal":
            self.positions_PH = sinusoids(config.context, config.hidden, dtype).to(context.device)
        self._norm = _norm(config, held, "norm")
        self._held = sum(tensor.nbytes for tensor in held.values())
        self.use_scale(config, dtype)
        context.progress(1.0)

    def forward(self, rows: tuple[Row, ...], token_T: torch.Tensor) -> torch.Tensor:
        hidden_TH = super().forward(rows, token_T)
        return self._norm(hidden_TH) if self._norm is not None else hidden_TH

    def held_bytes(self) -> int:
        return self._held


class EncoderEmbedding(SourceEmbedding):
    """Embed the source: `prompt` int64 [tokens] -> `hidden` [tokens, H]."""

    side: Side = "encoder"

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        return {"hidden": self.forward(batch.rows, batch["prompt"])}


class Encoder(Actor):
    """Run encoder layers, `hidden` [tokens, H] -> `hidden` [tokens, H]; each token sees its whole source."""

    writes = False
    places = True
    makes_new = True
    look: Look | None = None

    def load(self, context: Context) -> None:
        checkpoint, _ = needed(context)
        assert context.layers is not None
        config = checkpoint.config
        self.stack = Stack(checkpoint, "encoder", context)
        self._first, last = context.layers[0], context.layers[1] == seq2seq(config).layers - 1
        final = _read(seq2seq_weights.final_norm(config, "encoder"), context) if last else {}
        self._norm = _norm(config, final, "norm")
        self._held = self.stack.held_bytes + sum(tensor.nbytes for tensor in final.values())

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        hidden_TH, stack = batch["hidden"], self.stack
        for index, layer in enumerate(stack.layers):

            def attend(query_TND: torch.Tensor, keys_TND: torch.Tensor, values_TND: torch.Tensor) -> torch.Tensor:
                made, start = [], 0
                for row in batch.rows:
                    stop = start + row.tokens
                    made.append(stack.attend(
                        query_TND[start:stop], keys_TND[start:stop].transpose(0, 1), values_TND[start:stop].transpose(0, 1),
                        stack.scores(0, row.tokens, row.tokens),
                    ))  # fmt: skip
                    start = stop
                return torch.cat(made)

            hidden_TH = layer.forward(hidden_TH, attend)
            if layer is stack.layers[-1] and self._norm is not None:
                hidden_TH = self._norm(hidden_TH)
            if self.look is not None:
                self.look(self._first + index, "hidden", batch.rows, hidden_TH)
        return {"hidden": finite(self, "hidden", hidden_TH)}

    def held_bytes(self) -> int:
        return self._held


class DecoderSession(SessionCache):
    """Hold a session's KV cache and, once they are received, keys and values of its source, [N, M, D] per layer."""

    def __init__(self, config: ModelConfig, layers: int, capacity: int, dtype: torch.dtype, device: str) -> None:
        super().__init__(config, layers, capacity, dtype, device)
        self.memory: list[tuple[torch.Tensor, torch.Tensor]] = []


class Decoder(Actor):
    """Run decoder layers with their KV cache: `hidden` [tokens, H] -> `hidden` [tokens, H].

    The encoder's output, `memory` [tokens, H], arrives once per session, before its first step.
    """

    writes = False
    places = True
    makes_new = True
    look: Look | None = None

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        assert context.layers is not None
        self._first, last = context.layers
        self.stack = Stack(checkpoint, "decoder", context)
        self.cache = KVCache(
            context.cache_tokens,
            lambda capacity: DecoderSession(checkpoint.config, last - self._first + 1, capacity, dtype, context.device),
        )

    def open(self, session: SessionInfo) -> None:
        self.cache.open(session.session, session.capacity)

    def close(self, session: int) -> None:
        self.cache.close(session)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        if "memory" in batch.tensors:
            parts = torch.split(batch["memory"], [row.tokens for row in batch.rows])
            for row, memory_MH in zip(batch.rows, parts, strict=True):
                self.cache.sessions[row.session].memory = [layer.remembered(memory_MH) for layer in self.stack.layers]
            return {}
        return sent(self, "hidden", batch.rows, self.forward(batch.rows, batch["hidden"]))

    def forward(self, rows: tuple[Row, ...], hidden_TH: torch.Tensor) -> torch.Tensor:
        """Run one step of every row through every layer; the caches advance only if all layers succeed."""
        caches = [self.cache.at(row.session, row.position, row.tokens) for row in rows]
        stack = self.stack
        scores = [stack.scores(row.position, row.tokens, row.position + row.tokens) for row in rows]
        for index, layer in enumerate(stack.layers):
            own = [(cache.keys_LKPD[index], cache.values_LKPD[index]) for cache in caches]
            memory = [cache.memory[index] for cache in caches]
            hidden_TH = layer.forward(
                hidden_TH, partial(self._attend, rows, own, scores), partial(self._attend_across, rows, memory)
            )
            if self.look is not None:
                self.look(self._first + index, "hidden", rows, hidden_TH)
        for row, cache in zip(rows, caches, strict=True):
            cache.length = row.position + row.tokens
        return hidden_TH

    def _attend(
        self, rows: tuple[Row, ...], own: Sequence[KeysAndValues], scores: Sequence[torch.Tensor | None],
        query_TND: torch.Tensor, keys_TND: torch.Tensor, values_TND: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Return each row's attention over its tokens so far, [T, N·D]; writes keys and values where its cache ends."""
        made, start = [], 0
        for row, (keys_NPD, values_NPD), score in zip(rows, own, scores, strict=True):
            stop, end = start + row.tokens, row.position + row.tokens
            keys_NPD[:, row.position : end] = keys_TND[start:stop].transpose(0, 1)
            values_NPD[:, row.position : end] = values_TND[start:stop].transpose(0, 1)
            made.append(self.stack.attend(query_TND[start:stop], keys_NPD[:, :end], values_NPD[:, :end], score))
            start = stop
        return torch.cat(made)

    def _attend_across(
        self, rows: tuple[Row, ...], memory: Sequence[KeysAndValues], query_TND: torch.Tensor
    ) -> torch.Tensor:
        """Return each row's attention over its source, [T, N·D]."""
        parts = torch.split(query_TND, [row.tokens for row in rows])
        return torch.cat([
            self.stack.attend(part, *source, None) for part, source in zip(parts, memory, strict=True)
        ])  # fmt: skip

    def capacity_tokens(self) -> int | None:
        return self.cache.tokens

    def held_bytes(self) -> int:
        return self.stack.held_bytes


class Seq2SeqHead(Head):
    """Choose the next token of each session from `hidden` [tokens, H], as the head of a causal model does."""

    def load(self, context: Context) -> None:
        checkpoint, dtype = needed(context)
        config = checkpoint.config
        model = seq2seq(config)
        slots = list(seq2seq_weights.head(config))
        held = _read(slots, context)
        self._norm = _norm(config, held, "norm")
        self.weight_VH = read_matrices(_matrices(slots), checkpoint, dtype, context)["head"]
        self.held = self.weight_VH.nbytes + sum(tensor.nbytes for tensor in held.values())
        self._scale = model.head_scale
        bias = seq2seq_weights.bias(config)
        there = bias is not None and "final_logits_bias" in checkpoint.tensors
        self._bias_1V = read_slot(bias, checkpoint, dtype, context.device) if bias is not None and there else None
        self.never = torch.tensor(model.suppressed) if model.suppressed else None
        self._first = model.first_token
        self.streams = {}
        context.progress(1.0)

    def allowed(self, due: list[Row], logits_RV: torch.Tensor) -> torch.Tensor:
        if self.never is not None:
            logits_RV = logits_RV.index_fill(1, self.never, float("-inf"))
        begins = [index for index, row in enumerate(due) if row.position + row.tokens == 1]
        if self._first is not None and begins:
            forced = torch.full_like(logits_RV, float("-inf"))
            forced[:, self._first] = 0.0
            chosen = torch.zeros(len(due), 1, dtype=torch.bool)
            chosen[begins] = True
            logits_RV = torch.where(chosen, forced, logits_RV)
        return logits_RV

    def logits(self, picked_TH: torch.Tensor) -> torch.Tensor:
        if self._norm is not None:
            picked_TH = self._norm(picked_TH)
        scaled_TH = picked_TH * self._scale if self._scale != 1.0 else picked_TH
        # what the kernels make is float32 already: do not round it
        logits_TV = product(scaled_TH.float() if isinstance(self.weight_VH, Packed) else scaled_TH, self.weight_VH)
        return here((logits_TV + self._bias_1V if self._bias_1V is not None else logits_TV).float())


# -- layers -----------------------------------------------------------------------------------------------------------


class Layer:
    """Run one layer of either side; `attend` is the side's attention over queries, keys and values, each [T, N, D]."""

    def __init__(self, config: ModelConfig, held: Held, matrices: Mapping[str, Matrix], heads: int) -> None:
        self._config = config
        self._held = held
        self._matrices = matrices
        self._heads = heads
        self._first = seq2seq(config).norms_first
        self._norm_in, self._norm_mid = _norm(config, held, "norm_in"), _norm(config, held, "norm_mid")
        self._norm_cross = _norm(config, held, "norm_cross")
        self.held_bytes = sum(tensor.nbytes for tensor in [*held.values(), *matrices.values()])

    def forward(
        self,
        hidden_TH: torch.Tensor,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        attend_across: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        heads = self._heads

        def itself(normed_TH: torch.Tensor) -> torch.Tensor:
            query, keys, values = self._linear("qkv", normed_TH).chunk(3, -1)
            mixed = attend(*(_in_heads(part, heads) for part in (query, keys, values)))
            return self._linear("out", mixed)

        def across(normed_TH: torch.Tensor) -> torch.Tensor:
            assert attend_across is not None
            return self._linear("cross_out", attend_across(_in_heads(self._linear("cross_query", normed_TH), heads)))

        hidden_TH = self._added(self._norm_in, hidden_TH, itself)
        if attend_across is not None:
            hidden_TH = self._added(self._norm_cross, hidden_TH, across)
        return self._added(self._norm_mid, hidden_TH, self._fed_forward)

    def remembered(self, memory_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the source, [N, M, D] each."""
        keys, values = self._linear("cross_kv", memory_MH).chunk(2, -1)
        keys_MND, values_MND = _in_heads(keys, self._heads), _in_heads(values, self._heads)
        return keys_MND.transpose(0, 1).contiguous(), values_MND.transpose(0, 1).contiguous()

    def _added(
        self, norm: Norm | None, hidden_TH: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        assert norm is not None
        return hidden_TH + part(norm(hidden_TH)) if self._first else norm(hidden_TH + part(hidden_TH))

    def _linear(self, name: str, hidden_TH: torch.Tensor) -> torch.Tensor:
        return product(hidden_TH, self._matrices[name], self._held.get(name + "_bias"))

    def _fed_forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        inner = self._linear("up", hidden_TH)
        if not self._config.gated:
            return self._linear("down", activate(self._config, inner))
        gate, up = inner.chunk(2, -1)
        return self._linear("down", activate(self._config, gate) * up)


class Stack:
    """Hold the layers of one actor and what they share: the scale of scores, and the biases of relative positions."""

    def __init__(self, checkpoint: Checkpoint, side: Side, context: Context) -> None:
        _, dtype = needed(context)
        config = checkpoint.config
        self._model = seq2seq(config)
        self._side = side
        heads = self._model.heads if side == "encoder" else config.heads
        width = config.head_dim if self._model.positions == "relative" else config.hidden // heads
        self._scale = config.attention_scale or width**-0.5
        shared = _read(seq2seq_weights.relative(config, side), context)
        self._relative_BN = shared.get("relative")
        self._dtype, self._device = dtype, context.device
        self.layers: list[Layer] = []
        assert context.layers is not None
        first, last = context.layers
        for index in range(first, last + 1):
            slots = list(seq2seq_weights.layer(config, side, index))
            matrices = read_matrices(_matrices(slots), checkpoint, dtype, context)
            self.layers.append(Layer(config, _read(slots, context), matrices, heads))
            context.progress((index - first + 1) / (last - first + 1))
        self.held_bytes = sum(layer.held_bytes for layer in self.layers)
        self.held_bytes += sum(tensor.nbytes for tensor in shared.values())

    def scores(self, position: int, tokens: int, positions: int) -> torch.Tensor | None:
        """Return what is added to the attention scores, [N or 1, t, P]; None if nothing is.

        The scores are those of `tokens` tokens from `position` on over `positions` keys. Keys that a decoder may not
        see get -inf.
        """
        place_P = torch.arange(positions, device=self._device)
        behind_tP = place_P[None] - place_P[position : position + tokens, None]
        if self._relative_BN is not None:
            bucket_tP = bucket(behind_tP, self._side == "encoder", self._model.buckets, self._model.distance)
            added_NtP = F.embedding(bucket_tP, self._relative_BN).permute(2, 0, 1)
        elif self._side == "encoder" or tokens == 1:
            return None
        else:
            added_NtP = torch.zeros(1, tokens, positions, dtype=self._dtype, device=self._device)
        if self._side == "decoder" and tokens > 1:
            added_NtP = added_NtP.masked_fill(behind_tP > 0, float("-inf"))
        return added_NtP.contiguous()

    def attend(
        self,
        query_tND: torch.Tensor,
        keys_NPD: torch.Tensor,
        values_NPD: torch.Tensor,
        scores_NtP: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention of one row's tokens, [t, N·D]."""
        mask = scores_NtP[None] if scores_NtP is not None else None
        mixed = F.scaled_dot_product_attention(
            query_tND.transpose(0, 1)[None], keys_NPD[None], values_NPD[None], mask, scale=self._scale
        )
        return mixed[0].transpose(0, 1).flatten(1)


def _in_heads(wide: torch.Tensor, heads: int) -> torch.Tensor:
    return wide.reshape(wide.shape[0], heads, -1)


def bucket(behind: torch.Tensor, both_ways: bool, buckets: int, distance: int) -> torch.Tensor:
    """Return the bucket of each relative position (key minus query).

    Buckets are exact for near positions and logarithmic up to `distance` (Raffel et al. 2020, as in transformers'
    `modeling_t5.py`).
    """
    found = torch.zeros_like(behind)
    if both_ways:
        buckets //= 2
        found = (behind > 0).long() * buckets
        behind = behind.abs()
    else:
        behind = -behind.clamp(max=0)
    exact = buckets // 2
    far = torch.log(behind.float().clamp(min=1) / exact) / math.log(distance / exact) * (buckets - exact)
    return found + torch.where(behind < exact, behind, (exact + far.long()).clamp(max=buckets - 1))


def sinusoids(positions: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Return sinusoidal positions, [P, H]: first sines, then cosines (Vaswani et al. 2017; marian's order)."""
    column = torch.arange(hidden, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (column // 2) / hidden)
    return torch.cat((angle[:, 0::2].sin(), angle[:, 1::2].cos()), 1).float().to(dtype)


def _read(wanted: Iterable[Slot], context: Context) -> Held:
    """Read the slots that are no matrices for products."""
    checkpoint, dtype = needed(context)
    return {
        slot.name: read_slot(slot, checkpoint, dtype, context.device)
        for slot in wanted
        if slot.name not in weights.PACKABLE
    }


def _matrices(wanted: Iterable[Slot]) -> list[Slot]:
    return [slot for slot in wanted if slot.name in weights.PACKABLE]


def _norm(config: ModelConfig, held: Held, name: str) -> Norm | None:
    return Norm(config, held[name], held.get(name + "_bias")) if name in held else None
