"""Convert a transformers `config.json` to a `ModelConfig`, with one function per built-in family.

If a model of such a family has a feature that its function does not know, transformers' layers run the model, or the
model is refused. It never runs with wrong results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError, NotBuiltIn
from . import bounds, hf_foreign, hf_seq2seq
from .config import Activation, ModelConfig
from .hf_defaults import filled
from .hf_positions import context_of, rope_scaling
from .hf_seq2seq import eos_tokens

Config = Mapping[str, Any]


def from_hf(config: Config, where: str) -> ModelConfig:
    """Return the architecture that a `config.json` describes.

    Raises:
        NotBuiltIn: the family or a feature is not built in, and transformers cannot run the model either.
        CheckpointError: a field is missing or invalid.
    """
    family = config.get("model_type")
    made = FAMILIES.get(str(family)) or hf_seq2seq.FAMILIES.get(str(family))
    known = (*FAMILIES, *hf_seq2seq.FAMILIES)
    given, config = config, filled(config)
    try:
        bounds.check(config, alike=made is not None)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    try:
        if made is None:
            return hf_foreign.described(given, f"model_type {family!r} is not built in", known)
        try:
            return made(config)
        except NotBuiltIn as error:
            return hf_foreign.described(given, str(error), known)
    except KeyError as error:
        raise CheckpointError(f"{where}: expected the field {error.args[0]!r}, which is missing") from None
    except NotBuiltIn as error:
        raise NotBuiltIn(f"{where}: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _llama(config: Config, **more: Any) -> ModelConfig:
    """Convert the fields that llama, mistral and qwen share; `more` are fields that a family adds or replaces."""
    heads = config["num_attention_heads"]
    activation = _activation(config, "hidden_activation" if "hidden_activation" in config else "hidden_act", "silu")
    bias = bool(config.get("attention_bias", False))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    fields: dict[str, Any] = {
        "family": config["model_type"],
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "intermediate": config["intermediate_size"],
        "context": context_of(config["model_type"], config["max_position_embeddings"], rope),
        "norm_eps": float(config["rms_norm_eps"]),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "bos_token": config.get("bos_token_id"),
        "eos_tokens": eos_tokens(config),
        "activation": activation,
    }
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise NotBuiltIn("partial_rotary_factor is not built in; built in: 1")
    if "rope_theta" not in more:
        fields["rope_theta"] = float(rope.get("rope_theta") or config["rope_theta"])
        fields["rope_scaling"] = rope_scaling(rope, config)
    return ModelConfig(**{**fields, **more})


def _mistral(config: Config) -> ModelConfig:
    return _llama(config, windows=_same_window(config, config.get("sliding_window")))


def _qwen2(config: Config) -> ModelConfig:
    return _llama(config, qkv_bias=True, out_bias=False, windows=_typed_windows(config))


def _qwen3(config: Config) -> ModelConfig:
    return _llama(config, head_norms=True, windows=_typed_windows(config))


def _mixtral(config: Config) -> ModelConfig:
    return _llama(
        config,
        windows=_same_window(config, config.get("sliding_window")),
        native=False,
        experts=config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
    )


def _qwen_moe(config: Config) -> ModelConfig:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise NotBuiltIn("layers without experts among layers with experts are not built in")
    third = config["model_type"] == "qwen3_moe"
    biased = bool(config.get("attention_bias", False)) if third else bool(config.get("qkv_bias", True))
    return _llama(
        config,
        intermediate=config["moe_intermediate_size"],
        shared_expert=0 if third else config["shared_expert_intermediate_size"],
        head_norms=third,
        qkv_bias=biased,
        out_bias=biased and third,
        windows=_same_window(config, _used_window(config)) if third else _typed_windows(config),
        native=False,
        experts=config["num_experts"],
        experts_per_token=config["num_experts_per_tok"],
        normalises_choices=bool(config.get("norm_topk_prob", False)),
    )


def _gemma3(config: Config) -> ModelConfig:
    for name in ("use_bidirectional_attention", "attn_logit_softcapping"):
        if config.get(name):
            raise NotBuiltIn(f"{name} {config[name]!r} is not built in")
    types = config.get("layer_types")
    if types is None:
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        types = ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
                 for layer in range(config["num_hidden_layers"])]  # fmt: skip
    rope = config.get("rope_parameters") or {}
    far = rope.get("full_attention") or config.get("rope_scaling") or {}
    near = rope.get("sliding_attention") or {}
    if rope_scaling(near, config) is not None:
        raise NotBuiltIn(f"rope type {near.get('rope_type')!r} of sliding layers is not built in")
    return _llama(
        config,
        tied=bool(config.get("tie_word_embeddings", True)),
        norm="rms_plus_one",
        head_norms=True,
        post_norms=True,
        embedding_scale=float(config["hidden_size"]) ** 0.5,
        attention_scale=float(config["query_pre_attn_scalar"]) ** -0.5,
        windows=_windows(config["sliding_window"], types),
        rope_theta=float(far.get("rope_theta") or config["rope_theta"]),
        rope_scaling=rope_scaling(far, config),
        local_rope_theta=float(near.get("rope_theta") or config.get("rope_local_base_freq") or 1e4),
        logit_softcap=config.get("final_logit_softcapping"),
    )


def _gpt2(config: Config) -> ModelConfig:
    for name, expected in (
        ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False),
    ):  # fmt: skip
        if config.get(name, expected) is not expected:
            raise NotBuiltIn(f"{name} {config[name]!r} is not built in; built in: {expected}")
    hidden, heads = config["n_embd"], config["n_head"]
    return ModelConfig(
        family="gpt2",
        vocab=config["vocab_size"],
        hidden=hidden,
        layers=config["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=config.get("n_inner") or 4 * hidden,
        context=config["n_positions"],
        norm_eps=float(config["layer_norm_epsilon"]),
        rope_theta=0.0,
        rope_scaling=None,
        tied=bool(config.get("tie_word_embeddings", True)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        bos_token=config.get("bos_token_id"),
        eos_tokens=eos_tokens(config),
        norm="layer",
        activation=_activation(config, "activation_function", "gelu_new"),
        gated=False,
        learned_positions=True,
    )


FAMILIES: Mapping[str, Callable[[Config], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu",
}  # fmt: skip


def _activation(config: Config, name: str, default: str) -> Activation:
    value = config.get(name, default)
    if value not in _ACTIVATIONS:
        raise NotBuiltIn(f"{name} {value!r} is not built in; built in: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _same_window(config: Config, window: int | None) -> tuple[int, ...]:
    return (window,) * config["num_hidden_layers"] if window else ()


def _used_window(config: Config) -> int | None:
    return config.get("sliding_window") if config.get("use_sliding_window") else None


def _typed_windows(config: Config) -> tuple[int, ...]:
    """Return qwen's windows: for the sliding layers of `layer_types`, or else for layers from `max_window_layers` on."""
    if not _used_window(config):
        return ()
    types = config.get("layer_types") or [
        "sliding_attention" if layer >= config["max_window_layers"] else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    return _windows(config["sliding_window"], types)


def _windows(window: int, types: list[str]) -> tuple[int, ...]:
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise NotBuiltIn(f"layer type {unknown.pop()!r} is not built in; built in: sliding_attention, full_attention")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
