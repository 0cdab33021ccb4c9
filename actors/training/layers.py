"""Define the built-in kinds as trainable modules: the families of `blocks.py`, over whole sequences, without caches.

Shape suffixes: T tokens of the micro-batch, S of one sequence, B sequences (T = B·S), H hidden, N query heads, K key-value
heads, D head width, V vocabulary, E experts, k choices per token.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ranvier.transport.format.header import Row

from ..checkpoint.config import ModelConfig
from ..component.actor import Batch, Context
from ..component.kinds import Kind
from ..component.routing import balancing_loss, expert_ports, gather, scatter
from ..model import weights
from ..model.blocks import activate, rotary_tables
from ..model.rotary import rotate
from ..model.slots import Slot
from ..model.tensors import Norm, needed, read_slot
from ..protocol.training_spec import BALANCE, LOGITS
from . import fused
from .fused import TILE
from .linear import linear
from .stage import Learner

DOWN, UP = "_lora_down", "_lora_up"


class Choices(NamedTuple):
    """Hold a router's decisions: the numbers of each token's experts and their weights, [T, k] each.

    `parts` holds the tokens for each expert, by port; `balance` is the balancing loss.
    """

    numbers: torch.Tensor
    weights: torch.Tensor
    parts: Mapping[str, torch.Tensor]
    balance: torch.Tensor


class NativeStage(Learner):
    """Compute the embedding, some blocks, the head, or several of these, depending on the kind.

    A parameter is one slot of `weights.py` (q, k and v share one matrix); `exported` returns the checkpoint's tensors.
    """

    splits = True
    writes = False

    def __init__(self, kind: Kind, context: Context, sequence: int, lora: tuple[int, float] | None = None) -> None:
        super().__init__()
        checkpoint, dtype = needed(context)
        self.config: ModelConfig = checkpoint.config
        self.sequence = sequence
        self._begins = kind.begins
        self._ends = kind.ends
        last = self.config.layers - 1
        self.layers = context.layers or ((0, last) if kind.whole else None)
        self._device = context.device
        self._slots: dict[str, Slot] = {}
        for name, slot in self._slots_of(context):
            self._slots[name] = slot
            self.register_parameter(name, nn.Parameter(read_slot(slot, checkpoint, dtype, self._device)))
        self._adapted = lora
        if lora is not None:
            self._adapt(lora[0], dtype)
        self._rotary = rotary_tables(self.config, dtype, self._device)
        for table in self._rotary.values():
            table.reserve(sequence)
        self._scale = self.config.attention_scale or self.config.head_dim**-0.5

    def _slots_of(self, context: Context) -> Iterator[tuple[str, Slot]]:
        """Yield every slot with its parameter name; a tied head at the same stage uses the embedding's matrix."""
        config = self.config
        if self._begins:
            yield from ((slot.name, slot) for slot in weights.embedding(config))
        if self.layers is not None:
            for layer in range(self.layers[0], self.layers[1] + 1):
                yield from attention_slots(config, layer)
                for number in range(config.experts):
                    yield from expert_slots(config, layer, number)
        if self._ends:
            ending = weights.final_norm(config) if self._begins and config.tied else weights.head(config)
            yield from ((slot.name, slot) for slot in ending)

    def _adapt(self, rank: int, dtype: torch.dtype) -> None:
        """Add to each matrix of the blocks, except routers, the product of two narrow matrices (LoRA), zero at first.

        The random one of the two is seeded by its name, so that it does not depend on the stage that runs the layer.
        """
        for name, slot in self._slots.items():
            if name.startswith("layer") and slot.columns is not None and not name.endswith("gate"):
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                down = torch.empty(rank, slot.columns).normal_(0, slot.columns**-0.5, generator=generator)
                self.register_parameter(f"{name}{DOWN}", nn.Parameter(down.to(self._device, dtype)))
                up = torch.zeros(slot.shape[0], rank, dtype=dtype, device=self._device)
                self.register_parameter(f"{name}{UP}", nn.Parameter(up))

    def stays(self, name: str) -> bool:
        return self._adapted is not None and not name.endswith((DOWN, UP))

    def forward(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        hidden_TH = self._embedded(batch["token"]) if self._begins else batch["hidden"]
        uneven = []
        if self.layers is not None:
            for layer in range(self.layers[0], self.layers[1] + 1):
                hidden_TH, normed_TH = self._attention(layer, hidden_TH)
                if self.config.experts:
                    mixed_TH, balance = self._mixture(layer, normed_TH)
                    hidden_TH = hidden_TH + mixed_TH
                    uneven.append(balance)
                else:
                    hidden_TH = hidden_TH + self._fed(layer, normed_TH)
        made = {LOGITS: self._logits(hidden_TH)} if self._ends else {"hidden": hidden_TH}
        return {**made, BALANCE: torch.stack(uneven).sum()} if uneven else made

    def exported(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the checkpoint's tensors in these weights, under its names, with LoRA products added."""
        made = {}
        for name, slot in self._slots.items():
            start, whole = 0, held[name]
            if f"{name}{UP}" in held and self._adapted is not None:
                product = held[f"{name}{UP}"].float() @ held[f"{name}{DOWN}"].float()
                whole = (whole.float() + self._adapted[1] * product).to(whole.dtype)
            for part, rows in slot.parts:
                piece = whole[start : start + rows]
                made[part] = (piece.t() if slot.transposed else piece).contiguous()
                start += rows
        return made

    # -- parts --------------------------------------------------------------------------------------------------

    def _weight(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = getattr(self, name)  # the parameter, or the stashed version that replaces it
        return weight

    def _held(self, name: str) -> torch.Tensor | None:
        return self._weight(name) if name in self._slots else None

    def _embedded(self, token_T: torch.Tensor) -> torch.Tensor:
        hidden_TH = F.embedding(token_T, self._weight("embedding"))
        if self.config.embedding_scale != 1.0:
            hidden_TH = hidden_TH * torch.tensor(self.config.embedding_scale, dtype=hidden_TH.dtype)
        positions_PH = self._held("positions")
        if positions_PH is not None:
            hidden_TH = hidden_TH + positions_PH[: self.sequence].repeat(len(token_T) // self.sequence, 1)
        return hidden_TH

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        weight = self._weight(name)
        if self.config.norm != "layer" and fused.able(hidden.shape[-1], hidden, weight):
            more = 1.0 if self.config.norm == "rms_plus_one" else 0.0
            return fused.root_mean_square(hidden, weight, self.config.norm_eps, more)
        return Norm(self.config, weight, self._held(name + "_bias"))(hidden)

    def _linear(self, name: str, given: torch.Tensor) -> torch.Tensor:
        made = linear(given, self._weight(name), self._held(name + "_bias"))
        if self._adapted is None or not hasattr(self, f"{name}{UP}"):
            return made
        narrow = linear(given, self._weight(f"{name}{DOWN}"))
        return made + self._adapted[1] * linear(narrow, self._weight(f"{name}{UP}"))

    def _attention(self, layer: int, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual and the input of the feed-forward part."""
        at, config = f"layer{layer}_", self.config
        mixed_TH = self._linear(at + "out", self._attended(layer, self._norm(at + "norm_in", hidden_TH)))
        hidden_TH = hidden_TH + (self._norm(at + "norm_attended", mixed_TH) if config.post_norms else mixed_TH)
        normed_TH = self._norm(at + "norm_mid", hidden_TH)
        if config.shared_expert:
            opened_T1 = self._linear(at + "shared_gate", normed_TH).sigmoid()
            hidden_TH = hidden_TH + opened_T1 * self._up_and_down(at + "shared_", normed_TH)
        return hidden_TH, normed_TH

    def _fed(self, layer: int, normed_TH: torch.Tensor) -> torch.Tensor:
        at = f"layer{layer}_"
        made_TH = self._up_and_down(at, normed_TH)
        return self._norm(at + "norm_out", made_TH) if self.config.post_norms else made_TH

    def _up_and_down(self, at: str, given_TH: torch.Tensor) -> torch.Tensor:
        config, inner = self.config, self._linear(at + "up", given_TH)
        if config.gated and config.activation == "silu" and fused.able(inner.shape[-1] // 2, inner):
            inner = fused.swiglu(inner)
        elif config.gated:
            gate_TI, up_TI = inner.chunk(2, dim=-1)
            inner = activate(config, gate_TI) * up_TI
        else:
            inner = activate(config, inner)
        return self._linear(at + "down", inner)

    def _mixture(self, layer: int, normed_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run all experts of a layer, each over its tokens; return their weighted sum and the balancing loss."""
        chosen = self._chosen(layer, normed_TH)
        made = {port: self._up_and_down(f"layer{layer}_{port}_", part) for port, part in chosen.parts.items()}
        return gather(chosen.numbers, chosen.weights, made, list(made)), chosen.balance

    def _chosen(self, layer: int, normed_TH: torch.Tensor) -> Choices:
        scores_TE = linear(normed_TH, self._weight(f"layer{layer}_gate")).float().softmax(-1)
        weight_Tk, index_Tk = scores_TE.topk(self.config.experts_per_token, dim=-1)
        if self.config.normalises_choices:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
        ports = expert_ports((0, self.config.experts - 1))
        routed = scatter((Row(1, 1, 0, len(normed_TH)),), normed_TH, index_Tk, ports)
        parts = {port: part[port] for port, part in routed.items()}
        return Choices(index_Tk, weight_Tk, parts, balancing_loss(scores_TE, index_Tk))

    def _attended(self, layer: int, normed_TH: torch.Tensor) -> torch.Tensor:
        at, config, sequence = f"layer{layer}_", self.config, self.sequence
        heads, kv_heads, width = config.heads, config.kv_heads, config.head_dim
        qkv_TE = self._linear(at + "qkv", normed_TH)
        window = config.window(layer)
        table = self._rotary.get(bool(window), self._rotary.get(False))
        if table is not None and not config.head_norms and fused.able(TILE, qkv_TE, table.cos_PD):
            cos_SD, sin_SD = table.cos_PD[:sequence], table.sin_PD[:sequence]
            return self._mixed(*fused.heads(qkv_TE, cos_SD, sin_SD, heads, kv_heads), window)
        qkv_TND = qkv_TE.view(-1, heads + 2 * kv_heads, width)
        turned_TND, values_TKD = torch.split(qkv_TND, [heads + kv_heads, kv_heads], 1)
        if config.head_norms:
            query_TND, keys_TKD = torch.split(turned_TND, [heads, kv_heads], 1)
            normed = self._norm(at + "norm_query", query_TND), self._norm(at + "norm_key", keys_TKD)
            turned_TND = torch.cat(normed, 1)
        if table is not None:
            positions_T = torch.arange(sequence, device=self._device).repeat(len(normed_TH) // sequence)
            turned_TND = rotate(turned_TND, *table.at(positions_T))
        query_TND, keys_TKD = torch.split(turned_TND, [heads, kv_heads], 1)
        query, keys, values = (
            each.view(-1, sequence, each.shape[1], width).transpose(1, 2) for each in (query_TND, keys_TKD, values_TKD)
        )
        return self._mixed(query, keys, values, window)

    def _mixed(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
        """Return causal attention over the last `window` positions (0: all): [B, heads, S, D] each -> [T, N·D]."""
        sequence, group = self.sequence, query.shape[1] // keys.shape[1]
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        if 0 < window < sequence:
            seen_SS = torch.ones(sequence, sequence, dtype=torch.bool, device=self._device).tril().triu(1 - window)
            mixed = F.scaled_dot_product_attention(query, keys, values, seen_SS, scale=self._scale)
        else:
            mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=self._scale)
        return mixed.transpose(1, 2).reshape(-1, mixed.shape[1] * mixed.shape[3])

    def _logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        matrix = "head" if "head" in self._slots else "embedding"
        logits_TV = linear(self._norm("norm", hidden_TH), self._weight(matrix))
        cap = self.config.logit_softcap
        return logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap


def attention_slots(config: ModelConfig, layer: int) -> Iterator[tuple[str, Slot]]:
    """Yield a layer's slots with their parameter names, without the experts of a mixture."""
    at = f"layer{layer}_"
    yield from ((at + slot.name, slot) for slot in weights.block(config, layer))
    if config.experts:
        yield at + "gate", weights.gate(config, layer)
        yield from ((f"{at}shared_{slot.name}", slot) for slot in weights.shared_expert(config, layer))


def expert_slots(config: ModelConfig, layer: int, number: int) -> Iterator[tuple[str, Slot]]:
    """Yield an expert's slots with their parameter names."""
    yield from ((f"layer{layer}_expert{number}_{slot.name}", slot) for slot in weights.expert(config, layer, number))
