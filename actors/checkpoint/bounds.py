"""Check that the values of a config are within bounds.

A file may come from anybody. So the check refuses NaN, a negative size, or a list where a number belongs. Later, such a
value could cause a wrong answer, an error deep in a library, or unlimited use of memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

MOST_LAYERS, MOST_SIZE, MOST_COUNT = 4096, 1 << 24, (1 << 31) - 1
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers",
)  # fmt: skip
SIZES = (
    "vocab_size", "hidden_size", "d_model", "n_embd", "intermediate_size", "moe_intermediate_size", "d_ff", "d_kv",
    "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "head_dim", "num_attention_heads", "n_head", "num_heads",
    "num_key_value_heads", "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "num_experts_per_tok")
COUNTS = (
    "max_position_embeddings", "n_positions", "sliding_window", "shared_expert_intermediate_size",
    "original_max_position_embeddings", "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
BASES = ("rope_theta", "rope_local_base_freq")
FACTORS = (
    "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "factor", "low_freq_factor",
    "high_freq_factor",
)  # fmt: skip
TOKENS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
)  # fmt: skip
FLAGS = (
    "attention_bias", "mlp_bias", "tie_word_embeddings", "norm_topk_prob", "scale_embedding", "use_sliding_window",
    "normalize_before", "add_final_layer_norm",
)  # fmt: skip
WORDS = ("hidden_act", "hidden_activation", "activation_function", "rope_type", "feed_forward_proj", "dense_act_fn")
NAMES = {*LAYERS, *SIZES, *EXPERTS, *COUNTS, *EPSILONS, *BASES, *FACTORS, *TOKENS, *FLAGS, *WORDS}


def check(config: Mapping[str, Any], *, alike: bool, where: str = "") -> None:
    """Check every value that some family uses, under the names that the families give it, also in nested objects.

    Null counts as absent. If `alike`, all layers of the family have the same sizes, so a size is one number.
    Otherwise a size may be a list, with one number per layer.

    Raises:
        CheckpointError: a value is out of bounds; the message names it.
    """
    for name, value in config.items():
        if isinstance(value, Mapping) and name not in NAMES:
            check(value, alike=alike, where=f"{where}{name}.")
        elif value is not None:
            expected = _expected(name, value, alike)
            if expected:
                raise CheckpointError(f"config: {where}{name}: expected {expected}, got {value!r:.80}")
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if types is not None and not (isinstance(types, list) and all(isinstance(each, str) for each in types)):
        raise CheckpointError(f"config: {where}layer_types: expected a list of words, got {types!r:.80}")
    if types is not None and isinstance(layers, int) and len(types) != layers:
        raise CheckpointError(f"config: {where}layer_types: expected {layers}, one for each layer, got {len(types)}")


def _expected(name: str, value: Any, alike: bool) -> str:
    """Return what a value is expected to be; empty if the value is valid."""
    if isinstance(value, list) and (name not in NAMES or (not alike and name in (*SIZES, *EXPERTS, *COUNTS))):
        return ""
    for names, least, most in (
        (LAYERS, 1, MOST_LAYERS), (SIZES, 1, MOST_SIZE), (EXPERTS, int(alike), MOST_LAYERS), (COUNTS, 0, MOST_COUNT),
    ):  # fmt: skip
        if name in names:
            return "" if whole(value, least, most) else f"a whole number from {least} to {most}"
    for values, over, limit in ((EPSILONS, 0, "0.1"), (BASES, 1, "1e12"), (FACTORS, 0, "1e6")):
        if name in values:
            return "" if number(value, over, float(limit)) else f"a number over {over} and at most {limit}"
    if name in TOKENS:
        ids = value if isinstance(value, list) else [value]
        return "" if all(whole(token, -1, MOST_COUNT) for token in ids) else "a token id, or a list of token ids"
    if name in FLAGS:
        return "" if isinstance(value, bool) else "true or false"
    if name in WORDS:
        return "" if isinstance(value, str) else "a word"
    return "a finite number" if isinstance(value, float) and not math.isfinite(value) else ""


def whole(value: Any, least: int, most: int) -> bool:
    """Return whether a value is a whole number from `least` to `most`; True and False are not numbers here."""
    return type(value) is int and least <= value <= most


def number(value: Any, over: float, most: float) -> bool:
    """Return whether a value is a finite number over `over` and at most `most`."""
    return type(value) in (int, float) and math.isfinite(value) and over < value <= most
