"""Convert a transformers `config.json` to a `ModelConfig`, with one function per built-in family.

If a model of such a family has a feature that its function does not know, transformers' layers run the model, or the
model is refused. It never runs with wrong results.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, describe
from . import bounds, hf_seq2seq
from .config import Activation, ModelConfig, RopeScaling
from .gguf_config import ARCHITECTURES
from .hf_defaults import filled
from .hf_seq2seq import eos_tokens

Config = Mapping[str, Any]


class NotBuiltIn(CheckpointError):
    """Signal a family, or a feature of one, that is not built in."""


def from_hf(config: Config, where: str) -> ModelConfig:
    """Return the architecture that a `config.json` describes.

    Raises:
        NotBuiltIn: the family or a feature is not built in, and transformers cannot run the model either.
        CheckpointError: a field is missing or invalid.
    """
    family = config.get("model_type")
    made = FAMILIES.get(str(family)) or hf_seq2seq.FAMILIES.get(str(family))
    given, config = config, filled(config)
    try:
        bounds.check(config, alike=made is not None)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    try:
        if made is None:
            return _foreign(given, f"model_type {family!r} is not built in")
        try:
            return made(config)
        except NotBuiltIn as error:
            return _foreign(given, str(error))
    except KeyError as error:
        raise CheckpointError(f"{where}: expected the field {error.args[0]!r}, which is missing") from None
    except NotBuiltIn as error:
        raise NotBuiltIn(f"{where}: {error}") from None
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
        fields["rope_scaling"] = _rope_scaling(rope, config)
    return ModelConfig(**{**fields, **more})


def context_of(family: str, most: int, rope: Mapping[str, Any]) -> int:
    """Return how many positions a model can use: `factor` times the original ones, if its rotary frequencies are scaled.

    The rule is vLLM's. The configs of some ways of scaling, and of gemma3, give the number after scaling.
    """
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or factor is None or "gemma3" in family:
        return most
    before = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    numbers = bounds.number(factor, 0.0, 1e6) and bounds.whole(before or most, 1, bounds.MOST_COUNT)
    return min(max(most, int((before or most) * factor)), bounds.MOST_COUNT) if numbers else most


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
    if _rope_scaling(near, config) is not None:
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
        rope_scaling=_rope_scaling(far, config),
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


def _foreign(config: Config, why: str) -> ModelConfig:
    """Describe any other causal model that transformers knows, by the sizes that all its configs have."""
    if importlib.util.find_spec("transformers") is None:
        raise NotBuiltIn(
            f"{why}; built in: {', '.join([*FAMILIES, *hf_seq2seq.FAMILIES])}; for other families "
            "pip install 'ranvier[hf]'"
        )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    family = config.get("model_type")
    encoder = family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")  # such as bert
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or config.get("is_encoder_decoder"):
        raise NotBuiltIn(f"{why}, and transformers knows no causal model of that type")
    from transformers import CONFIG_MAPPING

    if family in ROUNDED:
        raise NotBuiltIn(f"{why}, and {family} attends to other tokens with a cache than without")
    if family in DRAFTERS:
        raise NotBuiltIn(
            f"{why}, and {family} is no model by itself: it drafts for another model and needs that model's states"
        )
    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))  # adds defaults of missing fields
    except Exception as error:  # the library raises errors of many classes
        raise CheckpointError(f"config: transformers refuses this config: {describe(error)[:300]}") from None
    sizes = text = made.get_text_config()  # the text part of a model that also takes pictures or sound
    uncut = _uncut(made, text)
    if not hasattr(sizes, "hidden_size"):  # several stacks of layers: use the sizes of the largest
        stacks = [getattr(made, name) for name in made.sub_configs]
        sizes = max(stacks, key=lambda stack: _size(stack, "num_hidden_layers", 0), default=sizes)
    hidden, heads = sizes.hidden_size, _size(sizes, "num_attention_heads", 1)
    bos = getattr(text, "bos_token_id", None)
    return ModelConfig(
        family=config["model_type"],
        vocab=text.vocab_size,
        hidden=hidden,
        layers=getattr(sizes, LAYERS_OF_FILE.get(str(family), "num_hidden_layers")),
        heads=heads,
        kv_heads=heads if uncut else _size(sizes, "num_key_value_heads", heads),
        head_dim=_size(sizes, "head_dim", max(1, hidden // heads)),
        intermediate=_size(sizes, "intermediate_size", 4 * hidden),
        context=context_of(
            config["model_type"],
            _size(sizes, "max_position_embeddings", 1 << 20),
            getattr(sizes, "rope_parameters", None) or {},
        ),
        norm_eps=0.0,
        rope_theta=0.0,
        rope_scaling=None,
        tied=bool(getattr(made, "tie_word_embeddings", False)),
        bos_token=bos if isinstance(bos, int) else None,
        eos_tokens=eos_tokens({"eos_token_id": getattr(text, "eos_token_id", None)}),
        native=False,
        uncut=uncut,
        uncached=uncut == WITHOUT_CACHE,
        both_ways=uncut == BOTH_WAYS,
        recomputed_after=_recomputed_after(str(family), getattr(text, "rope_parameters", None) or {}),
    )


def _recomputed_after(family: str, rope: Mapping[str, Any]) -> int:
    before = rope.get("original_max_position_embeddings")
    return before if family in RECOMPUTED and rope.get("rope_type") == "longrope" and isinstance(before, int) else 0


def by_transformers(path: Path, arch: str) -> dict[str, Any]:
    """Return the `config.json` of a GGUF file whose architecture only transformers knows.

    Raises:
        NotBuiltIn: transformers does not know it either, or is not installed.
    """
    known = ", ".join(ARCHITECTURES)
    why = f"{path}: architecture {arch!r} is not built in; built in: {known}"
    if importlib.util.find_spec("transformers") is None:
        raise NotBuiltIn(f"{why}; for some others pip install 'ranvier[hf]'")
    from transformers import AutoConfig

    try:
        made: dict[str, Any] = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    except Exception as error:  # the library raises errors of many classes
        raise NotBuiltIn(f"{why}; and transformers cannot read it: {describe(error)[:200]}") from None
    return made


def _size(sizes: Any, name: str, default: int) -> int:
    """Return a size that is only used for display and estimates.

    Return `default` if the size is missing, or if it differs from layer to layer as in some families.
    """
    try:
        found = getattr(sizes, name, None)
    except Exception:  # the library raises errors of many classes
        return default
    return found if isinstance(found, int) and found > 0 else default


def _uncut(made: Any, sizes: Any) -> str:
    """Return why a model's layers cannot be cut apart; empty if they can.

    There are five reasons: text is only a part of the model's inputs; its layers keep a state other than a KV cache; they
    differ in their sizes, or take more than what the layer before gives; its prompt tokens see each other in both directions.
    """
    kinds = next((k for name in ("layer_types", "layers_block_type") if (k := getattr(sizes, name, None))), None)
    if made.model_type in PROMPTS_BOTH_WAYS:
        return BOTH_WAYS
    if made.model_type in STATES_ELSEWHERE or (kinds is None and not hasattr(sizes, "num_attention_heads")):
        return WITHOUT_CACHE
    odd = sorted({str(kind) for kind in kinds or ()} - ATTENDING)
    if odd:
        return f"layers of the type {', '.join(odd)} keep a state that is no KV cache"
    if made.model_type in LOOPED:
        return "its layers run several times, or keep several KV caches"
    if getattr(sizes, "hidden_size_per_layer_input", 0) or getattr(sizes, "num_kv_shared_layers", 0):
        return "its layers take more than the hidden states of the layer before"
    if sizes is not made:
        return "text is only a part of what it takes"
    return "its layers differ in their sizes" if any(_differs(sizes, name) for name in SIZES) else ""


def _differs(sizes: Any, name: str) -> bool:
    try:
        return not isinstance(getattr(sizes, name, 1), int | None)
    except Exception:  # the library raises errors of many classes
        return True


LAYERS_OF_FILE = {"longcat_flash": "num_layers", "hrm_text": "num_layers_per_stack"}
"""Fields with the number of layers that a file holds, where it is not `num_hidden_layers`."""
LOOPED = ("longcat_flash", "hrm_text", "dory")
SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")


WITHOUT_CACHE = "the library keeps no state per session for it"
STATES_ELSEWHERE = ("recurrent_gemma", "rwkv", "xlstm", "blt", "openai-gpt")
"""Families whose states transformers keeps in the modules or in a list, not in a cache per session."""
BOTH_WAYS = "the tokens of a prompt see each other in both directions"
PROMPTS_BOTH_WAYS = ("cpmant", "xlnet")
RECOMPUTED = ("phi3", "phimoe", "phi4_multimodal")
"""Families whose cache transformers throws away where a text gets longer than the original context of `longrope`."""
ROUNDED = ("reformer",)
DRAFTERS = ("gemma4_assistant",)
ATTENDING = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
    "global",
    "local",
    "dense",
    "sparse",
}
"""Types of layers that keep only keys and values."""
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
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


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


def _rope_scaling(rope: Mapping[str, Any], config: Config) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(rope["factor"]))
    outside = config.get("original_max_position_embeddings")  # it takes precedence, as in transformers
    before = int(outside or rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    if kind == "llama3":
        return RopeScaling(
            kind,
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            before,
        )
    if kind == "yarn":
        return _yarn(rope, before)
    if kind == "longrope" and rope.get("short_factor") == rope.get("long_factor") and rope.get("attention_factor"):
        factors = tuple(float(factor) for factor in rope["short_factor"])
        return RopeScaling("factors", 1.0, factors=factors, attention_factor=float(rope["attention_factor"]))
    raise NotBuiltIn(f"rope type {kind!r} is not built in; built in: default, linear, llama3, yarn")


def _yarn(rope: Mapping[str, Any], before: int) -> RopeScaling:
    """Convert yarn's fields; where they do not give the factor of attention, it follows from the factor of the context."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    factor, attention = float(rope["factor"]), rope.get("attention_factor")
    one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None:
        attention = scale(one) / scale(all_dims) if one and all_dims else scale(1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_context=before,
        attention_factor=float(attention),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
    )
