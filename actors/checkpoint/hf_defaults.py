"""Give the fields that a `config.json` leaves out the values of transformers' config classes.

Files leave out what has its default, and the defaults differ from family to family. This table holds those of the
families that are built in, so that a model runs alike with and without transformers; other families take theirs from the
library. A test compares the table with the library, field by field.

The tokens that begin and end a text are not among them: transformers, too, generates with those that a file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_MISTRAL: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "sliding_window": 4096,
}  # fmt: skip
_QWEN2: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
_QWEN_MOE: dict[str, Any] = {
    **_QWEN2, "hidden_size": 2048, "decoder_sparse_step": 1, "norm_topk_prob": False, "mlp_only_layers": None,
}  # fmt: skip
_T5: dict[str, Any] = {
    "d_model": 512, "d_kv": 64, "num_decoder_layers": None, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": 50265, "max_position_embeddings": 1024, "encoder_layers": 12, "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16, "decoder_layers": 12, "decoder_ffn_dim": 4096, "decoder_attention_heads": 16,
    "activation_function": "gelu", "d_model": 1024, "scale_embedding": False, "tie_word_embeddings": True,
}  # fmt: skip
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": {**_QWEN2, "head_dim": 128, "attention_bias": False},
    "mixtral": {**_MISTRAL, "rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8},
    "qwen2_moe": {
        **_QWEN_MOE, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60,
        "qkv_bias": True,
    },
    "qwen3_moe": {
        **{name: value for name, value in _QWEN_MOE.items() if name not in ("max_window_layers", "layer_types")},
        "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4,
        "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128, "attention_bias": False,
    },
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "layer_types": None, "final_logit_softcapping": None, "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "gpt2": {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "t5": {**_T5, "vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"},
    "mt5": {
        **_T5, "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": True,
    },
    "marian": {
        **_BART, "vocab_size": 58101, "decoder_vocab_size": None,
    },
    "bart": _BART,
    "pegasus": _BART,
    "mbart": _BART,
    "mvp": {**_BART, "vocab_size": 50267},
    "plbart": {
        **_BART, "vocab_size": 50005, "encoder_layers": 6, "encoder_ffn_dim": 3072, "encoder_attention_heads": 12,
        "decoder_layers": 6, "decoder_ffn_dim": 3072, "decoder_attention_heads": 12, "d_model": 768, "scale_embedding": True,
    },
}  # fmt: skip
"""Defaults of the fields that are read here, by `model_type`. None: it follows from other fields, or there is none."""
ROPE_THETA: Mapping[str, float] = {"mixtral": 1e6, "gemma3_text": 1e6}
"""Base of the rotary frequencies where it is not 10,000."""
_T5_NAMES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
_BART_NAMES = {
    "num_attention_heads": "encoder_attention_heads",
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
}
NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
             "num_hidden_layers": "n_layer"},
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "t5": _T5_NAMES, "mt5": _T5_NAMES,
    "marian": _BART_NAMES, "bart": _BART_NAMES, "pegasus": _BART_NAMES, "mbart": _BART_NAMES,
    "mvp": _BART_NAMES, "plbart": {**_BART_NAMES, "initializer_range": "init_std"},
}  # fmt: skip
"""Other names of fields, as in the `attribute_map` of transformers' classes."""


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the fields that it leaves out, under the names that the family's function reads.

    A config of a family that is not built in stays as it is.
    """
    family = str(config.get("model_type"))
    if family not in DEFAULTS:
        return dict(config)
    names = NAMES.get(family, {})
    made = {names.get(name, name): value for name, value in config.items()}
    theta = {} if made.get("rope_theta") else {"rope_theta": ROPE_THETA.get(family, 10_000.0)}
    return {**DEFAULTS[family], **made, **theta}
