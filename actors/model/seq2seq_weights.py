"""List the tensors that each layer group of an encoder–decoder model needs, under the names of its family.

T5 and mT5 number the parts of a layer; BART and related families name them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..checkpoint.config import ModelConfig, Seq2Seq
from ..component.kinds import Kind
from .slots import Slot

Side = Literal["encoder", "decoder"]
LEARNED_FROM = 2
"""Rows at the start of BART's learned positions that belong to no position."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Hold a family's names for the parts of a layer."""

    attention: str
    attention_norm: str
    cross: str
    cross_norm: str
    query_key_value: tuple[str, str, str]
    out: str
    up: tuple[str, ...]
    down: str
    feed_norm: str


def seq2seq(config: ModelConfig) -> Seq2Seq:
    assert config.encoder is not None, "the check of the graph gives these kinds only to encoder–decoder models"
    return config.encoder


def _is_t5(config: ModelConfig) -> bool:
    return config.family in ("t5", "mt5")


def _names(config: ModelConfig, side: Side) -> _Names:
    if not _is_t5(config):
        return _Names(
            "self_attn.", "self_attn_layer_norm", "encoder_attn.", "encoder_attn_layer_norm",
            ("q_proj", "k_proj", "v_proj"), "out_proj", ("fc1",), "fc2", "final_layer_norm",
        )  # fmt: skip
    feed = "layer.2." if side == "decoder" else "layer.1."
    up = ("wi_0", "wi_1") if config.gated else ("wi",)
    return _Names(
        "layer.0.SelfAttention.", "layer.0.layer_norm", "layer.1.EncDecAttention.", "layer.1.layer_norm",
        ("q", "k", "v"), "o", tuple(f"{feed}DenseReluDense.{name}" for name in up), f"{feed}DenseReluDense.wo",
        f"{feed}layer_norm",
    )  # fmt: skip


def _prefix(config: ModelConfig, side: Side) -> str:
    return f"{side}." if _is_t5(config) else f"model.{side}."


def embedding(config: ModelConfig, side: Side) -> Iterator[Slot]:
    """Yield the tensors of one side's embedding; both sides read the same matrix if the checkpoint shares it."""
    model = seq2seq(config)
    prefix = _prefix(config, side)
    vocab = model.source_vocab if side == "encoder" else config.vocab
    yield Slot("embedding", ((_matrix(config, side), vocab),), config.hidden)
    if model.positions == "learned":
        yield Slot("positions", ((prefix + "embed_positions.weight", config.context + LEARNED_FROM),), config.hidden)
    if model.embedding_norm:
        yield from _norm(config, "norm", prefix + "layernorm_embedding")


def _matrix(config: ModelConfig, side: Side) -> str:
    if _is_t5(config):
        return "shared.weight"
    return f"model.{side}.embed_tokens.weight" if seq2seq(config).separate else "model.shared.weight"


def layer(config: ModelConfig, side: Side, index: int) -> Iterator[Slot]:
    """Yield the tensors of one layer: self-attention's q, k, v in one matrix, cross-attention's k and v in another."""
    model, names = seq2seq(config), _names(config, side)
    prefix = f"{_prefix(config, side)}{'block' if _is_t5(config) else 'layers'}.{index}."
    inner = model.intermediate if side == "encoder" else config.intermediate
    width = (config.head_dim * config.heads) if _is_t5(config) else config.hidden
    query, key, value = names.query_key_value
    bias, hidden = config.qkv_bias, config.hidden
    yield from _norm(config, "norm_in", prefix + names.attention_norm)
    yield from _linear(prefix + names.attention, "qkv", (query, key, value), width, hidden, bias)
    yield from _linear(prefix + names.attention, "out", (names.out,), hidden, width, bias)
    if side == "decoder":
        yield from _norm(config, "norm_cross", prefix + names.cross_norm)
        yield from _linear(prefix + names.cross, "cross_query", (query,), width, hidden, bias)
        yield from _linear(prefix + names.cross, "cross_kv", (key, value), width, hidden, bias)
        yield from _linear(prefix + names.cross, "cross_out", (names.out,), hidden, width, bias)
    yield from _norm(config, "norm_mid", prefix + names.feed_norm)
    yield from _linear(prefix, "up", names.up, inner, hidden, bias)
    yield from _linear(prefix, "down", (names.down,), hidden, inner, bias)


def relative(config: ModelConfig, side: Side) -> Iterator[Slot]:
    """Yield the biases of relative positions: the file has them in the first layer, and every layer adds them."""
    model = seq2seq(config)
    if model.positions == "relative":
        name = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Slot("relative", ((name, model.buckets),), config.heads)


def final_norm(config: ModelConfig, side: Side) -> Iterator[Slot]:
    """Yield the norm after a side's last layer, in families that have it; the decoder's belongs to the head."""
    if seq2seq(config).final_norm:
        last = "final_layer_norm" if _is_t5(config) else "layer_norm"
        yield from _norm(config, "norm", _prefix(config, side) + last)


def head(config: ModelConfig) -> Iterator[Slot]:
    """Yield the final norm and the output matrix, which is the decoder's embedding if it is tied."""
    yield from final_norm(config, "decoder")
    yield Slot(
        "head", ((_matrix(config, "decoder") if config.tied else "lm_head.weight", config.vocab),), config.hidden
    )


def bias(config: ModelConfig) -> Slot | None:
    """Return the bias of the logits, [1, V], if the family has it; checkpoints may leave it out where it is zero."""
    return Slot("bias", (("final_logits_bias", 1),), config.vocab) if seq2seq(config).logits_bias else None


def slots(kind: Kind, config: ModelConfig, layers: tuple[int, int] | None) -> Iterator[Slot]:
    """Yield every tensor that an actor of a built-in kind holds."""
    side: Side = "encoder" if kind.encodes else "decoder"
    if kind.begins:
        yield from embedding(config, side)
    elif kind.ends:
        yield from head(config)
    elif layers is not None:
        yield from relative(config, side)
        for index in range(layers[0], layers[1] + 1):
            yield from layer(config, side, index)
        if side == "encoder" and layers[1] == seq2seq(config).layers - 1:
            yield from final_norm(config, side)


def _norm(config: ModelConfig, name: str, tensor: str) -> Iterator[Slot]:
    yield Slot(name, ((tensor + ".weight", config.hidden),))
    if config.norm == "layer":
        yield Slot(name + "_bias", ((tensor + ".bias", config.hidden),))


def _linear(prefix: str, name: str, parts: Sequence[str], rows: int, columns: int, biased: bool) -> Iterator[Slot]:
    yield Slot(name, tuple((f"{prefix}{part}.weight", rows) for part in parts), columns)
    if biased:
        yield Slot(name + "_bias", tuple((f"{prefix}{part}.bias", rows) for part in parts))
