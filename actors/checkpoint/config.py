"""The architecture of a checkpoint, whichever file it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear` (by `factor`) or `llama3` (Llama 3.1's smooth change between two
    wavelengths), as in transformers' `modeling_rope_utils`."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A causal model of the llama family. Widths are in elements."""

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "context"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 1 << 31:
                raise CheckpointError(f"config: expected {name} as a positive integer, got {value!r}")
        if self.heads % self.kv_heads:
            raise CheckpointError(f"config: {self.heads} heads are no multiple of {self.kv_heads} key-value heads")

    @property
    def kv_elements_per_token_and_layer(self) -> int:
        """Elements, times two for key and value; multiply by the itemsize of the dtype."""
        return 2 * self.kv_heads * self.head_dim


def from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """From a transformers `config.json` (old `rope_theta`/`rope_scaling` or new `rope_parameters` form).

    Raises:
        CheckpointError: a family that is not built in, or a field that is missing.
    """
    family = config.get("model_type")
    if family != "llama":
        raise CheckpointError(f"{where}: model_type {family!r} is not built in; built in: llama")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act {config['hidden_act']!r} is not built in; built in: silu")
    try:
        heads = config["num_attention_heads"]
        eos = config.get("eos_token_id")
        return ModelConfig(
            family=family,
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            context=config["max_position_embeddings"],
            norm_eps=float(config["rms_norm_eps"]),
            rope_theta=_rope_theta(config),
            rope_scaling=_rope_scaling(config, where),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            bos_token=config.get("bos_token_id"),
            eos_tokens=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: expected the field {error.args[0]!r}, which is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _rope_theta(config: Mapping[str, Any]) -> float:
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0)


def _rope_scaling(config: Mapping[str, Any], where: str) -> RopeScaling | None:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(scaling["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind,
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise CheckpointError(f"{where}: rope type {kind!r} is not built in; built in: default, linear, llama3")


def from_gguf(fields: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> ModelConfig:
    """From GGUF metadata.

    Raises:
        CheckpointError: an architecture that is not built in, or a field that is missing.
    """
    arch = fields.get("general.architecture")
    if arch != "llama":
        raise CheckpointError(f"{where}: architecture {arch!r} is not built in; built in: llama")
    if "rope_freqs.weight" in tensors:
        raise CheckpointError(f"{where}: tensor rope_freqs.weight: scaled rotary frequencies in GGUF are not built in")
    if fields.get("llama.expert_count"):
        raise CheckpointError(f"{where}: llama.expert_count {fields['llama.expert_count']}: experts are not built in")
    try:
        heads = fields["llama.attention.head_count"]
        hidden = fields["llama.embedding_length"]
        scaling = fields.get("llama.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise CheckpointError(f"{where}: rope scaling {scaling!r} is not built in; built in: none, linear")
        eos = [fields[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in fields]
        tokens = fields.get("tokenizer.ggml.tokens")
        vocab = fields.get("llama.vocab_size") or (len(tokens) if tokens is not None else 0)
        return ModelConfig(
            family="llama",
            vocab=vocab,
            hidden=hidden,
            layers=fields["llama.block_count"],
            heads=heads,
            kv_heads=fields.get("llama.attention.head_count_kv", heads),
            head_dim=fields.get("llama.attention.key_length") or hidden // heads,
            intermediate=fields["llama.feed_forward_length"],
            context=fields["llama.context_length"],
            norm_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
            rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
            rope_scaling=(
                RopeScaling("linear", float(fields["llama.rope.scaling.factor"])) if scaling == "linear" else None
            ),
            tied="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors,
            bos_token=fields.get("tokenizer.ggml.bos_token_id"),
            eos_tokens=tuple(dict.fromkeys(eos)),
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: expected the metadata {error.args[0]!r}, which is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: {error}") from None
